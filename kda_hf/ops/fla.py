"""FLA's Triton kernels (`fla.ops.kda`) behind our arguments."""

from collections.abc import Iterator
from contextlib import contextmanager
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
_fixed_shapes: ContextVar[bool] = ContextVar("fixed_shapes", default=False)
CHUNK = 64  # tokens of a block of FLA's convolution


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Within, packed calls do nothing that depends on what `cu_seqlens` holds, so that a CUDA graph can capture them:
    FLA plans for as many blocks as there can be, where it would read the lengths on the host."""
    token = _fixed_shapes.set(True)
    try:
        yield
    finally:
        _fixed_shapes.reset(token)


def has_fixed_shapes() -> bool:
    return _fixed_shapes.get()


class _DefinedGradients(torch.autograd.Function):
    """Tensors `[1, T, ...]` as they are, whose gradients are zeros where `is_past`: FLA leaves them undefined there."""

    @staticmethod
    def forward(ctx, is_past, *tensors):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(is_past)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        (is_past,) = ctx.saved_tensors
        return None, *(None if x is None else zeroed(x, is_past) for x in gradients)


def defined_gradients(is_past: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _DefinedGradients.apply(is_past, *tensors)  # type: ignore[no-untyped-call, no-any-return]


def zeroed(x: torch.Tensor, is_past: torch.Tensor) -> torch.Tensor:
    """x `[1, T, ...]` with zeros where `is_past` `[T]`."""
    return x.masked_fill(is_past.view(-1, *[1] * (x.ndim - 2)), 0)


def _past(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Which tokens of x `[1, T, ...]` are behind the last sequence."""
    return torch.arange(x.shape[1], device=x.device) >= cu_seqlens[-1]


def _blocks(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sequence and place in it of each block of FLA's convolution, as many as there can be. Those too many are of the
    last sequence, and behind its end."""
    sequences = len(cu_seqlens) - 1
    counts = (cu_seqlens.diff() + CHUNK - 1).div(CHUNK, rounding_mode="floor")
    ends = counts.cumsum(0)
    most = (tokens + CHUNK - 1) // CHUNK
    block = torch.arange(most + sequences - 1, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, block, right=True).clamp(max=sequences - 1)
    place = block - (ends - counts)[sequence]
    return torch.stack((sequence, torch.where(block < ends[-1], place, most)), 1).to(cu_seqlens.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    from fla.modules.causal_conv1d import causal_conv1d as convolve

    if cu_seqlens is None:
        return convolve(x, weight, bias, activation=activation)[0]
    is_past = _past(x, cu_seqlens)
    (x,) = defined_gradients(is_past, x)
    options = {"chunk_indices": _blocks(cu_seqlens, x.shape[1])} if has_fixed_shapes() else {}
    y, _ = convolve(x, weight, bias, activation=activation, cu_seqlens=cu_seqlens, **options)
    return zeroed(y, is_past)


def kda(
    op: str,
    x: KDAInputs,
    cu_seqlens_cpu: torch.Tensor | None,
    safe_gate: bool,
    output_final_state: bool,
    requires_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    inputs = x[:5]
    if x.cu_seqlens is not None:
        is_past = _past(x.q, x.cu_seqlens)
        if requires_grad:
            inputs = defined_gradients(is_past, *inputs)
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
            o, final_state = fused_recurrent_kda(*inputs, **options)
        else:  # FLA's token recurrence has no backward
            safe_gate = safe_gate and x.lower_bound != 0  # FLA excludes a bound of 0
            if x.cu_seqlens is not None and has_fixed_shapes():
                options["use_graph"] = True
            o, final_state = chunk_kda(*inputs, safe_gate=safe_gate, cu_seqlens_cpu=cu_seqlens_cpu, **options)
    finally:
        is_calling.reset(token)
    # FLA leaves what follows the last sequence undefined
    return o if x.cu_seqlens is None else zeroed(o, is_past), final_state
