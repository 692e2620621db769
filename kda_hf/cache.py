"""`KDACache`: keys and values of attention layers and recurrent states of KDA layers, in one `transformers.Cache`.

What it adds to the caches of transformers is that a KDA layer can go back: `crop`, `snapshot`, `fork` and `save` cover
the recurrent state too. A recurrent state cannot be undone token by token, since the decay forgets. So each KDA layer
keeps its last tokens and the states from before them, and `crop` runs the tokens that stay again.
"""

import copy
import json
import operator
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticIndexedLayer,
    StaticLayer,
)
from transformers.utils import is_torchdynamo_compiling


# Assisted decoding may draft and reject this many tokens between two calls of `crop`.
ASSISTED_ROLLBACK = 256

# What the shapes of the cached tensors follow from. A snapshot or a file fits a cache where all of these agree.
SHAPE_FIELDS = (
    "num_hidden_layers",
    "layer_types",
    "linear_num_heads",
    "linear_num_value_heads",
    "linear_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "index_head_dim",
    "indexer_types",
)

FILE_FORMAT = "kda_hf.KDACache"
FILE_VERSION = "1"

# The conv state and the recurrent state of a layer.
States = tuple[torch.Tensor, torch.Tensor]
# (conv_inputs, g, beta, valid, conv_state, recurrent_state) -> (conv_state, recurrent_state)
Replay = Callable[..., States]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors that `value`, a layer or one of its attributes, holds."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, _History):
        yield from _tensors(value.fields())
    elif isinstance(value, (KDACacheLayer, DynamicLayer, StaticLayer)):
        yield from _tensors(vars(value))


def _clone_layer(layer):
    """An independent copy of `layer`. Unlike `copy.deepcopy`, it also copies tensors that autograd still tracks."""
    with torch.inference_mode(False):
        memo = {id(tensor): tensor.detach().clone() for tensor in _tensors(layer)}
    return copy.deepcopy(layer, memo)


def _overwrite(target: Any, source: Any) -> Any:
    """`source` as the new value of `target`: written into the tensors of `target` where they fit, else a copy."""
    if isinstance(source, torch.Tensor):
        fits = isinstance(target, torch.Tensor) and not target.is_inference()
        if fits and (target.shape, target.dtype, target.device) == (source.shape, source.dtype, source.device):
            return target.copy_(source)
        with torch.inference_mode(False):
            return source.clone()
    if isinstance(source, dict):
        return {key: _overwrite(None if target is None else target.get(key), source[key]) for key in source}
    if isinstance(source, (list, tuple)):
        targets = [None] * len(source) if target is None else target
        return type(source)(_overwrite(*pair) for pair in zip(targets, source, strict=True))
    if isinstance(source, _History):
        history = copy.copy(source)
        history.set_fields(_overwrite(None if target is None else target.fields(), source.fields()))
        return history
    return source


def _mark_static(tensor: torch.Tensor) -> torch.Tensor:
    """Tells the compiler that `tensor` keeps its address, so that CUDA graphs may write to it."""
    if not is_torchdynamo_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


def _copy_states(target: States, source: States) -> None:
    target[0].copy_(source[0])
    target[1].copy_(source[1])


class _History:
    """The last tokens of one KDA layer, and its states from before them.

    `base` is the states before the first token kept. `mark` is the states at token `mark_position`, where the last
    block of several tokens begins: assisted decoding goes back into that block, and so runs a few tokens again and not
    the whole history. Decoding token by token sets it where `base` moves to when the buffers are full, which so needs
    no token run again. `mark_position` 0 means no mark. All buffers have a fixed size.

    Args:
        capacity: number of tokens there is room for.
        conv_inputs, g, beta: a first block, whose shapes `[B, T, ...]`, dtypes and device the buffers take over.
    """

    # No `__dict__`: transformers' exporters take every tensor within reach of `vars` for an output of the model.
    __slots__ = (
        "capacity",
        "length",
        "replay",
        "has_padding",
        "tokens",
        "base",
        "base_is_empty",
        "mark",
        "mark_position",
    )

    def __init__(self, capacity: int, conv_inputs: torch.Tensor, g: torch.Tensor, beta: torch.Tensor):
        self.capacity = capacity
        self.length = 0
        self.replay: Any = None
        self.has_padding = False
        with torch.inference_mode(False):
            # conv_inputs, g, beta, valid
            self.tokens = [x.new_zeros(x.shape[0], capacity, *x.shape[2:]) for x in (conv_inputs, g, beta)]
            self.tokens.append(conv_inputs.new_ones(conv_inputs.shape[0], capacity, dtype=torch.bool))
        self.base: Any = None
        self.base_is_empty = True
        self.mark: Any = None
        self.mark_position = 0

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def set_fields(self, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            setattr(self, name, value)

    def __deepcopy__(self, memo):
        # `replay` reaches the layer of the model, which a copy of the cache must not copy.
        memo[id(self.replay)] = self.replay
        copied = memo[id(self)] = copy.copy(self)
        copied.set_fields(copy.deepcopy(self.fields(), memo))
        return copied

    def fits(self, *block: torch.Tensor) -> bool:
        """Whether a block (conv_inputs, g, beta) can be appended to the buffers."""
        return all(
            (x.shape[0], x.shape[2:], x.dtype, x.device) == (y.shape[0], y.shape[2:], y.dtype, y.device)
            for x, y in zip(block, self.tokens[:3], strict=True)
        )

    def allocate_states(self, states: States) -> None:
        """Makes room for `base` and `mark`, as soon as the shapes of the states are known."""
        if self.base is None:
            with torch.inference_mode(False):
                self.base = (torch.zeros_like(states[0]), torch.zeros_like(states[1]))
                self.mark = (torch.zeros_like(states[0]), torch.zeros_like(states[1]))

    def start(self, states: States | None) -> None:
        """Starts over at the present `states`; None if no token was seen yet."""
        self.length = self.mark_position = 0
        if self.has_padding:
            self.tokens[3].fill_(True)
            self.has_padding = False
        self.base_is_empty = states is None
        if states is not None:
            self.allocate_states(states)
            _copy_states(self.base, states)

    def set_mark(self, states: States) -> None:
        """Remembers the present `states`, as a block begins."""
        self.mark_position = self.length
        _copy_states(self.mark, states)

    def append(self, replay: Replay, conv_inputs, g, beta, valid) -> None:
        """Adds a block of tokens."""
        num_tokens = conv_inputs.shape[1]
        for buffer, block in zip(self.tokens, (conv_inputs, g, beta), strict=False):
            buffer.narrow(1, self.length, num_tokens).copy_(block.detach())
        self.has_padding |= valid is not None
        if self.has_padding:  # until then, all tokens are valid as they stand
            is_valid = self.tokens[3].narrow(1, self.length, num_tokens)
            is_valid.fill_(True) if valid is None else is_valid.copy_(valid)
        self.replay = replay
        self.length += num_tokens

    @torch.no_grad()
    def states_at(self, position: int) -> States | None:
        """The states after the first `position` tokens kept; None if no token ever came before."""
        start, states = 0, None if self.base_is_empty else self.base
        if 0 < self.mark_position <= position:
            start, states = self.mark_position, self.mark
        if position == start:
            return states
        conv_inputs, g, beta, valid = (buffer[:, start:position] for buffer in self.tokens)
        return self.replay(conv_inputs, g, beta, valid if self.has_padding else None, *(states or (None, None)))

    def drop_oldest(self, num_tokens: int) -> None:
        """Moves `base` forward by `num_tokens`."""
        states = self.states_at(num_tokens)
        assert states is not None
        _copy_states(self.base, states)
        self.base_is_empty = False
        for buffer in self.tokens:
            # Cloned, as source and destination may overlap.
            buffer[:, : self.length - num_tokens] = buffer[:, num_tokens : self.length].clone()
        self.length -= num_tokens
        self.mark_position = max(self.mark_position - num_tokens, 0)

    def truncate(self, position: int) -> None:
        """Drops all tokens after the first `position`."""
        self.length = position
        if self.mark_position > position:
            self.mark_position = 0

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every buffer by what `function` makes of it."""
        self.tokens = [function(x) for x in self.tokens]
        if self.base is not None:
            self.base = (function(self.base[0]), function(self.base[1]))
            self.mark = (function(self.mark[0]), function(self.mark[1]))


class _BatchInPlace:
    """Batch operations that keep the storage of a layer's tensors unless the batch size changes."""

    def _map_batch(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        raise NotImplementedError

    @staticmethod
    def _replace(tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(new) if tensor.shape == new.shape else _mark_static(new)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the batch for beam search, in place."""
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch `repeats` times."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the rows `indices` of the batch."""
        self._map_batch(lambda x: x[indices, ...])


class KDACacheLayer(_BatchInPlace, LinearAttentionLayer):
    """The convolution and recurrent state of one KDA layer, and the history that lets it go back.

    `conv_states[0]`, `[B, D, W]`, holds the last W inputs of the convolution, oldest first, in the dtype of the model.
    `recurrent_states[0]`, `[B, HV, K, V]`, is kept in `state_dtype`. Both keep their address from the first update on.
    They are detached: no gradient flows through a cache.

    A forward calls `record` (if `records`), `update_conv_state`, `update_recurrent_state` and `advance`, in this order.
    An update without `record` is allowed; tokens up to there can then not be cropped. Whoever changes the states in
    another way, as the replay of a CUDA graph does, calls `advance` and `forget`.

    Args:
        max_cache_len: if given, the layer counts tokens in a tensor, so that a compiled forward does not recompile.
        state_dtype: dtype of the recurrent state.
        max_rollback: number of tokens that `crop` can remove at least; 0 keeps no history at all.
    """

    conv_states: dict[int, Any]
    recurrent_states: dict[int, Any]

    def __init__(
        self, max_cache_len: int | None = None, state_dtype: torch.dtype = torch.float32, max_rollback: int = 64
    ):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.state_dtype = state_dtype
        self.max_rollback = max_rollback
        self.cumulative_length: int | torch.Tensor = 0 if max_cache_len is None else torch.tensor(0)
        self._history: Any = None
        # Whether `record` was called for the update that comes next.
        self._is_recorded = False

    def __repr__(self):
        shape = list(self.recurrent_states[0].shape) if self.is_initialized else None
        return f"{type(self).__name__}(recurrent_state={shape}, removable_tokens={self.removable_tokens})"

    @property
    def is_initialized(self) -> bool:
        """Whether the states are allocated."""
        return self.is_recurrent_states_initialized[0]

    @property
    def is_compileable(self) -> bool:
        """Without `max_cache_len` a cache is for eager decoding: `generate` must not compile the forward by itself."""
        return self.max_cache_len is not None

    @property
    def _states(self) -> States:
        return self.conv_states[0], self.recurrent_states[0]

    @property
    def records(self) -> bool:
        """Whether a forward should call `record`.

        Never inside a compiled forward with `max_cache_len`: the length of the history is a Python number, so CUDA
        graphs would be recorded again at every step.
        """
        if torch.compiler.is_exporting():
            return False
        return self.max_rollback > 0 and not (self.is_compileable and torch.compiler.is_compiling())

    @property
    def removable_tokens(self) -> int:
        """Number of tokens that `crop` can remove now."""
        return 0 if self._history is None or self._is_recorded else self._history.length

    @property
    def is_croppable(self) -> bool:
        """Whether the tokens of the last forward can be removed."""
        return self.max_rollback > 0 and (self.removable_tokens > 0 or not self.has_previous_state[0])

    def activate_past_recording(self) -> None:
        """Makes at least `ASSISTED_ROLLBACK` tokens removable, counted from now on."""
        if self.max_rollback < ASSISTED_ROLLBACK:
            self.max_rollback = ASSISTED_ROLLBACK
            self._history = None

    def lazy_initialization(
        self,
        conv_states: torch.Tensor | None = None,
        recurrent_states: torch.Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        # Tensors made in inference mode could not be written to outside of it, for instance by `generate` later.
        with torch.inference_mode(False):
            if conv_states is not None:
                super().lazy_initialization(conv_states.detach(), None, state_idx, conv_kernel_size)
                if isinstance(self.cumulative_length, torch.Tensor):
                    self.cumulative_length = _mark_static(self.cumulative_length.clone().to(conv_states.device))
            if recurrent_states is not None:
                super().lazy_initialization(None, recurrent_states.detach().to(self.state_dtype), state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs
    ) -> torch.Tensor:
        """Sets or extends the convolution state.

        Args:
            conv_states: `[B, D, W]`, the new state, or with `conv_kernel_size` inputs `[B, D, T]` to append to it.
            conv_kernel_size: W, as models of transformers pass it.

        Returns:
            The new state, or with `conv_kernel_size` the previous state and the inputs, concatenated.

        Raises:
            ValueError: if `conv_states` has another batch size than the states.
        """
        previous = self.conv_states[state_idx]
        if previous is not None and previous.shape[:2] != conv_states.shape[:2]:
            if self.has_previous_state[state_idx]:
                raise ValueError(
                    f"`conv_states` has batch size and channels {list(conv_states.shape[:2])}, but the cache holds "
                    f"{list(previous.shape[:2])}. Call `reset` before another batch."
                )
            self._release()
        if not self._is_recorded:
            self.forget()
        state = self.conv_states[state_idx]
        if state is not None and conv_kernel_size is None and state.shape == conv_states.shape:
            self.has_previous_state[state_idx] = True
            return state.copy_(conv_states.detach())
        full_conv_states = super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)
        self.conv_states[state_idx].detach_()
        return full_conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """Sets the recurrent state to `recurrent_states`, `[B, HV, K, V]` of any floating dtype, and returns it.

        Raises:
            ValueError: if `recurrent_states` has another shape than the state.
        """
        previous = self.recurrent_states[state_idx]
        if previous is not None and previous.shape != recurrent_states.shape:
            raise ValueError(
                f"`recurrent_states` has shape {list(recurrent_states.shape)}, but the cache holds "
                f"{list(previous.shape)}."
            )
        state = super().update_recurrent_state(recurrent_states.detach(), state_idx, **kwargs)
        self.note_update_in_place()
        return state

    def note_update_in_place(self) -> None:
        """Says that both states have been updated where they are, by a token that `record` may know of."""
        if self._is_recorded:
            self._history.allocate_states(self._states)
            self._is_recorded = False
        else:
            self.forget()

    def record(
        self,
        replay: Replay,
        conv_inputs: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> None:
        """Remembers a block of tokens, so that `crop` can remove any number of them. Called before the states change.

        Args:
            replay: `replay(conv_inputs, g, beta, valid, conv_state, recurrent_state)` runs tokens again from given
                states (None before the first token), which it must not write to, and returns the pair of new states.
            conv_inputs: `[B, T, D]`, T ≤ `max_rollback`.
            g: `[B, T, HV, K]`.
            beta: `[B, T, HV]`.
            valid: `[B, T]` bool, False for padding; None if there is none.
        """
        num_tokens = conv_inputs.shape[1]
        assert num_tokens <= self.max_rollback, "a longer block is split by the caller"
        if self._is_recorded:
            # The forward before this one failed between `record` and the update.
            self.forget()
        history = self._history
        if history is None or not history.fits(conv_inputs, g, beta):
            history = self._history = _History(2 * self.max_rollback, conv_inputs, g, beta)
        if history.length == 0:
            history.start(self._states if self.has_previous_state[0] else None)
        else:
            if history.length + num_tokens > history.capacity:
                history.drop_oldest(history.length - self.max_rollback)
            if num_tokens > 1 or history.length == self.max_rollback:
                history.set_mark(self._states)
        history.append(replay, conv_inputs, g, beta, valid)
        self._is_recorded = True

    def forget(self) -> None:
        """Drops the history: tokens seen so far can no longer be removed."""
        self._is_recorded = False
        if self._history is not None:
            self._history.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, as if they had never been seen.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
            RuntimeError: if more tokens are to be removed than the history holds.
        """
        num_tokens = _num_tokens_to_remove(tokens_to_remove)
        self.check_removable(num_tokens)
        if num_tokens == 0:
            return
        position = self._history.length - num_tokens
        states = self._history.states_at(position)
        if states is None:
            self.reset()
            return
        _copy_states(self._states, states)
        self._history.truncate(position)
        self.advance(-num_tokens)

    def check_removable(self, num_tokens: int) -> None:
        """Raises RuntimeError if the last `num_tokens` tokens cannot be removed."""
        if num_tokens > self.removable_tokens:
            raise RuntimeError(
                f"Cannot remove {num_tokens} tokens from the cache: its KDA layers can remove {self.removable_tokens} "
                f"(max_rollback={self.max_rollback}). A larger `max_rollback` of `KDACache` keeps more."
            )

    def advance(self, num_tokens: int) -> None:
        """Counts `num_tokens` more tokens. The model calls this once per forward."""
        self.cumulative_length += num_tokens

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens counted; with `max_cache_len` a tensor on the device, as for transformers' static layers."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int | torch.Tensor, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens covers."""
        return self.max_cache_len or self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """`max_cache_len`, or -1 without a limit."""
        return self.max_cache_len or -1

    def reset(self) -> None:
        """Back to before the first token; the states keep their storage."""
        super().reset()
        self.forget()
        self.cumulative_length *= 0

    def offload(self) -> None:
        """Moves states and history to the CPU."""
        super().offload()
        if self._history is not None:
            self._history.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves states and history back to the device of the layer."""
        super().prefetch()
        if self._history is not None:
            self._history.map(lambda x: x.to(self.device, non_blocking=True))

    def _map_batch(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            for states in (self.conv_states, self.recurrent_states):
                states[0] = self._replace(states[0], select(states[0]))
        if self._history is not None:
            self._history.map(lambda x: self._replace(x, select(x)))

    def _release(self) -> None:
        """Drops the states, for a batch of another size. The history makes itself anew in `record`."""
        self.conv_states[0] = self.recurrent_states[0] = None
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = False


class KDAStaticLayer(_BatchInPlace, StaticLayer):
    """transformers' `StaticLayer` with `crop` and the batch operations that it lacks."""

    is_croppable = True
    keys: Any
    values: Any

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; the storage stays."""
        num_tokens = _num_tokens_to_remove(tokens_to_remove)
        if num_tokens == 0 or not self.is_initialized:
            return
        length = max(int(self.cumulative_length) - num_tokens, 0)
        self.keys[:, :, length:].zero_()
        self.values[:, :, length:].zero_()
        self.cumulative_length.fill_(length)

    def _map_batch(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys = self._replace(self.keys, select(self.keys))
            self.values = self._replace(self.values, select(self.values))
            self.batch_size = self.keys.shape[0]


class KDAStaticIndexedLayer(KDAStaticLayer, StaticIndexedLayer):
    """transformers' `StaticIndexedLayer`, with the keys of a sparse attention's indexer, and all of the above."""

    indexer_keys: Any
    indexer_cumulative_length: Any

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; the storage stays."""
        super().crop(tokens_to_remove)
        if self.is_indexer_initialized:
            length = max(int(self.indexer_cumulative_length) - _num_tokens_to_remove(tokens_to_remove), 0)
            self.indexer_keys[:, length:].zero_()
            self.indexer_cumulative_length.fill_(length)

    def _map_batch(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_batch(select)
        if self.is_indexer_initialized:
            self.indexer_keys = self._replace(self.indexer_keys, select(self.indexer_keys))


# By the type of a layer: without and with `max_cache_len`.
ATTENTION_LAYERS = {
    "full_attention": (DynamicLayer, KDAStaticLayer),
    "indexed_attention": (DynamicIndexedLayer, KDAStaticIndexedLayer),
    "deepseek_sparse_attention": (DynamicIndexedLayer, KDAStaticIndexedLayer),  # its name in older versions
}


class KDACacheSnapshot:
    """What `KDACache.snapshot` returns and `KDACache.restore` takes: a copy of all states. Opaque to callers."""

    def __init__(self, shape_fields: dict[str, Any], layers: list):
        self.shape_fields = shape_fields
        self.layers = layers


class KDACache(Cache):
    """The cache of a model with KDA layers: recurrent states for KDA layers, keys and values for attention layers.

    Beyond what `transformers.Cache` promises, it can `crop` recurrent layers, take and `restore` a `snapshot`, `fork`,
    and `save` itself to a file. Recurrent states are detached: no gradient flows through them.

    Args:
        config: configuration of the model; its `layer_types` are `"linear_attention"`, `"full_attention"` and
            `"indexed_attention"`, which other models have.
        max_cache_len: number of tokens that attention layers have room for. If given, all shapes and addresses are
            static and `generate` may compile the forward, whose tokens cannot be cropped. Without it they grow.
        state_dtype: dtype of the recurrent states. `torch.bfloat16` halves their memory and rounds them after every
            forward.
        offloading: keep keys and values on the CPU between their uses. The states of KDA layers are small and stay on
            the device. Has no effect on a CPU.
        max_rollback: number of tokens that `crop` can always remove. For it KDA layers keep up to twice as many tokens
            and two copies of their states; 0 keeps nothing.

    Raises:
        ValueError: for a `layer_types` entry of another kind, or an argument out of range.
        TypeError: for an argument of a wrong type.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        offloading: bool = False,
        max_rollback: int = 64,
    ):
        if max_cache_len is not None:
            _check_int("max_cache_len", max_cache_len, minimum=1)
        _check_int("max_rollback", max_rollback, minimum=0)
        if not isinstance(state_dtype, torch.dtype):
            raise TypeError(f"`state_dtype` must be a torch.dtype, got {state_dtype!r}.")
        if not state_dtype.is_floating_point:
            raise ValueError(f"`state_dtype` must be a floating point dtype, got {state_dtype}.")

        config = config.get_text_config(decoder=True)
        layers: list[Any] = []
        for idx, layer_type in enumerate(config.layer_types):
            if layer_type == "linear_attention":
                layers.append(KDACacheLayer(max_cache_len, state_dtype, max_rollback))
            elif layer_type in ATTENTION_LAYERS:
                dynamic, static = ATTENTION_LAYERS[layer_type]
                layers.append(dynamic() if max_cache_len is None else static(max_cache_len))
            else:
                known = ", ".join(map(repr, ["linear_attention", *ATTENTION_LAYERS]))
                raise ValueError(f"`config.layer_types[{idx}]` must be one of {known}; got {layer_type!r}.")
        Cache.__init__(self, layers=layers, offloading=offloading)
        self._max_cache_len = max_cache_len
        self.state_dtype = state_dtype
        self._shape_fields = _shape_fields(config)
        self._has_attention = any(layer_type in ATTENTION_LAYERS for layer_type in config.layer_types)

    def __repr__(self):
        num_kda_layers = sum(isinstance(layer, KDACacheLayer) for layer in self.layers)
        return (
            f"{type(self).__name__}(kda_layers={num_kda_layers}, attention_layers={len(self) - num_kda_layers}, "
            f"batch_size={self.batch_size}, seq_length={int(self.get_seq_length())}, "
            f"max_cache_len={self.max_cache_len}, state_dtype={self.state_dtype}, nbytes={self.nbytes})"
        )

    @property
    def max_cache_len(self) -> int | None:
        """Number of tokens that attention layers have room for; None without a limit."""
        return self._max_cache_len

    @property
    def batch_size(self) -> int:
        """Batch size of the cached tensors, or -1 before the first forward."""
        for layer in self.layers:
            if layer.is_initialized:
                return (layer.recurrent_states[0] if isinstance(layer, KDACacheLayer) else layer.keys).shape[0]
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, history included; KDA layers add none after a first forward."""
        return sum(tensor.nbytes for tensor in _tensors(self.layers))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen, from the attention layers, or from layer `layer_idx` if there are only KDA layers."""
        if self._has_attention or layer_idx >= len(self.layers):
            return super().get_seq_length(layer_idx)
        return self.layers[layer_idx].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens covers."""
        if self._has_attention or layer_idx >= len(self.layers):
            return super().get_mask_sizes(query_length, layer_idx)
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values `[B, H, T, D]` to attention layer `layer_idx`; returns all of that layer."""
        layer = self.layers[layer_idx]
        if not (self.offloading and key_states.is_cuda):
            return layer.update(key_states, value_states, *args, **kwargs)
        # Not transformers' own order: where a single layer has attention, that one reads keys that are still on their
        # way in, and in 5.17 it fetches keys that are still on their way out. Here each stream waits for the other, and
        # a layer whose turn is now is not fetched ahead.
        torch.cuda.current_stream(key_states.device).wait_stream(self.prefetch_stream)
        layer.prefetch()
        following = self._attention_layer_from(layer_idx + 1)
        if following is not layer and following.is_initialized:
            self.prefetch_stream.wait_stream(torch.cuda.current_stream(following.device))
            with self.prefetch_stream:
                following.prefetch()
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        layer.offload()
        return keys, values

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves layer `layer_idx` to the CPU."""
        self._finish_copies()
        layer = self.layers[layer_idx]
        layer.offload()
        if layer.is_initialized and layer.device.type == "cuda":  # the copy is under way
            torch.cuda.synchronize(layer.device)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves layer `layer_idx` back to its device; with `offloading`, also the next attention layer."""
        self._finish_copies()
        layer_idx %= len(self.layers)
        self.layers[layer_idx].prefetch()
        if self.offloading and self._has_attention:
            self._attention_layer_from(layer_idx).prefetch()

    def _attention_layer_from(self, layer_idx: int) -> Any:
        """The first attention layer from `layer_idx` on, round the end if need be."""
        layers = self.layers[layer_idx:] + self.layers[:layer_idx]
        return next(layer for layer in layers if not isinstance(layer, KDACacheLayer))

    def _finish_copies(self) -> None:
        """Waits for the copies that `update` has under way. Called before anything else touches their tensors.

        They are the offloading of the last layers, which the host has not waited for, and the fetching of the next one,
        for which the current stream has not.
        """
        if self.offloading:
            for device in {layer.device for layer in self.layers if layer.is_initialized}:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

    def reset(self) -> None:
        """Back to before the first token. KDA and static layers keep their storage."""
        self._finish_copies()
        for layer in self.layers:
            _reset_layer(layer)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the batch for beam search."""
        self._finish_copies()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch `repeats` times."""
        self._finish_copies()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the rows `indices` of the batch."""
        self._finish_copies()
        # With offloading some layers are on the CPU: indices there select from a tensor on any device.
        super().batch_select_indices(indices.cpu() if self.offloading else indices)

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens from all layers, as if they had never been seen.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
            RuntimeError: if a layer cannot remove that many; no layer has changed then.
        """
        num_tokens = _num_tokens_to_remove(tokens_to_remove)
        if num_tokens == 0:
            return
        self._finish_copies()
        for layer in self.layers:
            if isinstance(layer, KDACacheLayer):
                layer.check_removable(num_tokens)
            elif num_tokens > layer.get_seq_length():
                raise RuntimeError(
                    f"Cannot remove {num_tokens} tokens from the cache: it holds {int(layer.get_seq_length())}."
                )
        super().crop(-num_tokens)

    @torch.no_grad()
    def snapshot(self) -> KDACacheSnapshot:
        """A copy of all states, counts and histories, for `restore`."""
        self._finish_copies()
        return KDACacheSnapshot(self._shape_fields, [_clone_layer(layer) for layer in self.layers])

    @torch.no_grad()
    def restore(self, snapshot: KDACacheSnapshot) -> None:
        """Back to where `snapshot` was taken, in place where shapes allow. It can be restored any number of times.

        Raises:
            TypeError: if `snapshot` is not from `KDACache.snapshot`.
            ValueError: if it is from a cache for another configuration.
        """
        if not isinstance(snapshot, KDACacheSnapshot):
            raise TypeError(f"`snapshot` must come from `KDACache.snapshot()`, got {type(snapshot).__name__}.")
        _check_shape_fields(snapshot.shape_fields, self._shape_fields, "the snapshot", "the cache")
        for layer, saved in zip(self.layers, snapshot.layers, strict=True):
            for name in ("max_cache_len", "state_dtype"):
                if getattr(layer, name, None) != getattr(saved, name, None):
                    raise ValueError(
                        f"`{name}` is {getattr(saved, name, None)} in the snapshot, but {getattr(layer, name, None)} "
                        "in the cache."
                    )
        self._finish_copies()
        for layer, saved in zip(self.layers, snapshot.layers, strict=True):
            if not saved.is_initialized:
                # Keeps the storage that the layer has got since.
                _reset_layer(layer)
                continue
            for name, value in vars(saved).items():
                setattr(layer, name, _overwrite(getattr(layer, name, None), value))

    @torch.no_grad()
    def fork(self, n: int) -> "KDACache":
        """A new, independent cache that holds each row of the batch `n` times, rows in order.

        Raises:
            TypeError, ValueError: if `n` is not a positive integer.
        """
        _check_int("n", n, minimum=1)
        self._finish_copies()
        forked = copy.copy(self)
        forked.layers = [_clone_layer(layer) for layer in self.layers]
        if n > 1:
            forked.batch_repeat_interleave(n)
        return forked

    def __deepcopy__(self, memo):
        # The stream of an offloading cache cannot be copied, and is shared.
        memo[id(self)] = copied = self.fork(1)
        return copied

    @torch.no_grad()
    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache to one safetensors file, which appears under `path` only when it is complete.

        The file holds states, keys and values, but no history: after `load`, the tokens in it cannot be cropped.

        Raises:
            FileNotFoundError: if the folder of `path` does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"Cannot save the cache to {path}: there is no folder {path.parent}.")
        self._finish_copies()
        tensors: dict[str, torch.Tensor] = {}
        for idx, layer in enumerate(self.layers):
            if isinstance(layer, KDACacheLayer):
                if layer.has_previous_state[0]:
                    tensors[f"layers.{idx}.conv_state"] = layer.conv_states[0]
                    tensors[f"layers.{idx}.recurrent_state"] = layer.recurrent_states[0]
            elif (length := int(layer.get_seq_length())) > 0:
                tensors[f"layers.{idx}.keys"] = layer.keys[:, :, :length]
                tensors[f"layers.{idx}.values"] = layer.values[:, :, :length]
                if getattr(layer, "is_indexer_initialized", False):
                    tensors[f"layers.{idx}.indexer_keys"] = layer.indexer_keys[:, :length]
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        header = json.dumps(
            {
                "shape_fields": self._shape_fields,
                "max_cache_len": self.max_cache_len,
                "state_dtype": str(self.state_dtype).removeprefix("torch."),
                "seq_lengths": [int(layer.get_seq_length()) for layer in self.layers],
            }
        )
        metadata = {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "header": header,
            "checksum": _checksum(header, tensors),
        }
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, config: PreTrainedConfig, device: str | torch.device = "cpu") -> "KDACache":
        """Reads a cache that `save` wrote, for a model with `config`, onto `device`.

        Raises:
            FileNotFoundError: if there is no file at `path`.
            ValueError: if the file is truncated, corrupted, no cache, or from another configuration; says what differs.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No cache file at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated, corrupted or not a safetensors file: {error}") from error
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(
                f"{path} is not a cache file: its `format` is {metadata.get('format')!r}, not {FILE_FORMAT!r}."
            )
        if metadata.get("version") != FILE_VERSION:
            raise ValueError(f"{path} has `version` {metadata.get('version')!r}; this code reads {FILE_VERSION!r}.")
        if metadata.get("checksum") != _checksum(metadata.get("header", ""), tensors):
            raise ValueError(f"{path} is corrupted: its contents do not match their checksum.")

        header = json.loads(metadata["header"])
        _check_shape_fields(
            header["shape_fields"], _shape_fields(config.get_text_config(decoder=True)), str(path), "`config`"
        )
        cache = cls(config, header["max_cache_len"], getattr(torch, header["state_dtype"]))
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        for idx, (layer, seq_length) in enumerate(zip(cache.layers, header["seq_lengths"], strict=True)):
            if f"layers.{idx}.conv_state" in tensors:
                layer.update_conv_state(tensors[f"layers.{idx}.conv_state"])
                layer.update_recurrent_state(tensors[f"layers.{idx}.recurrent_state"])
                layer.advance(seq_length)
            elif f"layers.{idx}.keys" in tensors:
                layer.update(tensors[f"layers.{idx}.keys"], tensors[f"layers.{idx}.values"])
                if f"layers.{idx}.indexer_keys" in tensors:
                    layer.update_indexer(tensors[f"layers.{idx}.indexer_keys"])
        return cache


class KDADynamicCache(KDACache, DynamicCache):
    """A [`KDACache`] that grows, for code that asks for transformers' `DynamicCache`."""


class KDAStaticCache(KDACache, StaticCache):
    """A [`KDACache`] with `max_cache_len`, for code that asks for transformers' `StaticCache`."""


def _reset_layer(layer: KDACacheLayer | DynamicLayer | KDAStaticLayer) -> None:
    layer.reset()
    if isinstance(layer, DynamicLayer):
        # Older versions of transformers zero the keys and values here, but keep their length.
        layer.keys = layer.values = None
        layer.is_initialized = False
    if isinstance(layer, DynamicIndexedLayer):
        layer.indexer_keys = None
        layer.is_indexer_initialized = False


def _num_tokens_to_remove(tokens_to_remove: int) -> int:
    """The number of tokens that `crop(tokens_to_remove)` removes."""
    try:
        # An integer of any kind: transformers passes the result of tensor arithmetic.
        tokens_to_remove = operator.index(tokens_to_remove)
    except TypeError:
        raise TypeError(f"`tokens_to_remove` must be an integer, got {tokens_to_remove!r}.") from None
    if tokens_to_remove > 0:
        raise ValueError(
            f"`tokens_to_remove` must not be positive, got {tokens_to_remove}: `crop(-m)` removes the last m tokens."
        )
    return -tokens_to_remove


def _check_int(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def _shape_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields = {name: getattr(config, name, None) for name in SHAPE_FIELDS}
    return fields | {"layer_types": list(config.layer_types)}


def _check_shape_fields(found: dict[str, Any], wanted: dict[str, Any], found_in: str, wanted_in: str) -> None:
    """Raises ValueError that names the fields in which a saved cache differs from the one wanted."""
    differences = [
        f"`{name}` is {found.get(name)} in {found_in}, but {wanted[name]} in {wanted_in}"
        for name in SHAPE_FIELDS
        if found.get(name) != wanted[name]
    ]
    if differences:
        raise ValueError("The cache does not fit: " + "; ".join(differences) + ".")


def _checksum(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 over `header` and names, dtypes, shapes and bytes of `tensors`."""
    checksum = zlib.crc32(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
