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
    """Packed sequences, x [T,D]: one convolution over all of them, and those tokens once more that reach beyond their
    sequence."""
    (tokens, channels), (sequences, _, width) = x.shape, history.shape
    inputs = torch.cat((x.new_zeros(width - 1, channels), x, x.new_zeros(1, channels)))
    y = _taps([inputs[tap : tap + tokens + 1] for tap in range(width)], weight)

    # Every input is a row of one table, first the histories and then the tokens.
    table = torch.cat((history.mT.reshape(-1, channels), x))

    def gather(sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Input at `position` of its sequence; -1 is the newest of its history."""
        in_history = sequence * width + width + position
        in_tokens = sequences * width + cu_seqlens[sequence] + position
        row = torch.where(position < 0, in_history, in_tokens).clamp(0, max(len(table) - 1, 0))
        return table.index_select(0, row.flatten()).unflatten(0, row.shape)

    lengths = cu_seqlens.diff().unsqueeze(-1)
    position = torch.arange(width - 1, device=x.device).expand(sequences, -1)
    owner = torch.arange(sequences, device=x.device).unsqueeze(-1)
    first = _taps([gather(owner, position - (width - 1 - tap)) for tap in range(width)], weight)
    # What a short sequence has no token for goes to the row past the last.
    row = torch.where(position < lengths, cu_seqlens[:-1].unsqueeze(-1) + position, tokens).clamp(0, tokens)
    y = y.index_copy(0, row.flatten(), first.flatten(0, 1))[:tokens]

    newest = lengths - width + torch.arange(width, device=x.device)
    return y.unsqueeze(0), gather(owner, newest).mT
