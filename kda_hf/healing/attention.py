"""Softmax attention among the documents of a packed row, for any model of transformers."""

import inspect
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops.fla import defined_gradients, zeroed
from .data import FixedRow, PackedRow


NAME = "kda_hf_packed"
HALVES, VARLEN_HEADS = (torch.bfloat16, torch.float16), range(8, 257, 8)
# Its arguments still change from one version of torch to the next
VARLEN_FITS = "window_size" in inspect.signature(varlen_attn).parameters


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_row: PackedRow,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Causal attention within each document of a row. In half precision on a GPU it is one call; elsewhere, one for the
    documents of each length, without a mask: work and memory are those of the documents alone, where a mask over the
    row would cost its length squared.

    Args:
        query (`torch.Tensor` of shape `[1, H, T, D]`), key, value (`torch.Tensor` of shape `[1, KVH, T, D]`).
        packed_row: the row that the model got; models pass it on from the arguments of their forward.

    Returns:
        `torch.Tensor` of shape `[1, T, H, D]`, and None, as transformers expects.
    """
    lengths, device = packed_row.lengths, query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings leave them in fp32
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if VARLEN_FITS and query.is_cuda and query.dtype in HALVES and not dropout and query.shape[-1] in VARLEN_HEADS:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        tensors = tuple(x.transpose(1, 2).to(query.dtype) for x in (query, key, value))
        cu_seqlens, longest = packed_row.cu_seqlens.int(), max(lengths)
        if isinstance(packed_row, FixedRow):  # what is behind the documents is undefined, forward and backward
            longest, is_past = packed_row.max_length, ~packed_row.valid
            tensors = defined_gradients(is_past, *tensors)
        q, k, v = (x[0] for x in tensors)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)  # keys before a token's own, and after it
        output = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=window)[None]
        return zeroed(output, is_past) if isinstance(packed_row, FixedRow) else output, None

    documents = [x.split(lengths, dim=2) for x in (query, key, value)]
    outputs: list[Any] = [None] * len(lengths)
    for length in dict.fromkeys(lengths):
        same = [i for i, other in enumerate(lengths) if other == length]
        q, k, v = (torch.cat([each[i] for i in same]) for each in documents)
        mask = None
        if sliding_window is not None and sliding_window < length:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = (distance >= 0) & (distance < sliding_window)
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None, enable_gqa=True
        )
        for i, document in zip(same, output.transpose(1, 2).split(1), strict=True):
            outputs[i] = document
    return torch.cat(outputs, dim=1), None


@contextmanager
def packs_rows(*models: PreTrainedModel):
    """Within, the attention layers of these models are `packed_attention`."""
    # Without a mask function of this name transformers makes no mask
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


def last_hidden_state(model: PreTrainedModel, row: PackedRow) -> torch.Tensor:
    """What the language modeling head gets, `[1, T, hidden_size]`; inside of `packs_rows`."""
    return model.get_decoder()(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        cu_seqlens=row.cu_seqlens,
        packed_row=row,
        use_cache=False,
    ).last_hidden_state
