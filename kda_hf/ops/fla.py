"""FLA's Triton kernels (`fla.ops.kda`) behind our arguments."""

from importlib import metadata

import torch


def _installed_version() -> tuple[int, ...] | None:
    try:
        version = metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


VERSION = _installed_version()


def kda(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_v_first: bool,
    scale: float,
    lower_bound: float | None,
    use_gate: bool,
    use_qk_norm: bool,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
    cu_seqlens_cpu: torch.Tensor | None,
    safe_gate: bool,
    output_final_state: bool,
    requires_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    if use_gate and A_log is None and lower_bound is None:
        A_log = torch.zeros(v.shape[2], dtype=torch.float32, device=v.device)  # FLA's softplus gate needs one
    options = {
        "A_log": A_log if use_gate else None,
        "dt_bias": dt_bias.flatten() if use_gate and dt_bias is not None else None,
        "lower_bound": lower_bound if use_gate else None,
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_norm,
        "use_gate_in_kernel": use_gate,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid,
        "allow_neg_eigval": allow_neg_eigval,
        "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens,
    }
    if op == "recurrent_kda" and not requires_grad:
        o, final_state = fused_recurrent_kda(q, k, v, g, beta, **options)
    else:  # FLA's token recurrence has no backward
        safe_gate = safe_gate and lower_bound != 0  # FLA excludes a bound of 0
        o, final_state = chunk_kda(q, k, v, g, beta, safe_gate=safe_gate, cu_seqlens_cpu=cu_seqlens_cpu, **options)
    if cu_seqlens is not None:  # FLA leaves what follows the last sequence undefined
        is_past = torch.arange(q.shape[1], device=q.device) >= cu_seqlens[-1]
        o = o.masked_fill(is_past[:, None, None], 0)
    return o, final_state
