"""Steps of a [`DecodeProgram`] as CUDA graphs: what they read and write is at fixed places, and a replay is one call.

A graph is captured for a batch size and for room for a number of keys, and serves later calls too. Where there is no
graph, the program runs call by call.
"""

import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .cache import KDACache


logger = logging.getLogger("kda_hf")


class Program:
    """One token a row through a model, after others: what `generate()` calls, and what a graph can be captured of.

    A program serves a model as long as `signature`, which its maker keeps, stays the same.
    """

    signature: Any = None
    embedding: torch.Tensor  # [vocab_size, hidden_size]
    kda_layers: list[Any]  # with `layer_idx` and `replay`
    attention_layers: list[Any]  # with `layer_idx`
    graphs: "DecodeGraphs"
    may_not_capture = False  # whether `step` may do what no graph can

    @staticmethod
    def refusal(model: Any) -> str | None:
        """Why there is no program for `model`, or None."""
        raise NotImplementedError

    @staticmethod
    def signature_of(model: Any) -> Any:
        """What a program is made for."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        """The model, while there is one."""
        raise NotImplementedError

    def takes(self, input_ids: torch.Tensor | None, cache: Any) -> bool:
        """Whether this is one token a row, after others."""
        raise NotImplementedError

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None, cache: KDACache
    ) -> torch.Tensor | None:
        """Logits `[B, 1, vocab_size]`, with the cache a token further; None, with nothing done, where modules shall."""
        raise NotImplementedError

    def step(self, buffers: "DecodeBuffers", recorded: dict[int, Any] | None = None) -> torch.Tensor:
        """Logits `[B, vocab_size]`, with all that is in `buffers` a token further: what a graph can capture.

        Args:
            recorded: gets what each KDA layer's history has of the token: inputs of the convolution, gate, and β.
        """
        raise NotImplementedError

    def graph_refusal(self) -> str | None:
        """Why no graph can capture a step, or None."""
        raise NotImplementedError

    def workspace(self, attention: Any, batch: int, capacity: int) -> torch.Tensor | None:
        """What `step` of an attention layer needs beside keys and values of `capacity` tokens."""
        return None


class DecodeBuffers:
    """All that a step reads and writes, at fixed places: tokens, positions, states, keys and values.

    Args:
        cache: whose tensors these are made after.
        capacity: number of tokens that there is room for keys of.
    """

    def __init__(self, program: Program, cache: KDACache, capacity: int):
        batch, self.capacity = cache.batch_size, capacity
        like = program.embedding
        with torch.inference_mode(False):
            self.tokens = like.new_zeros(batch, dtype=torch.long)
            self._counts = like.new_zeros(1 + batch, dtype=torch.long)
            self.length = self._counts[:1]  # of what came before: where the next key goes
            self.starts = like.new_zeros(batch, dtype=torch.long)  # of each row, behind its padding
            self.positions = self._counts[1:].unsqueeze(1)
            self.states = {
                kda.layer_idx: tuple(torch.zeros_like(state) for state in _states(cache, kda.layer_idx))
                for kda in program.kda_layers
            }
            self.keys: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            self.workspace = None
            for attention in program.attention_layers:
                layer: Any = cache.layers[attention.layer_idx]
                keys, values = (
                    x.new_zeros(batch, x.shape[1], capacity, x.shape[3]) for x in (layer.keys, layer.values)
                )
                self.keys[attention.layer_idx] = (keys, values)
                self.workspace = program.workspace(attention, batch, capacity)

    @property
    def nbytes(self) -> int:
        """Of states, keys and values."""
        tensors = itertools.chain(*self.states.values(), *self.keys.values())
        return sum(tensor.nbytes for tensor in tensors)

    def advance(self) -> None:
        """A token further. What a step ends with: behind this small kernel, weights do not come early."""
        self._counts += 1

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


def _states(cache: KDACache, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer: Any = cache.layers[layer_idx]
    return layer.conv_states[0], layer.recurrent_states[0]


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

    def __init__(self, program: Program, cache: KDACache, capacity: int, records: bool):
        self.buffers = DecodeBuffers(program, cache, capacity)
        self.records = records
        self.recorded: dict[int, Any] | None = {} if records else None
        self.graph, self.logits = capture(lambda: program.step(self.buffers, self.recorded), program.embedding.device)

    @property
    def nbytes(self) -> int:
        return self.buffers.nbytes


class DecodeGraphs:
    """The graphs of a program."""

    def __init__(self, program: Program):
        self._program = weakref.ref(program)
        self.idle = Idle(most=8)
        self.failure: str | None = None  # why a step could not be captured

    def refusal(self, cache: KDACache) -> str | None:
        """Why there is no graph for decoding with `cache`, or None."""
        program: Any = self._program()
        if not has_graphs(program.embedding.device):
            return "the model is not on a GPU"
        if self.failure is not None:
            return self.failure
        if any(type(cache.layers[mixer.layer_idx]) is not DynamicLayer for mixer in program.attention_layers):
            return "the cache's attention layers are of another kind"
        return program.graph_refusal()

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
    def _key(program: Program, cache: KDACache, capacity: int, records: bool) -> Any:
        # What a step depends on besides the program.
        shapes = [(state.shape, state.dtype) for state in _states(cache, program.kda_layers[0].layer_idx)]
        return cache.batch_size, capacity, records, shapes


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of `module` does more than its forward. Output capturing of transformers does so when asked."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing") for hook in hooks)


def rope_refusal(rope: Any) -> str | None:
    """Why a captured step can't have these rotary embeddings, or None."""
    if rope is not None and rope.rope_type not in ("default", "linear", "llama3", "yarn"):
        return f"RoPE of type {rope.rope_type} changes with the length"
    return None


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

    def __init__(self, program: Program, rollback: int):
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
        program: Program,
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
    program: Program,
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
    except RuntimeError as error:
        if not program.may_not_capture:
            raise
        program.graphs.failure = f"a step can't be captured: {error}"
        logger.warning("decoding without a CUDA graph: %s", program.graphs.failure)
        return None
