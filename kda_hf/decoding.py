"""One token a row through the model, for `generate()`: what its modules compute, in fewer calls.

A decode step of a small model, and of any model on a CPU, is small calls, and modules cost several each. So while
`generate()` runs, forwards of one token go through a [`DecodeProgram`], if the model is what this package makes of it:
with hooks, adapters or quantized layers in it, its modules run. On a GPU, the same program is captured as a CUDA graph
([`DecodeGraph`]).
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
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import DynamicLayer

from .cache import KDACache
from .ops import kda_decode_step, recurrent, rows


logger = logging.getLogger("kda_hf")

_active: contextvars.ContextVar["DecodeProgram | None"] = contextvars.ContextVar("kda_hf_decode_program", default=None)
_building = threading.Lock()
_programs: weakref.WeakKeyDictionary[nn.Module, "DecodeProgram"] = weakref.WeakKeyDictionary()
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
_OF_KDA = re.compile(r"\.(A_log|dt_bias|o_norm\.weight|[qkv]_conv1d\.weight)$")  # what `kda_decode_step` is given
_CALLED = re.compile(r"model\.rotary_emb|model\.layers\.\d+\.(self_attn|mlp\.act_fn)")
_HOMES = ("kda_hf.", "transformers.models.qwen3.", "torch.nn.modules.")


@contextlib.contextmanager
def decode_program(model: nn.Module) -> Iterator[None]:
    """Within, forwards of `model` with one token a row go through a program, where it has one."""
    reason = refusal(model)
    if reason is not None:
        logger.debug("decoding by modules: %s", reason)
    token = _active.set(None if reason else program_of(model))
    try:
        yield
    finally:
        _active.reset(token)


def program_of(model: nn.Module) -> "DecodeProgram":
    """The one from before, with its graphs, as long as the parameters are the same."""
    with _building:
        program = _programs.get(model)
        if program is None or program.signature != _signature(model):
            program = _programs[model] = DecodeProgram(model)
        return program


def _signature(model: nn.Module) -> Any:
    """What a program was made for: parameters where they are, and what the environment says of backends."""
    return _environment(), [(id(p), p.data_ptr()) for p in model.parameters()]


def _environment() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in ("KDA_HF_BACKEND", "FLA_FLASH_KDA"))


def current_program(model: nn.Module) -> "DecodeProgram | None":
    """The program of `model` while it generates."""
    program = _active.get()
    return program if program is not None and program.model is model else None


def active_program(model: nn.Module, input_ids: torch.Tensor | None, cache: Any) -> "DecodeProgram | None":
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
        self.by, self.norm = by, norm
        self.layer_idx, self.steps_at_once = module.layer_idx, module.steps_at_once
        self.heads = module.qkv_heads
        self.head_dim, self.value_head_dim = module.head_dim, module.value_head_dim
        self.projections = _Projections(
            [module.q_proj, module.k_proj, module.v_proj, module.f_a_proj, module.g_a_proj, module.b_proj], users
        )
        self.decay, self.gate, self.output = module.f_b_proj.weight, module.g_b_proj.weight, module.o_proj.weight
        # Second layers of decay and output gate, as two groups of one product, where they are alike.
        self.pair = None
        if self.decay.shape == self.gate.shape and len(self.decay) % rows.GROUP_ROWS == 0:
            self.pair = _joined([self.decay, self.gate], users)
        self.first_of_pair = sum(len(weight) for weight in self.projections.weights[:3])
        self.parameters, self.replay = module.step_parameters(), module.replay
        self.scale = self.head_dim**-0.5

    def __call__(
        self, x: torch.Tensor, conv_state: torch.Tensor, recurrent_state: torch.Tensor, record: Any = None
    ) -> torch.Tensor:
        """x `[B, hidden_size]` with what the layer adds to it, perhaps in its place.

        Args:
            record: `KDACacheLayer.record`, where the cache keeps a history.
        """
        batch = len(x)
        (*qkv, decay, gate, beta), joined = self.projections(self.by, x, self.norm)
        q, k, v = (y.view(batch, 1, heads, -1) for y, heads in zip(qkv, self.heads, strict=True))
        if joined is None or self.pair is None:
            g, output_gate = self.by.product(decay, self.decay), self.by.product(gate, self.gate)
        else:
            both = joined.narrow(1, self.first_of_pair, 2 * decay.shape[1])
            g, output_gate = self.by.grouped(both, self.pair, 2)
        g = g.view(batch, 1, -1, self.head_dim)
        output_gate = output_gate.view(batch, 1, -1, self.value_head_dim)
        beta = beta.unsqueeze(1)
        if record is not None:
            side_by_side = torch.cat(list(qkv), dim=-1) if joined is None else joined.narrow(1, 0, self.first_of_pair)
            record(self.replay, side_by_side.unsqueeze(1), g, beta)
        states = {"conv_state": conv_state, "recurrent_state": recurrent_state}
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            # What the operator comes to, but for its checks, which would take a third of the time.
            o = recurrent.decode_step(
                q, k, v, g, beta, output_gate, scale=self.scale, state_v_first=False, **states, **self.parameters
            )
        else:
            o = kda_decode_step(q, k, v, g, beta, output_gate, **states, **self.parameters)
        return self.by.product(o.flatten(1), self.output, residual=x)


class _Attention:
    """`KDAAttention` of one token: by the module with a cache that grows, and by `step` with keys at fixed places."""

    def __init__(self, by: rows.TorchRows, norm: rows.Norm, module: Any, users: Counter[int]):
        self.by, self.norm, self.module = by, norm, module
        self.layer_idx, self.head_dim, self.scale = module.layer_idx, module.head_dim, module.scaling
        projections = [module.q_proj, module.k_proj, module.v_proj]
        self.heads = [len(layer.weight) // self.head_dim for layer in projections]
        self.is_plain = all(layer.bias is None for layer in [*projections, module.o_proj])
        self.projections = _Projections(projections, users)
        self.output = module.o_proj.weight
        self.norms = None
        if hasattr(module.q_norm, "eps"):
            self.norms = (module.q_norm.weight, module.k_norm.weight, module.q_norm.eps)

    def __call__(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        y, _ = self.module(self.by.norm(x, self.norm).unsqueeze(1), *args)
        return x + y.squeeze(1)

    def step(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None, buffers: "DecodeBuffers"
    ) -> torch.Tensor:
        """x `[B, hidden_size]` with what the layer adds to it, with its keys and values one token further."""
        outputs, _ = self.projections(self.by, x, self.norm)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in outputs)  # [B, heads, head_dim]
        keys, values = buffers.keys[self.layer_idx]
        o = self.by.attention_step(
            q, k, v, keys, values, buffers.length, buffers.starts, self.norms, position_embeddings, self.scale,
            buffers.workspace,
        )  # fmt: skip
        return self.by.product(o.flatten(1), self.output, residual=x)


class _MLP:
    """`Qwen3MLP`."""

    def __init__(self, by: rows.TorchRows, norm: rows.Norm, module: Any, users: Counter[int]):
        self.by, self.norm = by, norm
        self.projections = _Projections([module.gate_proj, module.up_proj], users)
        self.act, self.down = module.act_fn, module.down_proj.weight
        self.both = None
        if self.projections.joined is not None and type(self.act) in (nn.SiLU, SiLUActivation):
            self.both = self.projections.joined[: 2 * self.down.shape[1]]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, hidden_size]` with what the layer adds to it, perhaps in its place."""
        if self.both is not None:
            y = self.by.swiglu(x, self.both, self.norm)
        else:
            (gate, up), _ = self.projections(self.by, x, self.norm)
            y = self.act(gate) * up
        return self.by.product(y, self.down, residual=x)


class DecodeProgram:
    """The forward of a `KDAForCausalLM` for one token a row, as long as its modules and parameters stay what they are.

    Their values may change: weights that share an input become views of one tensor, and are read there. It keeps no
    reference to the model, and graphs of its steps and of choices of tokens in `graphs` and `choices`.
    """

    def __init__(self, model: Any):
        decoder = model.model
        self._model, self.decoder = weakref.ref(model), decoder
        self.embedding, self.head = decoder.embed_tokens.weight, model.lm_head.weight
        layers = decoder.layers[: model.config.num_hidden_layers]
        refused = rows.refusal(
            [p for name, p in model.named_parameters() if not _OF_KDA.search(name)],
            model.config if "full_attention" in model.config.layer_types else None,
        )
        by = self.by = rows.TorchRows() if refused else rows.KernelRows()
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
        self.kda_layers = [mixer for mixer, _ in self.layers if isinstance(mixer, _KDA)]
        self.attention_layers = [mixer for mixer, _ in self.layers if isinstance(mixer, _Attention)]
        self.signature = _signature(model)
        self.graphs, self.choices = DecodeGraphs(self), Idle(most=8)

    @property
    def model(self) -> Any:
        """The model, while there is one."""
        return self._model()

    def takes(self, input_ids: torch.Tensor | None, cache: Any) -> bool:
        """Whether this is one token a row, after others."""
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
        """Logits `[B, 1, vocab_size]`, with the cache a token further; None, with nothing done, for padding."""
        x = F.embedding(input_ids, self.embedding)
        masks, position_ids, position_embeddings = self.decoder.masks_and_positions(
            x, attention_mask, position_ids, cache
        )
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

    def step(self, buffers: "DecodeBuffers", recorded: dict[int, Any] | None = None) -> torch.Tensor:
        """Logits `[B, vocab_size]`, with all that is in `buffers` a token further: what a graph can capture.

        Args:
            recorded: gets what each KDA layer's history has of the token: inputs of the convolution, gate, and β.
        """
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
        buffers.length += 1
        buffers.positions += 1
        return self.by.product(x, self.head, self.norm)


class DecodeBuffers:
    """All that a step reads and writes, at fixed places: tokens, positions, states, keys and values.

    Args:
        cache: whose tensors these are made after.
        capacity: number of tokens that there is room for keys of.
    """

    def __init__(self, program: DecodeProgram, cache: KDACache, capacity: int):
        batch, self.capacity = cache.batch_size, capacity
        like = program.embedding
        with torch.inference_mode(False):
            self.tokens = like.new_zeros(batch, dtype=torch.long)
            self.length = like.new_zeros(1, dtype=torch.long)  # of what came before: where the next key goes
            self.starts = like.new_zeros(batch, dtype=torch.long)  # of each row, behind its padding
            self.positions = like.new_zeros(batch, 1, dtype=torch.long)
            self.states = {
                kda.layer_idx: tuple(torch.zeros_like(state) for state in _states(cache, kda))
                for kda in program.kda_layers
            }
            self.keys: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            self.workspace = None
            for attention in program.attention_layers:
                layer: Any = cache.layers[attention.layer_idx]
                shape = (batch, layer.keys.shape[1], capacity, layer.keys.shape[3])
                self.keys[attention.layer_idx] = (layer.keys.new_zeros(shape), layer.values.new_zeros(shape))
                self.workspace = program.by.attention_workspace(like, batch, *attention.heads[:2], *shape[2:])

    @property
    def nbytes(self) -> int:
        """Of states, keys and values."""
        tensors = itertools.chain(*self.states.values(), *self.keys.values())
        return sum(tensor.nbytes for tensor in tensors)

    def load(self, cache: KDACache, starts: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        """
        Args:
            starts: `[B]`, of each row's tokens, behind its padding; none by default.
            positions: `[B or 1, 1]`, of the next token, if it is not the number of those seen.
        """
        length = int(cache.get_seq_length())
        self.length.fill_(length)
        self.starts.zero_() if starts is None else self.starts.copy_(starts)
        self.positions.fill_(length) if positions is None else self.positions.copy_(positions)
        for idx, states in self.states.items():
            for own, state in zip(states, _states(cache, idx), strict=True):
                own.copy_(state)
        for idx, (keys, values) in self.keys.items():
            layer: Any = cache.layers[idx]
            keys[:, :, :length].copy_(layer.keys)
            values[:, :, :length].copy_(layer.values)

    def load_from(self, other: "DecodeBuffers", length: int) -> None:
        """Goes on where `other` is, after `length` tokens."""
        for name in ("tokens", "length", "starts", "positions"):
            getattr(self, name).copy_(getattr(other, name))
        for idx, states in self.states.items():
            for own, state in zip(states, other.states[idx], strict=True):
                own.copy_(state)
        for idx, pair in self.keys.items():
            for own, state in zip(pair, other.keys[idx], strict=True):
                own[:, :, :length].copy_(state[:, :, :length])

    def store(self, cache: KDACache, first: int, length: int, log: "_Log | None") -> None:
        """Leaves in `cache`, which has `first` tokens, what has come of them after `length`."""
        if log is not None:
            log.store(cache, self)
        for idx, states in self.states.items():
            layer: Any = cache.layers[idx]
            if log is None:
                _overwrite_states(layer, states)
                layer.forget()
            layer.advance(length - first)
        for idx, (keys, values) in self.keys.items():
            cache.layers[idx].update(keys[:, :, first:length], values[:, :, first:length])


def _states(cache: KDACache, layer: "_KDA | int") -> tuple[torch.Tensor, torch.Tensor]:
    found: Any = cache.layers[layer if isinstance(layer, int) else layer.layer_idx]
    return found.conv_states[0], found.recurrent_states[0]


def capture(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[Any, torch.Tensor]:
    """A CUDA graph of `call`, and where its result lies. Random numbers are drawn by the graph alone."""
    graph = torch.cuda.CUDAGraph()
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    generator = torch.cuda.get_rng_state(device)
    with torch.no_grad(), torch.cuda.stream(stream):
        call()  # libraries choose their kernels, and allocate what they keep
        torch.cuda.set_rng_state(generator, device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = call()
    current.wait_stream(stream)
    return graph, result


class Idle:
    """Graphs that nobody uses at the moment. A few are kept, as long as they are small beside the GPU's memory.

    Args:
        most: how many.
    """

    PART_OF_MEMORY = 1 / 16

    def __init__(self, most: int):
        self.most = most
        self._kept: list[tuple[Any, Any]] = []  # the one used last at the end
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Keeps none."""
        with self._lock:
            self._kept.clear()

    def take(self, key: Any) -> Any:
        """One of this key, for nobody else; None if there is none."""
        with self._lock:
            for i, (own_key, graph) in enumerate(self._kept):
                if own_key == key:
                    del self._kept[i]
                    return graph
        return None

    def give_back(self, key: Any, graph: Any, device: torch.device) -> None:
        """Keeps `graph`, which has `nbytes`, or another one."""
        memory = _memory_of(device) * self.PART_OF_MEMORY
        with self._lock:
            self._kept.append((key, graph))
            while len(self._kept) > self.most or sum(kept.nbytes for _, kept in self._kept) > memory:
                del self._kept[0]


class DecodeGraph:
    """A program's step with buffers of its own, as a CUDA graph."""

    def __init__(self, program: DecodeProgram, cache: KDACache, capacity: int, records: bool):
        self.buffers = DecodeBuffers(program, cache, capacity)
        self.records = records
        self.recorded: dict[int, Any] | None = {} if records else None
        self.graph, self.logits = capture(lambda: program.step(self.buffers, self.recorded), program.embedding.device)

    @property
    def nbytes(self) -> int:
        return self.buffers.nbytes


class DecodeGraphs:
    """The graphs of a program."""

    def __init__(self, program: DecodeProgram):
        self._program = weakref.ref(program)
        self.idle = Idle(most=8)

    def refusal(self, cache: KDACache) -> str | None:
        """Why there is no graph for decoding with `cache`, or None."""
        program: Any = self._program()
        if not has_graphs(program.embedding.device):
            return "the model is not on a GPU"
        if not all(attention.is_plain for attention in program.attention_layers):
            return "attention layers have biases"
        if any(type(cache.layers[mixer.layer_idx]) is not DynamicLayer for mixer in program.attention_layers):
            return "the cache's attention layers are of another kind"
        rope = program.decoder.rotary_emb
        if rope is not None and rope.rope_type not in ("default", "linear", "llama3", "yarn"):
            return f"RoPE of type {rope.rope_type} changes with the length"
        return None

    def take(self, cache: KDACache, capacity: int, records: bool) -> DecodeGraph:
        """A graph for nobody else, whose buffers are to be loaded.

        Args:
            records: whether it leaves what a history needs.
        """
        program: Any = self._program()
        graph = self.idle.take(self._key(program, cache, capacity, records))
        return graph or DecodeGraph(program, cache, capacity, records)

    def give_back(self, cache: KDACache, graph: DecodeGraph) -> None:
        """Keeps it for the next call."""
        program: Any = self._program()
        key = self._key(program, cache, graph.buffers.capacity, graph.records)
        self.idle.give_back(key, graph, program.embedding.device)

    @staticmethod
    def _key(program: DecodeProgram, cache: KDACache, capacity: int, records: bool) -> Any:
        # What a step depends on besides the program.
        shapes = [(state.shape, state.dtype) for state in _states(cache, program.kda_layers[0])]
        return cache.batch_size, capacity, records, shapes


def has_graphs(device: torch.device) -> bool:
    """Whether there are CUDA graphs."""
    return device.type == "cuda"


def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


class _Log:
    """The last tokens of a graph's KDA layers, and the states before them, for the history of the cache's layers.

    Every `rollback` tokens the states are copied; of the tokens since the last copy but one, there is what
    `KDACacheLayer.record` takes.
    """

    def __init__(self, program: DecodeProgram, rollback: int):
        self.layers, self.rollback = program.kda_layers, rollback
        self.count = 0
        self.marks: list[dict[int, Any]] = []  # states at the last two multiples of `rollback`
        self.tokens: list[torch.Tensor] = []  # three for each layer, [B, 2 * rollback, ...]
        self.places: dict[int, list[torch.Tensor]] = {}  # of a token in these

    def before_step(self, buffers: DecodeBuffers) -> None:
        if self.count % self.rollback == 0:
            states = {idx: tuple(x.clone() for x in pair) for idx, pair in buffers.states.items()}
            self.marks = [*self.marks[-1:], states]

    def after_step(self, recorded: Any) -> None:
        new = [x for layer in self.layers for x in recorded[layer.layer_idx]]
        if not self.tokens:
            with torch.inference_mode(False):
                self.tokens = [x.new_zeros(x.shape[0], 2 * self.rollback, *x.shape[2:]) for x in new]
        slot = self.count % (2 * self.rollback)
        if slot not in self.places:
            self.places[slot] = [x[:, slot : slot + 1] for x in self.tokens]
        torch._foreach_copy_(self.places[slot], new)
        self.count += 1

    def store(self, cache: KDACache, buffers: DecodeBuffers) -> None:
        """Leaves the tokens in the history of the cache's layers, and the states as they are now in the layers."""
        last = (self.count - 1) // self.rollback * self.rollback  # where the last mark is
        for i, kda in enumerate(self.layers):
            layer: Any = cache.layers[kda.layer_idx]
            blocks = [(last, self.count, buffers.states)]  # first token, end, and the states then
            if last > 0:  # what the history has is too long ago
                layer.forget()
                _overwrite_states(layer, self.marks[0][kda.layer_idx])
                blocks.insert(0, (last - self.rollback, last, self.marks[1]))
            for first, end, states in blocks:
                at = first % (2 * self.rollback)
                layer.record(kda.replay, *(x[:, at : at + end - first] for x in self.tokens[3 * i : 3 * i + 3]))
                _overwrite_states(layer, states[kda.layer_idx])
                layer.note_update_in_place()


def _overwrite_states(layer: Any, states: tuple[torch.Tensor, torch.Tensor]) -> None:
    for own, state in zip((layer.conv_states[0], layer.recurrent_states[0]), states, strict=True):
        own.copy_(state)


class GraphStepper:
    """Steps of a program by its graphs, each with room for more keys than the one before.

    Args:
        cache: after a prefill.
        keeps_cache: whether somebody will look at the cache. Else its keys and values are dropped.
        starts: `[B]`, of each row's tokens, behind its padding; none by default.
        positions: `[B or 1, 1]`, of the next token, if it is not the number of those seen.
        max_steps: how many there will be at most, if that is known.
    """

    def __init__(
        self,
        program: DecodeProgram,
        cache: KDACache,
        keeps_cache: bool,
        starts: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        max_steps: int | None = None,
    ):
        self.graphs, self.cache, self.keeps_cache = program.graphs, cache, keeps_cache
        self.has_keys = bool(program.attention_layers)
        self.first = self.length = int(cache.get_seq_length())
        self.most = None if max_steps is None else self.length + max_steps
        layer: Any = cache.layers[program.kda_layers[0].layer_idx]
        self.log = _Log(program, layer.max_rollback) if layer.records else None
        self.graph = self.graphs.take(cache, self._capacity(), layer.records)
        self.graph.buffers.load(cache, starts, positions)
        if not keeps_cache:
            for attention in program.attention_layers:  # only their shapes are needed
                layer = cache.layers[attention.layer_idx]
                layer.keys, layer.values = layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone()

    def _capacity(self) -> int:
        """Room for half as many tokens more, or a thousand, but not for more than there will be; a round number."""
        if not self.has_keys:
            return 0
        wanted = self.length + max(self.length // 2, 1024)
        wanted = max(wanted if self.most is None else min(wanted, self.most), self.length + 1)
        unit = max(2 ** (wanted.bit_length() - 3), 256)
        return -(-wanted // unit) * unit

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds `tokens` `[B]`; returns logits `[B, vocab_size]`, which the next step overwrites."""
        if self.has_keys and self.length == self.graph.buffers.capacity:
            larger = self.graphs.take(self.cache, self._capacity(), self.graph.records)
            larger.buffers.load_from(self.graph.buffers, self.length)
            self.graphs.give_back(self.cache, self.graph)
            self.graph = larger
        self.graph.buffers.tokens.copy_(tokens)
        if self.log is not None:
            self.log.before_step(self.graph.buffers)
        self.graph.graph.replay()
        if self.log is not None:
            self.log.after_step(self.graph.recorded)
        self.length += 1
        return self.graph.logits

    def finish(self) -> None:
        """Leaves states and counts in the cache."""
        if self.keeps_cache and self.length > self.first:
            self.graph.buffers.store(self.cache, self.first, self.length, self.log)
        self.graphs.give_back(self.cache, self.graph)


def graph_stepper(
    program: DecodeProgram,
    cache: KDACache,
    keeps_cache: bool,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    max_steps: int | None,
) -> GraphStepper | None:
    """The stepper for what follows a prefill with these arguments, or None where a graph can't serve."""
    reason = program.graphs.refusal(cache)
    starts = None
    if reason is None and attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[1] != cache.get_seq_length():
            reason = "the mask is not one of tokens"
        else:
            is_token = attention_mask != 0
            starts = is_token.shape[1] - is_token.sum(1)
            if (is_token[:, :-1] & ~is_token[:, 1:]).any():
                reason = "there is padding behind tokens"
    if reason is not None:
        logger.debug("decoding without a CUDA graph: %s", reason)
        return None
    positions = None if position_ids is None else position_ids[..., -1:].reshape(-1, 1) + 1
    try:
        return GraphStepper(program, cache, keeps_cache, starts, positions, max_steps)
    except torch.OutOfMemoryError as error:  # of what it takes beside the cache, which has not changed
        logger.debug("decoding without a CUDA graph: %s", error)
        program.graphs.idle.clear()
        torch.cuda.empty_cache()
        return None
