"""FLA's Triton kernels (`fla.ops.kda`) behind our arguments."""

from contextvars import ContextVar
from importlib import metadata

import torch

from .inputs import KDAInputs


def _installed_version() -> tuple[int, ...] | None:
    try:
        version = metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


VERSION = _installed_version()
is_calling: ContextVar[bool] = ContextVar("is_calling", default=False)  # for integrations/fla.py: FLA is not to ask us


def kda(
    op: str,
    x: KDAInputs,
    cu_seqlens_cpu: torch.Tensor | None,
    safe_gate: bool,
    output_final_state: bool,
    requires_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    A_log, dt_bias = x.A_log, x.dt_bias
    if x.use_gate and A_log is None and x.lower_bound is None:
        A_log = torch.zeros(x.v.shape[2], dtype=torch.float32, device=x.v.device)  # FLA's softplus gate needs one
    options = {
        "A_log": A_log if x.use_gate else None,
        "dt_bias": dt_bias.flatten() if x.use_gate and dt_bias is not None else None,
        "lower_bound": x.lower_bound if x.use_gate else None,
        "scale": x.scale,
        "initial_state": x.initial_state,
        "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": x.use_qk_norm,
        "use_gate_in_kernel": x.use_gate,
        "use_beta_sigmoid_in_kernel": x.use_beta_sigmoid,
        "allow_neg_eigval": x.allow_neg_eigval,
        "state_v_first": x.state_v_first,
        "cu_seqlens": x.cu_seqlens,
    }
    token = is_calling.set(True)
    try:
        if op == "recurrent_kda" and not requires_grad:
            o, final_state = fused_recurrent_kda(*x[:5], **options)
        else:  # FLA's token recurrence has no backward
            safe_gate = safe_gate and x.lower_bound != 0  # FLA excludes a bound of 0
            o, final_state = chunk_kda(*x[:5], safe_gate=safe_gate, cu_seqlens_cpu=cu_seqlens_cpu, **options)
    finally:
        is_calling.reset(token)
    if x.cu_seqlens is not None:  # FLA leaves what follows the last sequence undefined
        is_past = torch.arange(x.q.shape[1], device=x.q.device) >= x.cu_seqlens[-1]
        o = o.masked_fill(is_past[:, None, None], 0)
    return o, final_state
