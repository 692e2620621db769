"""Attention whose keys are wider than its values, as MLA has them, by flash attention, which wants both of one width.

transformers pads values for FlashAttention 2. With "sdpa" it does not, and PyTorch then takes a slower kernel.
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


NAME = "kda_hf_wide_keys"
HALVES, WIDEST = (torch.bfloat16, torch.float16), 256  # that PyTorch's flash attention takes


def wide_key_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    transformers' "sdpa". Prefill on a GPU, in half precision and without a mask, has the values padded with zeros to
    the width of the keys, and what they give cut off.

    Args:
        query (`torch.Tensor` of shape `[B, H, T, D]`), key (`torch.Tensor` of shape `[B, KVH, S, D]`).
        value (`torch.Tensor` of shape `[B, KVH, S, DV]`).

    Returns:
        `torch.Tensor` of shape `[B, T, H, DV]`, and None.
    """
    width, spare = value.shape[-1], key.shape[-1] - value.shape[-1]
    fits = key.is_cuda and key.dtype in HALVES and attention_mask is None and key.shape[-1] <= WIDEST
    if not fits or spare <= 0 or query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    value = nn.functional.pad(value, (0, spare))
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output[..., :width], None


ALL_ATTENTION_FUNCTIONS.register(NAME, wide_key_attention)


class _AttentionConfig:
    """A configuration as a layer is to see it: with another name for "sdpa"."""

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    @property
    def _attn_implementation(self) -> str:
        own: str = self._config._attn_implementation
        return NAME if own == "sdpa" else own


class WideKeyAttention(nn.Module):
    """An attention layer of transformers that finds its function by its configuration, on [`wide_key_attention`]."""

    @property
    def config(self) -> Any:
        return _AttentionConfig(vars(self)["config"])
