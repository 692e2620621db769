"""The token recurrence for decoding in plain PyTorch: few calls a token."""

import torch


def recurrent_kda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recurrence over activated inputs: scaled q, k, log-decay g [B,T,HV,K], v [B,T,HV,V], beta [B,T,HV], one dtype.

    `state` is [B,HV,K,V] of that dtype, any strides. Returns o [B,T,HV,V] and the state after the last token. Not
    differentiable: the state is updated in place, after the first product has made it ours.
    """
    rows = (x.transpose(1, 2).split(1, 2) for x in (q, k, v, g.exp(), beta.unsqueeze(-1)))  # each [B,HV,1,D]
    outputs = []
    for query, key, value, decay, b in zip(*rows, strict=True):
        state = state * decay.mT
        u = (value - key @ state).mul_(b)
        state.addcmul_(key.mT, u)
        outputs.append(query @ state)
    return torch.cat(outputs, 2).transpose(1, 2), state
