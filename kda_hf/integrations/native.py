"""KDA models that transformers ships, on our operators and our cache: `accelerate(model)`.

What transformers offers to exchange by itself, single functions by its kernel mapping, is less than a layer: one launch
for all that a token needs between projections, and the inputs that a cache must keep to take tokens back, are of the
whole layer. So a layer becomes a [`KDALayer`] where it stands, with its own parameters, and the model gets the
`generate()` of this package. `undo()` gives both their own class again.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.integrations.accelerate import force_accelerate_hooks

from ..generation import KDAGenerationMixin
from ..layer import KDALayer
from .accelerated import AcceleratedModel, Acceleration, derived
from .experts import GroupedExperts
from .fla_model import accelerate_fla, is_fla_model


class NativeKDALayer(KDALayer):
    """A KDA layer of transformers: three projections, one convolution, a gate in a module of its own, HV = H, V = K."""

    conv1d: Any
    forget_gate: Any

    @property
    def num_value_heads(self) -> int:  # type: ignore[override]
        return self.num_heads

    @property
    def value_head_dim(self) -> int:  # type: ignore[override]
        return self.head_dim

    @property
    def allow_neg_eigval(self) -> bool:  # type: ignore[override]
        return False

    @property
    def norm_eps(self) -> float:  # type: ignore[override]
        return self.o_norm.variance_epsilon

    @property
    def lower_bound(self) -> float | None:  # type: ignore[override]
        return None

    def decay_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.forget_gate.f_b_proj(self.forget_gate.f_a_proj(hidden_states))

    def output_gate_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.g_b_proj(self.g_a_proj(hidden_states))

    def conv_weight(self) -> torch.Tensor:
        return self.conv1d.weight.squeeze(1)

    def conv_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.conv_weight().split(self.qkv_dims)
        return q, k, v

    def gate_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forget_gate.A_log.reshape(-1), self.forget_gate.dt_bias

    def step_parameters(self) -> dict[str, Any]:
        parameters = super().step_parameters()
        # The kernel takes weights of one dtype, and convolutions may be fp32 in a bf16 model.
        return parameters | {"norm_weight": parameters["norm_weight"].to(self.conv1d.weight.dtype)}

    @force_accelerate_hooks(["conv1d", "forget_gate", "o_norm"])  # whose parameters are used without their forward
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the layer's own; see [`KDALayer.attend`]."""
        for name in ("cache_params", "past_key_values"):  # as older versions of transformers call it
            cache = kwargs.get(name) if cache is None else cache
        cu_seqlens = kwargs.get("cu_seqlens")
        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        if attention_mask is not None and _is_of_tokens_alone(attention_mask, hidden_states):
            attention_mask = None
        return self.attend(hidden_states, attention_mask, cache, cu_seqlens)


def _is_of_tokens_alone(mask: torch.Tensor, hidden_states: torch.Tensor) -> bool:
    """Whether a mask has no padding. A single token is none, as transformers sees it too. Waits for the device, once
    for several tokens: sorting padding out would take longer."""
    if hidden_states.shape[1] == 1:
        return True
    return not torch.compiler.is_compiling() and bool((mask != 0).all())


class KimiLinearLayer(NativeKDALayer):
    """`KimiLinearDeltaAttention`: the softplus gate."""


class Glm5NextLayer(NativeKDALayer):
    """`Glm5NextTextLinearAttention`: the safe gate, or softplus without a bound."""

    @property
    def lower_bound(self) -> float | None:  # type: ignore[override]
        return self.forget_gate.safe_gate_lower_bound


class BailingHybridLayer(NativeKDALayer):
    """`BailingHybridDeltaAttention`: either gate; its logits and those of the output gate come from one product."""

    @property
    def lower_bound(self) -> float | None:  # type: ignore[override]
        return self.forget_gate.lower_bound if self.forget_gate.safe_gate else None

    def decay_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.forget_gate.f_proj(hidden_states)

    def output_gate_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.g_proj(hidden_states)


# Layers of transformers, by the module of their class and its name.
LAYERS: dict[tuple[str, str], type[NativeKDALayer]] = {
    ("transformers.models.kimi_linear.modeling_kimi_linear", "KimiLinearDeltaAttention"): KimiLinearLayer,
    ("transformers.models.glm5_next.modeling_glm5_next", "Glm5NextTextLinearAttention"): Glm5NextLayer,
    ("transformers.models.bailing_hybrid.modeling_bailing_hybrid", "BailingHybridDeltaAttention"): BailingHybridLayer,
}
EXPERTS = {
    ("transformers.models.kimi_linear.modeling_kimi_linear", "KimiLinearExperts"),
    ("transformers.models.glm5_next.modeling_glm5_next", "Glm5NextTextExperts"),
    ("transformers.models.bailing_hybrid.modeling_bailing_hybrid", "BailingHybridExperts"),
}
MODEL_TYPES = ("kimi_linear", "glm5_next", "bailing_hybrid")


def _kind(module: nn.Module) -> type[NativeKDALayer] | None:
    return LAYERS.get((type(module).__module__, type(module).__name__))


def _has_experts(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) in EXPERTS


def can_accelerate(model: nn.Module) -> bool:
    """Whether [`accelerate`] knows what `model` is, and has not seen it yet."""
    modules = list(model.modules())
    is_known = is_fla_model(model) or any(_kind(module) for module in modules)
    return is_known and not any(isinstance(module, AcceleratedModel) for module in modules)


def _refusal(layer: Any) -> str | None:
    """Why a layer of a known class can't run on our operators, or None."""
    if layer.activation != "silu":
        return f"its activation is {layer.activation!r}, not 'silu'"
    if layer.conv1d.bias is not None:
        return "its convolution has a bias"
    return None


def accelerate(model: Any) -> Any:
    """
    Puts the KDA layers of a model of transformers or FLA on our operators, and its `generate()` on [`KDACache`].

    Works in place, on the parameters as they are: names, values, saving, training and device stay what they are. With
    it, assisted decoding and prompt lookup work, and are lossless. On a GPU `generate()` runs its steps as CUDA graphs
    where the model allows it.

    Args:
        model (`PreTrainedModel`): a loaded `kimi_linear`, `glm5_next` or `bailing_hybrid` model, on any device, or a
            module that contains one; or FLA's `KDAForCausalLM`, which then runs as the one of this package.

    Returns:
        `model`. It has `replaced`, the names and classes of what was changed, and `undo()`. As a context,
        `with accelerate(model):`, it undoes at the end.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no layers of these models, or layers that our operators can't replace, with their name and
            the reason. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a loaded model, got {type(model).__name__}")
    if any(isinstance(module, AcceleratedModel) for module in model.modules()):
        return model
    if is_fla_model(model):
        return accelerate_fla(model)
    layers = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        reason = _refusal(module)
        if reason is not None:
            raise ValueError(f"`model`: {name} can't be replaced: {reason}")
        layers[name] = (module, kind)
    if not layers:
        kind_of = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"`model` has no KDA layers of {', '.join(MODEL_TYPES)}, or FLA's; it is {kind_of!r}")
    # The model with the method `generate`, which may lie within an adapter's, or `model` itself.
    whole = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    acceleration = Acceleration()
    bases = (AcceleratedModel, KDAGenerationMixin) if isinstance(whole, GenerationMixin) else (AcceleratedModel,)
    acceleration.change("", whole, derived(type(whole), *bases))
    for name, (module, kind) in layers.items():
        acceleration.change(name, module, derived(type(module), kind))
    for name, module in model.named_modules():
        if _has_experts(module):
            acceleration.change(name, module, derived(type(module), GroupedExperts))
    whole._acceleration = acceleration  # type: ignore[assignment]
    return model
