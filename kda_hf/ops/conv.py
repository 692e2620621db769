"""Causal depthwise convolution over tokens in plain PyTorch."""

import torch
import torch.nn.functional as F

from .reference import compute_dtype


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    activation: str | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = activation(bias + Σ_w weight[:, w] x_{t - W + 1 + w}) for x [B,T,D], weight [D,W].

    Inputs before the first token come from `initial_state` [N,D,W], else they are zeros. Returns y [B,T,D] and the last
    W inputs of each sequence [N,D,W], oldest first, both in the compute dtype.
    """
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    (batch, tokens, channels), width = x.shape, weight.shape[1]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    history = x.new_zeros(sequences, channels, width) if initial_state is None else initial_state.to(dtype)

    if cu_seqlens is not None:
        y, final_state = _packed(x[0], weight, history, cu_seqlens.long())
    elif tokens == 1:
        final_state = torch.cat((history[..., 1:], x.mT), -1)
        y = (final_state * weight).sum(-1).unsqueeze(1)
    else:
        inputs = torch.cat((history.mT, x), 1)
        y = _taps([inputs[:, 1 + tap : 1 + tap + tokens] for tap in range(width)], weight)
        final_state = inputs[:, tokens:].mT
    if bias is not None:
        y = y + bias.to(dtype)
    y = y if activation is None else F.silu(y)
    if cu_seqlens is not None:
        y = y.masked_fill((torch.arange(tokens, device=x.device) >= cu_seqlens[-1]).unsqueeze(-1), 0)
    return y, final_state


def _taps(inputs: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    y = inputs[0] * weight[:, 0]
    for tap in range(1, len(inputs)):
        y = torch.addcmul(y, inputs[tap], weight[:, tap])
    return y


def _packed(
    x: torch.Tensor, weight: torch.Tensor, history: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed sequences, x [T,D]: every input is a row of one table, first the histories and then the tokens."""
    (tokens, channels), (sequences, _, width) = x.shape, history.shape
    table = torch.cat((history.mT.reshape(-1, channels), x))

    def gather(sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Input at `position` of its sequence; -1 is the newest of its history."""
        in_history = sequence * width + width + position
        in_tokens = sequences * width + cu_seqlens[sequence] + position
        row = torch.where(position < 0, in_history, in_tokens).clamp(0, max(len(table) - 1, 0))
        return table.index_select(0, row.flatten()).unflatten(0, row.shape)

    token = torch.arange(tokens, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True).clamp(max=max(sequences - 1, 0))
    position = token - cu_seqlens[sequence]
    y = _taps([gather(sequence, position - (width - 1 - tap)) for tap in range(width)], weight)

    lengths = cu_seqlens.diff()
    newest = lengths.unsqueeze(-1) - width + torch.arange(width, device=x.device)
    owner = torch.arange(sequences, device=x.device).unsqueeze(-1).expand_as(newest)
    return y.unsqueeze(0), gather(owner, newest).mT
