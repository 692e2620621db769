"""The token recurrence for decoding in plain PyTorch: few calls a token."""

import torch


def recurrent_kda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recurrence over activated inputs: scaled q, k, log-decay g [B,T,HV,K], v [B,T,HV,V], beta [B,T,HV], one dtype.

    `state` is [B,HV,K,V] of that dtype, any strides. Returns o [B,T,HV,V] and the state after the last token. Not
    differentiable: the state is updated in place, after the first product has made it ours.
    """
    (batch, tokens, heads, K), V = k.shape, v.shape[-1]

    def rows(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B,T,HV,D] → T tensors [B * HV, 1, D]"""
        return x.transpose(1, 2).reshape(batch * heads, tokens, 1, x.shape[-1]).unbind(1)

    per_token = (rows(x) for x in (q, k, v, g.exp(), beta.unsqueeze(-1)))
    state = state.flatten(0, 1)
    outputs = []
    for query, key, value, decay, b in zip(*per_token, strict=True):
        state = state * decay.mT
        u = torch.baddbmm(value, key, state, alpha=-1).mul_(b)
        state.addcmul_(key.mT, u)
        outputs.append(torch.bmm(query, state))
    o = torch.cat(outputs, 1).view(batch, heads, tokens, V).transpose(1, 2)
    return o, state.view(batch, heads, K, V)
