"""Configuration of the hybrid KDA language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


LAYER_TYPES = ("linear_attention", "full_attention")


@strict
class KDAConfig(PreTrainedConfig):
    r"""
    Configuration of [`KDAModel`] and [`KDAForCausalLM`]: a decoder whose token mixers are Kimi Delta Attention (KDA)
    layers, softmax attention layers, or any mix of both, each followed by a SwiGLU MLP.

    Args:
        vocab_size (`int`, defaults to 32000): size of the vocabulary.
        hidden_size (`int`, defaults to 2048): width of the residual stream.
        intermediate_size (`int`, defaults to 5632): width inside the MLP.
        num_hidden_layers (`int`, defaults to 24): number of decoder layers.
        layer_types (`list[str]`, *optional*): `"linear_attention"` (KDA) or `"full_attention"` for each layer. Default:
            every fourth layer is attention, the others are KDA, as in Kimi Linear.
        linear_num_heads (`int`, defaults to 16): query and key heads of a KDA layer.
        linear_num_value_heads (`int`, *optional*): value heads of a KDA layer, a multiple of `linear_num_heads`
            (grouped value attention). Default: `linear_num_heads`.
        linear_head_dim (`int`, defaults to 128): width K of a query or key head.
        linear_value_head_dim (`int`, *optional*): width V of a value head. Default: `linear_head_dim`.
        linear_conv_kernel_dim (`int`, defaults to 4): width of the causal depthwise convolution over q, k and v.
        linear_lower_bound (`float`, *optional*, defaults to -5.0): lower bound of the log-decay per token (the safe
            gate of Kimi K3 and GLM-5.3-Flash), in [-5, 0]. `None` selects the unbounded softplus gate of
            Kimi-Linear-48B.
        linear_decay_low_rank_dim (`int`, *optional*): width between the two projections of the forget gate. Default:
            `linear_head_dim`, as in Kimi Linear; flash-linear-attention has `linear_value_head_dim` there.
        linear_output_gate_bias (`bool`, defaults to `False`): bias in the second projection of the output gate, as
            flash-linear-attention's layers have it.
        allow_neg_eigval (`bool`, defaults to `False`): doubles β, so that the state's transition may have negative
            eigenvalues.
        num_attention_heads (`int`, defaults to 16): query heads of an attention layer.
        num_key_value_heads (`int`, *optional*): key and value heads of an attention layer. Default:
            `num_attention_heads`.
        head_dim (`int`, *optional*): width of an attention head. Default: `hidden_size // num_attention_heads`.
        attention_bias (`bool`, defaults to `False`): bias in the q, k and v projections of attention layers.
        attention_output_bias (`bool`, *optional*): bias in their output projection. Default: `attention_bias`, as in
            Llama; Qwen2 has one without the other.
        attention_dropout (`float`, defaults to 0.0): dropout of the attention weights in training.
        use_qk_norm (`bool`, defaults to `False`): RMSNorm on each query and key head, as in Qwen3.
        rope_parameters (`dict`, *optional*): RoPE of the attention layers, as anywhere in transformers. `None` means no
            position encoding (NoPE): the KDA layers carry the order, and the context has no fixed end.
        rms_norm_eps (`float`, defaults to 1e-6): epsilon of all RMSNorms.
        hidden_act (`str`, defaults to `"silu"`): activation of the MLP.
        tie_word_embeddings (`bool`, defaults to `False`): whether the output projection is the embedding.
        max_position_embeddings (`int`, defaults to 32768): context length that the RoPE is made for. Models without
            RoPE take longer prompts too.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        use_cache (`bool`, defaults to `True`): whether the model returns its cache.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has a wrong value or type; the message names the field.

    Example:

    ```python
    >>> from kda_hf import KDAConfig, KDAForCausalLM

    >>> config = KDAConfig(hidden_size=256, num_hidden_layers=4, linear_num_heads=2, num_attention_heads=2)
    >>> config.layer_types
    ['linear_attention', 'linear_attention', 'linear_attention', 'full_attention']
    >>> model = KDAForCausalLM(config)
    ```
    """

    model_type = "kda_hf"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    # The KDA core mixes all channels of a head through one state, and its convolutions are per channel: each rank keeps
    # it whole, and the projections around it, where the weights are, are split.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.linear_attn.q_proj": "colwise_gather_output",
        "layers.*.linear_attn.k_proj": "colwise_gather_output",
        "layers.*.linear_attn.v_proj": "colwise_gather_output",
        "layers.*.linear_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    layer_types: list[str] | None = None
    linear_num_heads: int = 16
    linear_num_value_heads: int | None = None
    linear_head_dim: int = 128
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int = 4
    linear_lower_bound: float | int | None = -5.0
    linear_decay_low_rank_dim: int | None = None
    linear_output_gate_bias: bool = False
    allow_neg_eigval: bool = False
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float | int = 0.0
    use_qk_norm: bool = False
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = [
                "full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(self.num_hidden_layers)
            ]
        if self.linear_num_value_heads is None:
            self.linear_num_value_heads = self.linear_num_heads
        if self.linear_value_head_dim is None:
            self.linear_value_head_dim = self.linear_head_dim
        if self.linear_decay_low_rank_dim is None:
            self.linear_decay_low_rank_dim = self.linear_head_dim
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        super().__post_init__(**kwargs)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Keeps `rope_parameters=None` as it is: here it means no position encoding, not the default one."""
        if self.rope_parameters is None and not kwargs.get("rope_scaling") and kwargs.get("rope_theta") is None:
            for key in ("rope_scaling", "rope_theta"):
                kwargs.pop(key, None)
            return kwargs
        return super().convert_rope_params_to_dict(**kwargs)

    def validate_architecture(self):
        """Checks that the fields fit together. Runs whenever a configuration is made."""
        super().validate_architecture()
        assert self.layer_types is not None and self.linear_num_value_heads is not None
        assert self.num_key_value_heads is not None
        positive = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "linear_num_heads",
            "linear_num_value_heads",
            "linear_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
            "linear_decay_low_rank_dim",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(f"`layer_types` entries must be in {LAYER_TYPES}, got {unknown}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must name one type for each of the `num_hidden_layers` ({self.num_hidden_layers}) "
                f"layers, got {len(self.layer_types)}"
            )
        if self.linear_num_value_heads % self.linear_num_heads:
            raise ValueError(
                f"`linear_num_value_heads` ({self.linear_num_value_heads}) must be a multiple of `linear_num_heads` "
                f"({self.linear_num_heads})"
            )
        if self.linear_lower_bound is not None and not -5.0 <= self.linear_lower_bound <= 0.0:
            raise ValueError(
                f"`linear_lower_bound` must be in [-5, 0], or None for the softplus gate, got {self.linear_lower_bound}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})"
            )
        if self.rms_norm_eps <= 0:
            raise ValueError(f"`rms_norm_eps` must be positive, got {self.rms_norm_eps}")


__all__ = ["KDAConfig"]
