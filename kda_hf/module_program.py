"""One token a row through the modules of somebody else's model, for `generate()`: on a GPU as a CUDA graph."""

import contextlib
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from .cache import KDACache, KDACacheLayer
from .decode_graph import DecodeBuffers, DecodeGraphs, Program, has_hooks, rope_refusal
from .generation import CACHE_NAME
from .layer import KDALayer


class _AttentionLayer(NamedTuple):
    layer_idx: int


class _StepStates(KDACacheLayer):
    """A KDA layer's part of the buffers of a step, in place of one of a cache."""

    def __init__(self, states: tuple[torch.Tensor, torch.Tensor], layer_idx: int, recorded: dict[int, Any] | None):
        super().__init__(state_dtype=states[1].dtype, max_rollback=0)
        self.conv_states[0], self.recurrent_states[0] = states
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True
        self.layer_idx, self.recorded = layer_idx, recorded

    @property
    def records(self) -> bool:
        return self.recorded is not None

    def record(self, replay, conv_inputs, g, beta, valid=None) -> None:
        assert self.recorded is not None
        self.recorded[self.layer_idx] = (conv_inputs, g, beta)

    def note_update_in_place(self) -> None:
        pass

    def advance(self, num_tokens: int) -> None:
        pass


class _StepKeys(DynamicLayer):
    """An attention layer's part of the buffers of a step: keys and values at fixed places, all of which it returns."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.length, self.is_initialized = keys, values, length, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.length, key_states)
        self.values.index_copy_(2, self.length, value_states)
        return self.keys, self.values


class ModuleProgram(Program):
    """
    The forward of a model whose modules are not ours, for one token a row after others: its own forward, with a cache
    at fixed places, which a CUDA graph can capture.

    It keeps graphs of its steps in `graphs`.
    """

    may_not_capture = True  # a module may do what no graph can

    def __init__(self, model: Any):
        self._model = weakref.ref(model)
        self.embedding = model.get_input_embeddings().weight
        self.config = model.config.get_text_config(decoder=True)
        self.kda_layers = [module for module in model.modules() if isinstance(module, KDALayer)]
        kinds = enumerate(self.config.layer_types)
        self.attention_layers = [_AttentionLayer(i) for i, kind in kinds if kind != "linear_attention"]
        self.rotary_emb = getattr(model.get_decoder(), "rotary_emb", None)
        self.graphs = DecodeGraphs(self)

    @staticmethod
    def refusal(model: Any) -> str | None:
        if model.training:
            return "the model is in training mode"
        if model.config.output_hidden_states or model.config.output_attentions:
            return "the configuration asks for more than logits"
        return None

    @staticmethod
    def signature_of(model: Any) -> Any:
        """What a captured step depends on: parameters where they are, and what else modules may do."""
        config = model.config.get_text_config(decoder=True)
        parameters = [(id(p), p.data_ptr()) for p in model.parameters()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return config._attn_implementation, hooks, parameters

    @property
    def model(self) -> Any:
        return self._model()

    def takes(self, input_ids: torch.Tensor | None, cache: Any) -> bool:
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] != 1 or not isinstance(cache, KDACache):
            return False
        states = [cache.layers[layer.layer_idx] for layer in self.kda_layers]
        return not cache.offloading and all(
            layer.has_previous_state[0] and len(layer.conv_states[0]) == len(input_ids) for layer in states
        )

    def __call__(self, *_: Any) -> None:  # without a graph, the modules run
        return None

    def graph_refusal(self) -> str | None:
        if nn.modules.module._has_any_global_hook():
            return "there are global hooks"
        if self.config._attn_implementation not in ("sdpa", "eager"):
            return f"attention is {self.config._attn_implementation!r}"
        if not all(kda.steps_at_once(self.embedding, torch.float32) for kda in self.kda_layers[:1]):
            return "KDA layers have no kernel for a token"
        if not all(p.device == self.embedding.device for p in self.model.parameters()):
            return "the parameters are on several devices"
        for name, module in self.model.named_modules():  # a replay calls none
            if has_hooks(module) or "_hf_hook" in vars(module):
                return f"`{name}` has hooks"
        return rope_refusal(self.rotary_emb)

    def step(self, buffers: DecodeBuffers, recorded: dict[int, Any] | None = None) -> torch.Tensor:
        cache = KDACache(self.config, max_rollback=0)
        for idx, states in buffers.states.items():
            cache.layers[idx] = _StepStates(states, idx, recorded)
        for idx, (keys, values) in buffers.keys.items():
            cache.layers[idx] = _StepKeys(keys, values, buffers.length)
        masks: dict[str, Any] = {"linear_attention": None}
        if self.attention_layers:
            places = torch.arange(buffers.capacity, device=buffers.length.device)
            sees = ((places <= buffers.length) & (places >= buffers.starts[:, None]))[:, None, None]
            if self.config._attn_implementation == "eager":
                dtype = self.embedding.dtype
                sees = torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
            masks["full_attention"] = sees
        with self._experts(len(buffers.tokens)):
            logits = self.model(
                input_ids=buffers.tokens[:, None],
                attention_mask=masks,
                position_ids=buffers.positions,
                use_cache=True,
                return_dict=True,
                **{CACHE_NAME: cache},
            ).logits
        buffers.advance()
        return logits[:, -1]

    @contextlib.contextmanager
    def _experts(self, batch: int):
        """Within, experts are computed in a way that never waits for the device: each token's by a product of its own
        where that reads no more weights than there are, else grouped."""
        own = getattr(self.config, "_experts_implementation", None)
        if own is None or not hasattr(self.config, "num_experts_per_tok"):
            yield
            return
        few = batch * self.config.num_experts_per_tok <= self.config.num_local_experts
        grouped = not few and self.embedding.dtype == torch.bfloat16
        self.config._experts_implementation_internal = "grouped_mm" if grouped else "batched_mm"
        try:
            yield
        finally:
            self.config._experts_implementation_internal = own
