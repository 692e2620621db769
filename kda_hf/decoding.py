"""One token a row through the model, for `generate()`: what its modules compute, in fewer calls.

A decode step of a small model, and of any model on a CPU, is small calls, and modules cost several each. So while
`generate()` runs, forwards of one token go through a [`DecodeProgram`], if the model is what this package makes of it:
with hooks, adapters or quantized layers in it, its modules run.
"""

import contextlib
import contextvars
import itertools
import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import KDACache, KDACacheLayer
from .ops import kda_decode_step, recurrent


logger = logging.getLogger("kda_hf")

_active: contextvars.ContextVar["DecodeProgram | None"] = contextvars.ContextVar("kda_hf_decode_program", default=None)
_building = threading.Lock()
# What a program stands for: names of modules, and the classes that it knows.
_KNOWN = [
    (re.compile(pattern.replace("LAYER", r"model\.layers\.\d+")), name)
    for pattern, name in {
        "": "KDAForCausalLM",
        "model": "KDAModel",
        r"model\.layers": "ModuleList",
        r"model\.embed_tokens": "Embedding",
        r"model\.norm|LAYER\.(input|post_attention)_layernorm": "KDARMSNorm",
        "LAYER": "KDADecoderLayer",
        r"LAYER\.linear_attn": "KimiDeltaAttention",
        r"LAYER\.linear_attn\.([qkvbo]|[fg]_[ab])_proj|LAYER\.mlp\.(gate|up|down)_proj|lm_head": "Linear",
        r"LAYER\.linear_attn\.[qkv]_conv1d": "Conv1d",
        r"LAYER\.linear_attn\.o_norm": "KDARMSNormGated",
        r"LAYER\.mlp": "Qwen3MLP",
    }.items()
]
_CALLED = re.compile(r"model\.rotary_emb|model\.layers\.\d+\.(self_attn|mlp\.act_fn)")
_HOMES = ("kda_hf.", "transformers.models.qwen3.", "torch.nn.modules.")


@contextlib.contextmanager
def decode_program(model: nn.Module) -> Iterator[None]:
    """Within, forwards of `model` with one token a row go through a program, where it has one."""
    reason = refusal(model)
    if reason is not None:
        logger.debug("decoding by modules: %s", reason)
    with _building:
        program = None if reason else DecodeProgram(model)
    token = _active.set(program)
    try:
        yield
    finally:
        _active.reset(token)


def active_program(model: nn.Module, input_ids: torch.Tensor | None, cache: Any) -> "DecodeProgram | None":
    """The program that serves this forward of `model`."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    program = _active.get()
    if program is None or program.model is not model:
        return None
    return program if program.takes(input_ids, cache) else None


def refusal(model: Any) -> str | None:
    """Why a program would not do what the modules of `model` do, or None."""
    if nn.modules.module._has_any_global_hook():
        return "there are global hooks"
    if model.training:
        return "the model is in training mode"
    if model.config.output_hidden_states or model.config.output_attentions:
        return "the configuration asks for more than logits"
    devices = set()
    for name, module in model.named_modules():
        if _CALLED.match(name):
            continue
        kind = type(module)
        known = next((cls for pattern, cls in _KNOWN if pattern.fullmatch(name)), None)
        if known != kind.__name__ or not kind.__module__.startswith(_HOMES) or "forward" in vars(module):
            return f"`{name}` is a {kind.__qualname__} of another kind"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # Those of transformers' output capturing do nothing unless asked for.
        if any(not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing") for hook in hooks):
            return f"`{name}` has hooks"
        if getattr(module, "bias", None) is not None or getattr(module, "max_norm", None) is not None:
            return f"`{name}` does more than a product"
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor or not parameter.numel():
                return f"`{name}.{key}` is no plain tensor"
            devices.add(parameter.device)
    if len(devices) > 1:
        return "the parameters are on several devices"
    return None


def _joined(parameters: list[nn.Parameter], users: Counter[int]) -> torch.Tensor | None:
    """The rows of all weights `[N, hidden_size]` as one tensor, which they become views of; None where they can't.

    Names, values and gradients stay what they are. `Module.to` gives each its own memory again. A few rows of zeros
    follow, so that rows of results are aligned, as kernels want them. `users`: how many parameters of the model have
    the memory at an address.
    """
    first, sizes = parameters[0], [len(p) for p in parameters]
    shape = (-(-sum(sizes) // 16) * 16, first.shape[1])
    alike = all((p.dtype, p.device, p.shape[1]) == (first.dtype, first.device, first.shape[1]) for p in parameters)
    if not alike or any(p.is_inference() or not p.is_contiguous() for p in parameters):
        return None
    memory = first.untyped_storage()
    starts = [first.nbytes // len(first) * start for start in itertools.accumulate(sizes, initial=0)]
    if memory.nbytes() == math.prod(shape) * first.element_size() and all(
        p.data_ptr() == memory.data_ptr() + start for p, start in zip(parameters, starts, strict=False)
    ):
        return first.data.as_strided(shape, (shape[1], 1))
    for p in parameters:
        storage = p.untyped_storage()
        if storage.nbytes() != p.nbytes or users[storage.data_ptr()] > 1:  # shared with something else
            return None
    with torch.inference_mode(False), torch.no_grad():
        joined = first.new_zeros(shape)
        for p, own in zip(parameters, joined.split([*sizes, shape[0] - sum(sizes)]), strict=False):
            own.copy_(p)
            p.data = own
    return joined


class _Projections:
    """Linear layers of one input, in one product if their weights can be joined."""

    def __init__(self, modules: list[Any], users: Counter[int]):
        self.weights = [module.weight for module in modules]
        self.joined = _joined(self.weights, users)
        self.sizes = [len(weight) for weight in self.weights]
        if self.joined is not None:
            self.sizes.append(len(self.joined) - sum(self.sizes))

    def __call__(self, x: torch.Tensor) -> Any:
        if self.joined is None:
            return [F.linear(x, weight) for weight in self.weights]
        return F.linear(x, self.joined).split(self.sizes, -1)[: len(self.weights)]


class _RMSNorm:
    """`KDARMSNorm`."""

    def __init__(self, module: Any):
        self.weight, self.eps = module.weight, module.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _KDA:
    """`KimiDeltaAttention` of one token, with states before it."""

    def __init__(self, module: Any, users: Counter[int]):
        self.layer_idx, self.steps_at_once = module.layer_idx, module.steps_at_once
        self.heads = module.qkv_heads
        self.head_dim, self.value_head_dim = module.head_dim, module.value_head_dim
        self.projections = _Projections(
            [module.q_proj, module.k_proj, module.v_proj, module.f_a_proj, module.g_a_proj, module.b_proj], users
        )
        self.decay, self.gate, self.output = module.f_b_proj.weight, module.g_b_proj.weight, module.o_proj.weight
        self.parameters = module.step_parameters()
        self.scale = self.head_dim**-0.5

    def __call__(self, x: torch.Tensor, layer: KDACacheLayer) -> torch.Tensor:
        batch = x.shape[0]
        *qkv, decay, gate, beta = self.projections(x)
        q, k, v = (y.view(batch, 1, heads, -1) for y, heads in zip(qkv, self.heads, strict=True))
        g = F.linear(decay, self.decay).view(batch, 1, -1, self.head_dim)
        output_gate = F.linear(gate, self.gate).view(batch, 1, -1, self.value_head_dim)
        states = {"conv_state": layer.conv_states[0], "recurrent_state": layer.recurrent_states[0]}
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            # What the operator comes to, but for its checks, which would take a third of the time.
            o = recurrent.decode_step(
                q, k, v, g, beta, output_gate, scale=self.scale, state_v_first=False, **states, **self.parameters
            )
        else:
            o = kda_decode_step(q, k, v, g, beta, output_gate, **states, **self.parameters)
        layer.note_update_in_place()
        layer.advance(1)
        return F.linear(o.flatten(-2), self.output)


class _MLP:
    """`Qwen3MLP`."""

    def __init__(self, module: Any, users: Counter[int]):
        self.projections = _Projections([module.gate_proj, module.up_proj], users)
        self.act, self.down = module.act_fn, module.down_proj.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.projections(x)
        return F.linear(self.act(gate) * up, self.down)


class DecodeProgram:
    """The forward of a `KDAForCausalLM` for one token a row, as long as its modules and parameters stay what they are.

    Their values may change: weights that share an input become views of one tensor, and are read there.
    """

    def __init__(self, model: Any):
        decoder = model.model
        self.model, self.decoder = model, decoder
        self.embedding, self.head = decoder.embed_tokens.weight, model.lm_head.weight
        self.norm = _RMSNorm(decoder.norm)
        users = Counter(parameter.untyped_storage().data_ptr() for parameter in model.parameters())
        self.layers: list[tuple[Any, _RMSNorm, _RMSNorm, _MLP]] = []
        for layer in decoder.layers[: model.config.num_hidden_layers]:
            is_kda = layer.layer_type == "linear_attention"
            mixer = _KDA(layer.linear_attn, users) if is_kda else layer.self_attn
            norms = _RMSNorm(layer.input_layernorm), _RMSNorm(layer.post_attention_layernorm)
            self.layers.append((mixer, *norms, _MLP(layer.mlp, users)))
        self.kda_layers = [mixer for mixer, *_ in self.layers if isinstance(mixer, _KDA)]

    def takes(self, input_ids: torch.Tensor | None, cache: Any) -> bool:
        """Whether this is one token a row, after others, of a cache that keeps no history."""
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] != 1 or not isinstance(cache, KDACache):
            return False
        if cache.offloading:
            return False
        for kda in self.kda_layers:
            layer: Any = cache.layers[kda.layer_idx]
            if not layer.has_previous_state[0] or layer.records or len(layer.conv_states[0]) != len(input_ids):
                return False
        return all(kda.steps_at_once(self.embedding, cache.state_dtype) for kda in self.kda_layers[:1])

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None, cache: KDACache
    ) -> torch.Tensor | None:
        """Logits `[B, 1, vocab_size]`, with the cache a token further; None, with nothing done, for padding."""
        x = F.embedding(input_ids, self.embedding)
        masks, position_ids, position_embeddings = self.decoder.masks_and_positions(
            x, attention_mask, position_ids, cache
        )
        if masks["linear_attention"] is not None:
            return None
        for mixer, norm, mlp_norm, mlp in self.layers:
            y = norm(x)
            if isinstance(mixer, _KDA):
                y = mixer(y, cache.layers[mixer.layer_idx])
            else:
                y, _ = mixer(y, position_embeddings, masks["full_attention"], cache, position_ids=position_ids)
            x = x + y
            x = x + mlp(mlp_norm(x))
        return F.linear(self.norm(x), self.head)
