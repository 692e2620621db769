"""The token recurrence for decoding in plain PyTorch, and a layer's step around it: few calls a token."""

import torch
import torch.nn.functional as F

from .reference import compute_dtype, l2norm, log_decay


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
        outputs.append(_write_and_read(query, key, value, b, state))
    o = torch.cat(outputs, 1).view(batch, heads, tokens, V).transpose(1, 2)
    return o, state.view(batch, heads, K, V)


def _write_and_read(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """The delta rule on a decayed state [N,K,V], in place, for rows [N,1,D]; returns o [N,1,V]."""
    u = torch.baddbmm(value, key, state, alpha=-1).mul_(beta)
    state.addcmul_(key.mT, u)
    return torch.bmm(query, state)


def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    output_gate: torch.Tensor,
    scale: float,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    recurrent_state: torch.Tensor,
    conv_state: torch.Tensor,
    q_conv_weight: torch.Tensor,
    k_conv_weight: torch.Tensor,
    v_conv_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    allow_neg_eigval: bool,
    state_v_first: bool,
) -> torch.Tensor:
    """`ops.kda_decode_step` without state indices, both states in place: computed as the operators do one by one."""
    dtype = compute_dtype(q)
    (batch, _, heads, K), (value_heads, V) = q.shape, v.shape[2:]
    rows = batch * value_heads

    inputs = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), -1).to(dtype)
    window = torch.cat((conv_state[..., 1:].to(dtype), inputs.unsqueeze(-1)), -1)
    weight = torch.cat((q_conv_weight, k_conv_weight, v_conv_weight)).to(dtype)
    mixed = F.silu((window * weight).sum(-1)).to(q.dtype).to(dtype)
    conv_state.copy_(window)

    key_dim = 2 * heads * K
    normed = l2norm(mixed[:, :key_dim].view(batch, 2, heads, K))
    if value_heads > heads:  # value head h reads query/key head h // group
        normed = normed.repeat_interleave(value_heads // heads, 2)
    query, key = (x.reshape(rows, 1, K) for x in normed.unbind(1))
    decay = log_decay(g.to(dtype), A_log, dt_bias, lower_bound).exp()
    b = torch.sigmoid(beta.to(dtype)).view(rows, 1, 1)
    b = 2 * b if allow_neg_eigval else b

    stored = recurrent_state.mT if state_v_first else recurrent_state
    state = stored.to(dtype).flatten(0, 1)
    state.mul_(decay.view(rows, K, 1))
    o = _write_and_read(query * scale, key, mixed[:, key_dim:].reshape(rows, 1, V), b, state)
    if state.data_ptr() != recurrent_state.data_ptr():  # a copy: of another dtype, or strides that don't flatten
        stored.copy_(state.view(stored.shape))

    o = o.view(batch, 1, value_heads, V).to(v.dtype).to(dtype)
    normed = F.rms_norm(o, (V,), norm_weight.to(dtype), norm_eps)
    return (normed * output_gate.to(dtype).sigmoid()).to(v.dtype)
