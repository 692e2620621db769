"""The token recurrence for decoding in plain PyTorch: few calls a token, the state read and written once."""

import torch


def recurrent_kda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recurrence over activated inputs: scaled q, k, log-decay g [B,T,HV,K], v [B,T,HV,V], beta [B,T,HV], one dtype.

    `state` is [B,HV,K,V] of that dtype, any strides. Returns o [B,T,HV,V] and the state after the last token.

    With S' = Diag(α) S the output is q S' + (q·k) u, so k S' and q S' come from one pass over S before it changes.
    """
    batch, tokens, heads, K = k.shape
    decay = g.exp()
    beta = beta.unsqueeze(-1)
    queries = torch.stack((k, q), 3) * decay.unsqueeze(3)  # [B,T,HV,2,K]
    overlap = (q * k).sum(-1, keepdim=True)
    k, decay = k.unsqueeze(-1), decay.unsqueeze(-1)
    output = torch.empty_like(v)
    for t in range(tokens):
        recalled, read = torch.matmul(queries[:, t], state).unbind(2)
        u = beta[:, t] * (v[:, t] - recalled)
        output[:, t] = torch.addcmul(read, overlap[:, t], u)
        state = torch.addcmul(state * decay[:, t], k[:, t], u.unsqueeze(2))
    return output, state
