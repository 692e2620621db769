"""Kimi Delta Attention as a token recurrence in plain PyTorch: the specification.

Every formula of the operator is written here once. The other implementations reuse the activations below and are tested
against :func:`kda_reference`, which runs in any floating dtype up to float64. Source: Kimi Linear, arXiv 2510.26692.
"""

import torch
import torch.nn.functional as F


NORM_EPS = 1e-6
INTERMEDIATE_STRIDE = 64  # tokens between two returned intermediate states, as in FLA


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(Σ x² + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def log_decay(
    g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float | None
) -> torch.Tensor:
    """Log-decay [..., HV, K] from gate logits: the bounded ("safe") gate if there is a bound, else softplus."""
    if dt_bias is not None:
        g = g + dt_bias.to(g.dtype).reshape(g.shape[-2:])
    rate = 1.0 if A_log is None else A_log.to(g.dtype).exp().reshape(-1, 1)
    if lower_bound is None:
        return -rate * F.softplus(g, threshold=40)  # exact in float64; the default of 20, where it turns linear, is not
    return lower_bound * torch.sigmoid(rate * g)


def activate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    scale: float,
    lower_bound: float | None,
    use_gate: bool,
    use_qk_norm: bool,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the operator may fuse: returns scaled q, k, v, log-decay and β in the compute dtype, all with HV heads."""
    dtype = compute_dtype(q)
    q, k, v, g, beta = q.to(dtype), k.to(dtype), v.to(dtype), g.to(dtype), beta.to(dtype)
    if use_qk_norm:
        q, k = l2norm(q), l2norm(k)
    if use_gate:
        g = log_decay(g, A_log, dt_bias, lower_bound)
    if use_beta_sigmoid:
        beta = torch.sigmoid(beta)
        if allow_neg_eigval:
            beta = 2 * beta
    group = v.shape[2] // k.shape[2]
    if group > 1:  # value head h reads query/key head h // group
        q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    return q * scale, k, v, g, beta


def kda_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    lower_bound: float | None = None,
    use_gate: bool = False,
    use_qk_norm: bool = False,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The recurrence of arXiv 2510.26692, for q, k [B,T,H,K], v [B,T,HV,V], g [B,T,HV,K], beta [B,T,HV]:

        S ← Diag(exp g_t) S,   u_t = β_t (v_t - Sᵀ k_t),   S ← S + k_t u_tᵀ,   o_t = scale · Sᵀ q_t

    Returns o [B,T,HV,V], the final state [N,HV,K,V] and the states before every 64th token of each sequence
    [B,NT,HV,K,V] ([V,K] with `state_v_first`), all in the compute dtype. Tokens past `cu_seqlens[-1]` give zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    flags = (scale, lower_bound, use_gate, use_qk_norm, use_beta_sigmoid, allow_neg_eigval)
    q, k, v, g, beta = activate(q, k, v, g, beta, A_log, dt_bias, *flags)
    (batch, tokens, heads, K), V = k.shape, v.shape[-1]

    if cu_seqlens is None:
        segments = [(b, 0, tokens) for b in range(batch)]
    else:
        segments = [
            (0, start, end) for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        ]

    output = [[v.new_zeros(heads, V)] * tokens for _ in range(batch)]
    final, intermediate = [], []
    for n, (b, start, end) in enumerate(segments):
        state = k.new_zeros(heads, K, V)
        if initial_state is not None:
            state = (initial_state[n].mT if state_v_first else initial_state[n]).to(k.dtype)
        for t in range(start, end):
            if (t - start) % INTERMEDIATE_STRIDE == 0:
                intermediate.append(state)
            state = state * g[b, t].exp().unsqueeze(-1)
            u = beta[b, t].unsqueeze(-1) * (v[b, t] - torch.einsum("hkv,hk->hv", state, k[b, t]))
            state = state + torch.einsum("hk,hv->hkv", k[b, t], u)
            output[b][t] = torch.einsum("hkv,hk->hv", state, q[b, t])
        final.append(state)

    def stack(states: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(states) if states else k.new_zeros(0, heads, K, V)
        return stacked.mT if state_v_first else stacked

    h = stack(intermediate)
    o = torch.stack([torch.stack(rows) for rows in output]) if batch * tokens else torch.zeros_like(v)
    return o, stack(final), h.unflatten(0, (batch, -1)) if batch and len(h) else h.new_zeros(batch, 0, *h.shape[1:])
