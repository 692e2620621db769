"""One token a row through the model, for `generate()`: what its modules compute, in fewer calls.

A decode step of a small model, and of any model on a CPU, is small calls, and modules cost several each. So while
`generate()` runs, forwards of one token go through a [`DecodeProgram`], if the model is what this package makes of it:
with hooks, adapters or quantized layers in it, its modules run. On a GPU, decode_graph.py captures the same program as
a CUDA graph.
"""

import contextlib
import contextvars
import itertools
import logging
import math
import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import DynamicLayer
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from .cache import KDACache
from .decode_graph import DecodeBuffers, DecodeGraphs, Program, has_hooks, rope_refusal
from .ops import cpu, cpu_rows, kda_decode_step, recurrent, rows


logger = logging.getLogger("kda_hf")

_active: contextvars.ContextVar["Program | None"] = contextvars.ContextVar("kda_hf_decode_program", default=None)
_building = threading.Lock()
_programs: weakref.WeakKeyDictionary[nn.Module, Program] = weakref.WeakKeyDictionary()
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
        r"LAYER\.self_attn": "KDAAttention",
        r"LAYER\.self_attn\.[qkvo]_proj": "Linear",
        r"LAYER\.self_attn\.[qk]_norm": "KDARMSNorm|Identity",
    }.items()
]
_OF_KDA = re.compile(r"\.(A_log|dt_bias|o_norm\.weight|[qkv]_conv1d\.weight)$")  # what `kda_decode_step` is given
_CALLED = re.compile(r"model\.rotary_emb|model\.layers\.\d+\.mlp\.act_fn")
_WITH_BIAS = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|linear_attn\.g_b_proj)")  # where there may be one
_SEE_ALL = ("sdpa", "eager")  # implementations of attention for which no mask means one token to all keys
_HOMES = ("kda_hf.", "transformers.models.qwen3.", "torch.nn.modules.")


@contextlib.contextmanager
def decode_program(model: Any) -> Iterator[None]:
    """Within, forwards of `model` with one token a row go through a program, where it has one."""
    reason = model.decode_program_class.refusal(model)
    if reason is not None:
        logger.debug("decoding by modules: %s", reason)
    token = _active.set(None if reason else program_of(model))
    try:
        yield
    finally:
        _active.reset(token)


def program_of(model: Any) -> Program:
    """The one from before, with its graphs, as long as the parameters are the same."""
    kind = model.decode_program_class
    with _building:
        program, signature = _programs.get(model), (_environment(), kind.signature_of(model))
        if program is None or type(program) is not kind or program.signature != signature:
            program = _programs[model] = kind(model)
            program.signature = (_environment(), kind.signature_of(model))  # making it moves parameters
        return program


def forget(model: nn.Module) -> None:
    """Drops the program of `model`, with its graphs."""
    with _building:
        _programs.pop(model, None)


def _environment() -> tuple[str | None, ...]:
    """What the environment says of backends."""
    return tuple(os.environ.get(name) for name in ("KDA_HF_BACKEND", "FLA_FLASH_KDA"))


def current_program(model: nn.Module) -> Program | None:
    """The program of `model` while it generates."""
    program = _active.get()
    return program if program is not None and program.model is model else None


def active_program(model: nn.Module, input_ids: torch.Tensor | None, cache: Any) -> Program | None:
    """The program that serves this forward of `model`."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    program = current_program(model)
    return program if program is not None and program.takes(input_ids, cache) else None


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
        known = next((names for pattern, names in _KNOWN if pattern.fullmatch(name)), "").split("|")
        if kind.__name__ not in known or not kind.__module__.startswith(_HOMES) or "forward" in vars(module):
            return f"`{name}` is a {kind.__qualname__} of another kind"
        if has_hooks(module):
            return f"`{name}` has hooks"
        has_bias = getattr(module, "bias", None) is not None and not _WITH_BIAS.fullmatch(name)
        if has_bias or getattr(module, "max_norm", None) is not None:
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
    if len({id(p) for p in parameters}) < len(parameters):  # a parameter can't be in two places
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

    def __call__(self, by: rows.TorchRows, x: torch.Tensor, norm: rows.Norm) -> Any:
        """Their outputs `[B, N]` of `norm(x)`, and all of these side by side, if they are."""
        if self.joined is None:
            x = by.norm(x, norm)
            return [by.product(x, weight) for weight in self.weights], None
        joined = by.product(x, self.joined, norm)
        return joined.split(self.sizes, -1)[: len(self.weights)], joined


class _KDA:
    """`KimiDeltaAttention` of one token, with states before it."""

    def __init__(self, by: rows.TorchRows, norm: rows.Norm, module: Any, users: Counter[int]):
        self.by, self.norm, self.next_norm = by, norm, norm  # the next layer's norm is set by the program
        self.layer_idx, self.steps_at_once = module.layer_idx, module.steps_at_once
        self.heads = module.qkv_heads
        self.head_dim, self.value_head_dim = module.head_dim, module.value_head_dim
        self.projections = _Projections(
            [module.q_proj, module.k_proj, module.v_proj, module.f_a_proj, module.g_a_proj, module.b_proj], users
        )
        self.decay, self.gate, self.output = module.f_b_proj.weight, module.g_b_proj.weight, module.o_proj.weight
        self.gate_bias = module.g_b_proj.bias
        # Second layers of decay and output gate, as two groups of one product, where they are alike.
        self.pair = None
        if self.decay.shape == self.gate.shape and len(self.decay) % rows.GROUP_ROWS == 0:
            self.pair = _joined([self.decay, self.gate], users)
        self.first_of_pair = sum(len(weight) for weight in self.projections.weights[:3])
        self.parameters, self.replay = module.step_parameters(), module.replay
        self.scale, self.has_extension = self.head_dim**-0.5, cpu.is_wanted()
        self.at_once = None  # all of it in one call
        if isinstance(by, cpu_rows.CpuRows) and self.projections.joined is not None and self.gate_bias is None:
            weights = (self.projections.joined, self.decay, self.gate, self.output)
            self.at_once = cpu_rows.KDALayer(norm, *weights, self.scale, self.parameters)

    def __call__(
        self, x: torch.Tensor, conv_state: torch.Tensor, recurrent_state: torch.Tensor, record: Any = None
    ) -> torch.Tensor:
        """x `[B, hidden_size]` with what the layer adds to it, perhaps in its place.

        Args:
            record: `KDACacheLayer.record`, where the cache keeps a history.
        """
        if self.at_once is not None and record is None:
            y = self.at_once(x, conv_state, recurrent_state)
            if y is not None:
                return y
        batch = len(x)
        (*qkv, decay, gate, beta), joined = self.projections(self.by, x, self.norm)
        q, k, v = (y.view(batch, 1, heads, -1) for y, heads in zip(qkv, self.heads, strict=True))
        states = {"conv_state": conv_state, "recurrent_state": recurrent_state}
        low_rank = None  # inputs of both second layers
        if joined is not None and self.pair is not None:
            low_rank = joined.narrow(1, self.first_of_pair, 2 * decay.shape[1])
            if record is None and self.gate_bias is None:
                o = self.by.low_rank_step(
                    q, k, v, beta.unsqueeze(1), low_rank, (self.decay, self.gate), **states, scale=self.scale,
                    parameters=self.parameters,
                )  # fmt: skip
                if o is not None:
                    return self.by.product(o.flatten(1), self.output, residual=x, next_norm=self.next_norm)
        if low_rank is None or self.pair is None:
            g, output_gate = self.by.product(decay, self.decay), self.by.product(gate, self.gate)
        else:
            g, output_gate = self.by.grouped(low_rank, self.pair, 2)
        if self.gate_bias is not None:
            output_gate = output_gate + self.gate_bias
        g = g.view(batch, 1, -1, self.head_dim)
        output_gate = output_gate.view(batch, 1, -1, self.value_head_dim)
        beta = beta.unsqueeze(1)
        if record is not None:
            side_by_side = torch.cat(list(qkv), dim=-1) if joined is None else joined.narrow(1, 0, self.first_of_pair)
            record(self.replay, side_by_side.unsqueeze(1), g, beta)
        by_torch = x.device.type == "cpu" and not self.has_extension
        if by_torch and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            # What the operator comes to, but for its checks, which would take a third of the time. A compiler that
            # traces a step takes the operator as it is.
            o = recurrent.decode_step(
                q, k, v, g, beta, output_gate, scale=self.scale, state_v_first=False, **states, **self.parameters
            )
        else:
            o = kda_decode_step(q, k, v, g, beta, output_gate, **states, **self.parameters)
        return self.by.product(o.flatten(1), self.output, residual=x, next_norm=self.next_norm)


class _Attention:
    """`KDAAttention` of one token: with a cache that grows, by the module or the CPU extension, and by `step` with keys
    at fixed places."""

    def __init__(self, by: rows.TorchRows, norm: rows.Norm, module: Any, users: Counter[int]):
        self.by, self.norm, self.next_norm, self.module = by, norm, norm, module
        self.layer_idx, self.head_dim, self.scale = module.layer_idx, module.head_dim, module.scaling
        projections = [module.q_proj, module.k_proj, module.v_proj]
        self.heads = [len(layer.weight) // self.head_dim for layer in projections]
        self.is_plain = all(layer.bias is None for layer in [*projections, module.o_proj])
        self.projections = _Projections(projections, users)
        self.output = module.o_proj.weight
        self.norms = None
        if hasattr(module.q_norm, "eps"):
            self.norms = (module.q_norm.weight, module.k_norm.weight, module.q_norm.eps)
        self.on_cpu = None  # in two calls
        if isinstance(by, cpu_rows.CpuRows) and self.is_plain and self.projections.joined is not None:
            self.on_cpu = cpu_rows.Attention(
                norm, self.projections.joined, self.output, self.heads[0], self.heads[1], self.head_dim, self.norms,
                self.scale,
            )  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        cache: KDACache,
    ) -> torch.Tensor:
        """x `[B, hidden_size]` with what the layer adds to it."""
        qkv = None if self.on_cpu is None else self.on_cpu.inputs(x)
        if self.on_cpu is None or qkv is None:
            y, _ = self.module(self.by.norm(x, self.norm).unsqueeze(1), position_embeddings, mask, cache)
            return x + y.squeeze(1)
        q, k, v = qkv
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        keys, values = cache.update(k, v, self.layer_idx)
        grows = type(cache.layers[self.layer_idx]) is DynamicLayer
        if mask is None and grows and self.module.config._attn_implementation in _SEE_ALL:
            y = self.on_cpu.output(x, q, keys, values)
            if y is not None:
                return y
        o, _ = self.module.attend(q, keys, values, mask)
        return self.by.product(o.flatten(1), self.output, residual=x)

    def step(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None, buffers: DecodeBuffers
    ) -> torch.Tensor:
        """x `[B, hidden_size]` with what the layer adds to it, with its keys and values one token further."""
        outputs, _ = self.projections(self.by, x, self.norm)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in outputs)  # [B, heads, head_dim]
        keys, values = buffers.keys[self.layer_idx]
        o = self.by.attention_step(
            q, k, v, keys, values, buffers.length, buffers.starts, self.norms, position_embeddings, self.scale,
            buffers.workspace,
        )  # fmt: skip
        return self.by.product(o.flatten(1), self.output, residual=x, next_norm=self.next_norm)


class _MLP:
    """`Qwen3MLP`."""

    def __init__(self, by: rows.TorchRows, norm: rows.Norm, module: Any, users: Counter[int]):
        self.by, self.norm, self.next_norm = by, norm, norm  # the next layer's norm is set by the program
        self.projections = _Projections([module.gate_proj, module.up_proj], users)
        self.act, self.down = module.act_fn, module.down_proj.weight
        self.both = None
        if self.projections.joined is not None and type(self.act) in (nn.SiLU, SiLUActivation):
            self.both = self.projections.joined[: 2 * self.down.shape[1]]
        self.at_once = None  # all of it in one call
        if isinstance(by, cpu_rows.CpuRows) and self.both is not None:
            self.at_once = cpu_rows.MLP(norm, self.both, self.down)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, hidden_size]` with what the layer adds to it, perhaps in its place."""
        if self.at_once is not None:
            y = self.at_once(x)
            if y is not None:
                return y
        if self.both is not None:
            y = self.by.swiglu(x, self.both, self.norm)
        else:
            (gate, up), _ = self.projections(self.by, x, self.norm)
            y = self.act(gate) * up
        return self.by.product(y, self.down, residual=x, next_norm=self.next_norm)


def _has_no_padding(mask: Any, cache: KDACache) -> bool:
    """Whether `mask` is one of tokens alone, with the next one. Waits for the mask's device."""
    if mask is None:
        return True
    is_of_tokens = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] == cache.get_seq_length() + 1
    return is_of_tokens and bool(mask.all())


class DecodeProgram(Program):
    """The forward of a `KDAForCausalLM` for one token a row, as long as its modules and parameters stay what they are.

    Their values may change: weights that share an input become views of one tensor, and are read there. It keeps no
    reference to the model, and graphs of its steps in `graphs`.
    """

    refusal = staticmethod(refusal)

    def __init__(self, model: Any):
        decoder = model.model
        self._model, self.decoder = weakref.ref(model), decoder
        self.embedding, self.head = decoder.embed_tokens.weight, model.lm_head.weight
        layers = decoder.layers[: model.config.num_hidden_layers]
        parameters = [p for name, p in model.named_parameters() if not _OF_KDA.search(name)]
        attention = model.config if "full_attention" in model.config.layer_types else None
        by = self.by = rows.TorchRows()
        if rows.refusal(parameters, attention) is None:
            by = self.by = rows.KernelRows()
        elif cpu_rows.refusal(parameters) is None:
            by = self.by = cpu_rows.CpuRows()
        self.norm = (decoder.norm.weight, decoder.norm.eps)
        users = Counter(parameter.untyped_storage().data_ptr() for parameter in model.parameters())
        self.layers: list[tuple[_KDA | _Attention, _MLP]] = []
        for layer in layers:
            norms = [(n.weight, n.eps) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
            is_kda = layer.layer_type == "linear_attention"
            mixer: Any = (_KDA if is_kda else _Attention)(
                by, norms[0], layer.linear_attn if is_kda else layer.self_attn, users
            )
            self.layers.append((mixer, _MLP(by, norms[1], layer.mlp, users)))
        blocks: list[Any] = list(itertools.chain.from_iterable(self.layers))
        for block, norm in zip(blocks, [*(following.norm for following in blocks[1:]), self.norm], strict=True):
            block.next_norm = norm
        self.kda_layers = [mixer for mixer, _ in self.layers if isinstance(mixer, _KDA)]
        self.attention_layers = [mixer for mixer, _ in self.layers if isinstance(mixer, _Attention)]
        self.graphs = DecodeGraphs(self)

    @staticmethod
    def signature_of(model: nn.Module) -> Any:
        """Parameters where they are."""
        return [(id(p), p.data_ptr()) for p in model.parameters()]

    @property
    def model(self) -> Any:
        return self._model()

    def graph_refusal(self) -> str | None:
        if not all(attention.is_plain for attention in self.attention_layers):
            return "attention layers have biases"
        return rope_refusal(self.decoder.rotary_emb)

    def workspace(self, attention: "_Attention", batch: int, capacity: int) -> torch.Tensor | None:
        heads, key_heads = attention.heads[:2]
        return self.by.attention_workspace(self.embedding, batch, heads, key_heads, capacity, attention.head_dim)

    def takes(self, input_ids: torch.Tensor | None, cache: Any) -> bool:
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] != 1 or not isinstance(cache, KDACache):
            return False
        if cache.offloading:
            return False
        for kda in self.kda_layers:
            layer: Any = cache.layers[kda.layer_idx]
            if not layer.has_previous_state[0] or len(layer.conv_states[0]) != len(input_ids):
                return False
        return all(kda.steps_at_once(self.embedding, cache.state_dtype) for kda in self.kda_layers[:1])

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None, cache: KDACache
    ) -> torch.Tensor | None:
        x = F.embedding(input_ids, self.embedding)
        masks, position_embeddings = self._masks_and_positions(x, attention_mask, position_ids, cache)
        if masks["linear_attention"] is not None:
            return None
        x = x.squeeze(1)
        for mixer, mlp in self.layers:
            if isinstance(mixer, _KDA):
                layer: Any = cache.layers[mixer.layer_idx]
                x = mixer(x, layer.conv_states[0], layer.recurrent_states[0], layer.record if layer.records else None)
                layer.note_update_in_place()
                layer.advance(1)
            else:
                x = mixer(x, position_embeddings, masks["full_attention"], cache)
            x = mlp(x)
        return self.by.product(x, self.head, self.norm).unsqueeze(1)

    def _masks_and_positions(
        self, x: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None, cache: KDACache
    ) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor] | None]:
        """What `KDAModel.masks_and_positions` makes of them. On a CPU, without looking further where each token sees
        all before it: that takes as long as a layer."""
        rope = self.decoder.rotary_emb
        if (
            x.device.type == "cpu"
            and (rope is None or position_ids is not None)
            and self.decoder.config._attn_implementation in _SEE_ALL
            and all(type(cache.layers[mixer.layer_idx]) is DynamicLayer for mixer in self.attention_layers)
            and _has_no_padding(attention_mask, cache)
        ):
            masks: dict[str, Any] = {"linear_attention": None, "full_attention": None}
            return masks, None if rope is None else rope(x, position_ids)
        masks, _, position_embeddings = self.decoder.masks_and_positions(x, attention_mask, position_ids, cache)
        return masks, position_embeddings

    def step(self, buffers: DecodeBuffers, recorded: dict[int, Any] | None = None) -> torch.Tensor:
        x = F.embedding(buffers.tokens, self.embedding)
        position_embeddings = None
        if self.decoder.rotary_emb is not None:
            position_embeddings = self.decoder.rotary_emb(x.unsqueeze(1), buffers.positions)
        for mixer, mlp in self.layers:
            if isinstance(mixer, _KDA):
                idx = mixer.layer_idx
                keep = None if recorded is None else lambda _, *block, idx=idx: recorded.update({idx: block})
                conv_state, recurrent_state = buffers.states[idx]
                x = mixer(x, conv_state, recurrent_state, keep)
            else:
                x = mixer.step(x, position_embeddings, buffers)
            x = mlp(x)
        logits = self.by.product(x, self.head, self.norm)
        buffers.advance()
        return logits
