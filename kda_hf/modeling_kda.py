"""The hybrid KDA language model: KDA layers, softmax attention layers, SwiGLU MLPs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import KDACache
from .configuration_kda import KDAConfig
from .decoding import active_program
from .generation import CACHE_NAME, KDAGenerationMixin, takes_cache
from .layer import KDALayer


class KDARMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension: one kernel on a GPU, in fp32 and rounded once."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class KDARMSNormGated(nn.Module):
    """RMSNorm over the last dimension, in fp32, times the sigmoid of a gate: `norm(x) · weight · sigmoid(gate)`."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        return (normed * gate.float().sigmoid()).to(x.dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class KimiDeltaAttention(KDALayer):
    """
    Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): short convolutions over q, k and v, a per-channel forget gate,
    the delta rule on a state of `[K, V]` per head, and a gated norm on the output.

    Parameters carry the names of the Kimi-Linear checkpoint. With K = `linear_head_dim`, V = `linear_value_head_dim`,
    H = `linear_num_heads`, HV = `linear_num_value_heads`: `A_log` is `[HV]`, `dt_bias` is `[HV·K]`.

    Args:
        config (`KDAConfig`): the configuration.
        layer_idx (`int`): the layer's index, which is also its place in the cache.
    """

    def __init__(self, config: KDAConfig, layer_idx: int):
        super().__init__()
        # KDAConfig has filled in what was left out
        assert config.linear_num_value_heads is not None and config.linear_value_head_dim is not None
        assert config.linear_decay_low_rank_dim is not None
        self.layer_idx = layer_idx
        self.num_heads = config.linear_num_heads
        self.num_value_heads = config.linear_num_value_heads
        self.head_dim = config.linear_head_dim
        self.value_head_dim = config.linear_value_head_dim
        self.conv_kernel_size = config.linear_conv_kernel_dim
        self.lower_bound = config.linear_lower_bound
        self.allow_neg_eigval = config.allow_neg_eigval
        self.norm_eps = config.rms_norm_eps

        key_dim = self.num_heads * self.head_dim
        value_dim = self.num_value_heads * self.value_head_dim
        gate_dim = self.num_value_heads * self.head_dim

        self.q_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_dim, bias=False)
        self.q_conv1d = self._conv1d(key_dim)
        self.k_conv1d = self._conv1d(key_dim)
        self.v_conv1d = self._conv1d(value_dim)

        self.f_a_proj = nn.Linear(config.hidden_size, config.linear_decay_low_rank_dim, bias=False)
        self.f_b_proj = nn.Linear(config.linear_decay_low_rank_dim, gate_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(gate_dim))
        self.b_proj = nn.Linear(config.hidden_size, self.num_value_heads, bias=False)

        self.g_a_proj = nn.Linear(config.hidden_size, self.value_head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.value_head_dim, value_dim, bias=config.linear_output_gate_bias)
        self.o_norm = KDARMSNormGated(self.value_head_dim, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(value_dim, config.hidden_size, bias=False)

        # Kimi-Linear stores A_log as [1, 1, HV, 1]
        self.register_load_state_dict_pre_hook(_flatten_a_log)

    def _conv1d(self, channels: int) -> nn.Conv1d:
        width = self.conv_kernel_size
        return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=False)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `[B, T, hidden_size]`): the input.
            attention_mask (`torch.Tensor` of shape `[B, ≥ T]`, *optional*): nonzero for tokens, zero for padding; its
                last T columns are those of this input. Padding may stand anywhere; it leaves no trace in the state and
                its outputs are zero.
            past_key_values (`Cache`, *optional*): continues from, and updates, its layer `layer_idx`.
            cu_seqlens (`torch.Tensor` of shape `[N + 1]`, int32 or int64, *optional*): boundaries of the sequences
                packed into a batch of one. The cache, if any, then holds a row for each of the N sequences.

        Returns:
            `torch.Tensor` of shape `[B, T, hidden_size]`.

        Raises:
            ValueError: `attention_mask` is not two-dimensional, too short, or comes together with `cu_seqlens`.
        """
        return self.attend(hidden_states, attention_mask, past_key_values, cu_seqlens)

    def decay_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.f_b_proj(self.f_a_proj(hidden_states))

    def output_gate_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.g_b_proj(self.g_a_proj(hidden_states))

    def conv_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q_conv1d.weight.squeeze(1), self.k_conv1d.weight.squeeze(1), self.v_conv1d.weight.squeeze(1)

    def gate_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.A_log, self.dt_bias


def _flatten_a_log(module, state_dict, prefix, *args):
    if (a_log := state_dict.get(f"{prefix}A_log")) is not None:
        state_dict[f"{prefix}A_log"] = a_log.reshape(-1)


class KDAAttention(nn.Module):
    """Causal softmax attention with grouped heads; RoPE, bias and the norm of queries and keys are by choice."""

    def __init__(self, config: KDAConfig, layer_idx: int):
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        query_dim = config.num_attention_heads * self.head_dim
        key_dim = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=bool(config.attention_output_bias))
        self.q_norm = KDARMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = KDARMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)
        key_states = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        if position_embeddings is not None:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
        output, weights = self.attend(query_states, key_states, value_states, attention_mask, **kwargs)
        return self.o_proj(output.flatten(-2)), weights

    def attend(
        self,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What happens between the projections, by the implementation that the configuration names.

        Args:
            query_states (`torch.Tensor` of shape `[B, H, T, head_dim]`): with norm and RoPE.
            key_states, value_states (`torch.Tensor` of shape `[B, KVH, past + T, head_dim]`): with norm and RoPE.

        Returns:
            The output `[B, T, H, head_dim]`, and the weights, if the implementation has them.
        """
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )


class KDADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: KDAConfig, layer_idx: int):
        super().__init__()
        assert config.layer_types is not None
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "linear_attention":
            self.linear_attn = KimiDeltaAttention(config, layer_idx)
        else:
            self.self_attn = KDAAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = KDARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = KDARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.layer_type == "linear_attention":
            hidden_states = self.linear_attn(hidden_states, attention_mask, past_key_values, cu_seqlens)
        else:
            hidden_states, _ = self.self_attn(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class KDAPreTrainedModel(PreTrainedModel):
    config_class = KDAConfig
    config: KDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KDADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": KDADecoderLayer, "attentions": KDAAttention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As in transformers, but a checkpoint with missing or misshapen weights raises an error that names them: with
        random ones in their place the model would run, and be wrong.

        Raises:
            RuntimeError: weights of a KDA layer are missing, unless the caller gives a `state_dict` or asks for the
                list (`output_loading_info=True`); or any weight has another shape than the model's, unless
                `ignore_mismatched_sizes=True`.
        """
        with_info = kwargs.pop("output_loading_info", False)
        lenient = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded  # as `output_loading_info` asks for
        if info["mismatched_keys"] and not lenient:
            shapes = [f"{key} is {list(found)}, not {list(own)}" for key, found, own in sorted(info["mismatched_keys"])]
            raise RuntimeError(f"{pretrained_model_name_or_path} has weights of another shape: {'; '.join(shapes)}")
        missing = sorted(key for key in info["missing_keys"] if ".linear_attn." in key)
        if missing and not with_info and not lenient and kwargs.get("state_dict") is None:
            raise RuntimeError(f"{pretrained_model_name_or_path} lacks weights of KDA layers: {', '.join(missing)}")
        return (model, info) if with_info else model

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, KimiDeltaAttention):
            # As FLA and transformers initialise KDA: decays between 0.1% and 10% a token with the softplus gate; the
            # safe gate has A = 1, so that its sigmoid starts where it has a slope.
            if module.lower_bound is None:
                init.copy_(module.A_log, init.uniform_(module.A_log, a=1.0, b=16.0).log())
            else:
                init.zeros_(module.A_log)
            step = init.uniform_(module.dt_bias, a=math.log(1e-3), b=math.log(1e-1)).exp()
            init.copy_(module.dt_bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        elif isinstance(module, KDARMSNormGated):
            init.ones_(module.weight)


class KDAModel(KDAPreTrainedModel):
    """The decoder without its language modeling head: embeddings, layers, final norm."""

    def __init__(self, config: KDAConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([KDADecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = KDARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config) if config.rope_parameters else None
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `[B, T]`, *optional*): token ids; or give `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `[B, past + T]`, *optional*): nonzero for tokens, zero for padding,
                on the left or on the right. Or a dictionary of prepared masks by layer type, as `generate` makes it.
            position_ids (`torch.LongTensor` of shape `[B, T]`, *optional*): positions for RoPE.
            past_key_values (`Cache`, *optional*): a [`KDACache`], or any cache of transformers made for this
                configuration.
            inputs_embeds (`torch.FloatTensor` of shape `[B, T, hidden_size]`, *optional*): in place of `input_ids`.
            use_cache (`bool`, *optional*): whether to fill and return a cache. Packed inputs get none by default.
            cu_seqlens (`torch.Tensor` of shape `[N + 1]`, int32 or int64, *optional*): boundaries of the sequences
                packed into a batch of one. `cu_seq_lens_q`, as transformers' collators name it, does as well.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; or `cu_seqlens` with a batch other than one,
                with `attention_mask`, or with a cache of attention layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        has_attention = "full_attention" in (self.config.layer_types or ())

        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"`cu_seqlens` needs a batch of one row, got {batch}")
            if attention_mask is not None:
                raise ValueError("`attention_mask` can't be combined with `cu_seqlens`: packed inputs have no padding")
            if past_key_values is not None and has_attention:
                raise ValueError(
                    "`cu_seqlens` can't be combined with `past_key_values` in a model with attention layers"
                )
            use_cache = use_cache and not has_attention
            if position_ids is None:
                position_ids = _packed_position_ids(cu_seqlens, length)

        if use_cache and past_key_values is None:
            past_key_values = KDACache(self.config)
        masks, position_ids, position_embeddings = self.masks_and_positions(
            inputs_embeds, attention_mask, position_ids, past_key_values
        )
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer.layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                cu_seqlens=cu_seqlens,
                **{CACHE_NAME: past_key_values},  # gradient checkpointing takes it away by this name
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: past_key_values if use_cache else None},
        )

    def masks_and_positions(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[dict[str, Any], torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """The mask of each type of layers there is, the positions, and what RoPE makes of them; see `forward`."""
        has_attention = "full_attention" in (self.config.layer_types or ())
        if position_ids is None and has_attention:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            length = inputs_embeds.shape[1]
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)
        masks = attention_mask
        if not isinstance(masks, dict):
            mask_kwargs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                CACHE_NAME: past_key_values,
                "position_ids": position_ids,
            }
            masks = {"linear_attention": create_recurrent_attention_mask(**mask_kwargs)}
            if has_attention:
                masks["full_attention"] = create_causal_mask(**mask_kwargs)
        position_embeddings = None
        if self.rotary_emb is not None and has_attention:
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        return masks, position_ids, position_embeddings


def _packed_position_ids(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Positions `[1, length]` that start at zero in each packed sequence, without reading `cu_seqlens` on the host."""
    positions = torch.arange(length, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    sequence = torch.searchsorted(starts, positions, right=True) - 1
    return (positions - starts[sequence]).unsqueeze(0)


class KDAForCausalLM(KDAPreTrainedModel, KDAGenerationMixin):
    """[`KDAModel`] with a language modeling head; what `AutoModelForCausalLM` loads for `model_type: kda_hf`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: KDAConfig):
        super().__init__(config)
        self.model = KDAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `[B, T]`, *optional*): targets of the loss, shifted inside; -100 is
                ignored.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): how many of the last positions get logits (0: all),
                or their indices.

        The other arguments are those of [`KDAModel`].
        """
        others: Any = (inputs_embeds, labels, cu_seqlens)
        cache: Any = past_key_values
        if not kwargs and use_cache is not False and all(x is None for x in others):
            program = active_program(self, input_ids, cache)
            logits = None if program is None else program(input_ids, attention_mask, position_ids, cache)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["KDAForCausalLM", "KDAModel", "KDAPreTrainedModel", "KimiDeltaAttention"]
