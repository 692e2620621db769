"""Validation of the operators' arguments: each message names the argument, what it got and what it wants."""

import os
from typing import Any

import torch

from .inputs import KDAInputs


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def is_tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")


def tensor(
    name: str,
    x: Any,
    layout: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """A tensor of this shape, `layout` being its names, on this device, of one of these dtypes."""
    is_tensor(name, x)
    if x.shape != shape:
        raise ValueError(f"`{name}` must have shape {layout} = {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"`{name}` must have dtype {_names(dtypes)}, got {_names((x.dtype,))}")
    if x.device != device:
        raise RuntimeError(f"`{name}` must be on {device} like the other tensors, got a tensor on {x.device}")


def values_are_readable(x: torch.Tensor, wait: bool = False) -> bool:
    """Whether the host can read the values, without waiting for a device unless told to; a traced tensor has none."""
    return (wait or x.device.type == "cpu") and type(x) is torch.Tensor and not torch.compiler.is_compiling()


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def rank(name: str, x: Any, layout: str) -> None:
    is_tensor(name, x)
    dims = layout.count(",") + 1
    if x.ndim != dims:
        raise ValueError(f"`{name}` must have shape {layout}, got {list(x.shape)}")


def number(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"`{name}` must be a number, got {type(x).__name__}")


def lower_bound(value: Any) -> None:
    if value is None:
        return
    number("lower_bound", value)
    if not -5 <= value <= 0:
        raise ValueError(f"`lower_bound` must be in [-5, 0], or None for the softplus gate, got {value}")


def cu_seqlens(value: Any, cpu_copy: Any, batch: int, tokens: int, device: torch.device) -> None:
    """Rank, dtype and device; and the values, where that does not make the host wait for the device."""
    if value is None:
        if cpu_copy is not None:
            raise ValueError("`cu_seqlens_cpu` needs `cu_seqlens`, got None")
        return
    is_tensor("cu_seqlens", value)
    if value.ndim != 1 or value.shape[0] < 2:
        raise ValueError(f"`cu_seqlens` must have shape [N + 1] with N ≥ 1, got {list(value.shape)}")
    tensor("cu_seqlens", value, "[N + 1]", value.shape, device, INTEGERS)
    if batch != 1:
        raise ValueError(f"`cu_seqlens` needs packed sequences, B = 1, got B = {batch}")
    if cpu_copy is not None:
        tensor("cu_seqlens_cpu", cpu_copy, "[N + 1]", value.shape, torch.device("cpu"), INTEGERS)
    for name, x in (("cu_seqlens", value), ("cu_seqlens_cpu", cpu_copy)):
        if x is not None and values_are_readable(x, wait=os.environ.get("KDA_HF_CHECK") == "1"):
            _cu_seqlens_values(name, x, tokens)


def _cu_seqlens_values(name: str, value: torch.Tensor, tokens: int) -> None:
    bounds = value.tolist()
    if bounds[0] != 0:
        raise ValueError(f"`{name}` must start at 0, got {bounds[0]}")
    for i, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if end < start:
            raise ValueError(f"`{name}` must not decrease, got {start} and then {end} at index {i + 1}")
    if bounds[-1] > tokens:
        raise ValueError(f"`{name}` must not exceed T = {tokens}, got {bounds[-1]}")


def default_scale(q: Any) -> float:
    """K ** -0.5"""
    rank("q", q, "[B, T, H, K]")
    if q.shape[-1] == 0:
        raise ValueError(f"`q` must have K ≥ 1, got {list(q.shape)}")
    return q.shape[-1] ** -0.5


def kda(x: KDAInputs, state_indices: Any = None, cu_seqlens_cpu: Any = None, safe_gate: bool = False) -> None:
    """The arguments that all KDA operators share; with `state_indices`, `initial_state` is a pool."""
    rank("q", x.q, "[B, T, H, K]")
    rank("v", x.v, "[B, T, HV, V]")
    batch, tokens, heads, K = x.q.shape
    value_heads, V = x.v.shape[2:]
    device = x.q.device
    tensor("q", x.q, "[B, T, H, K]", x.q.shape, device)
    tensor("k", x.k, "[B, T, H, K]", x.q.shape, device)
    tensor("v", x.v, "[B, T, HV, V]", (batch, tokens, value_heads, V), device)
    if heads == 0 or value_heads % heads:
        raise ValueError(f"`v` must have a multiple of the {heads} heads of `q`, got {value_heads} heads")
    tensor("g", x.g, "[B, T, HV, K]", (batch, tokens, value_heads, K), device)
    tensor("beta", x.beta, "[B, T, HV]", (batch, tokens, value_heads), device)
    if x.A_log is not None:
        tensor("A_log", x.A_log, "[HV]", (value_heads,), device)
    if x.dt_bias is not None:
        is_tensor("dt_bias", x.dt_bias)
        layout, shape = ("[HV * K]", (value_heads * K,)) if x.dt_bias.ndim == 1 else ("[HV, K]", (value_heads, K))
        tensor("dt_bias", x.dt_bias, layout, shape, device)
    number("scale", x.scale)
    lower_bound(x.lower_bound)
    if safe_gate and x.use_gate and x.lower_bound is None:
        raise ValueError("`lower_bound` must be in [-5, 0] with safe_gate=True and use_gate_in_kernel=True, got None")
    if x.allow_neg_eigval and not x.use_beta_sigmoid:
        raise ValueError("`allow_neg_eigval` needs use_beta_sigmoid_in_kernel=True, got False")
    cu_seqlens(x.cu_seqlens, cu_seqlens_cpu, batch, tokens, device)
    rows = x.sequences
    if state_indices is not None:
        tensor("state_indices", state_indices, "[N]", (rows,), device, INTEGERS)
        rank("initial_state", x.initial_state, "[P, HV, V, K]" if x.state_v_first else "[P, HV, K, V]")
        rows = x.initial_state.shape[0]  # type: ignore[union-attr] # rank() has refused None
    if x.initial_state is not None:
        state("initial_state", x.initial_state, rows, x.q, x.v, x.state_v_first)


def state(name: str, x: Any, rows: int, q: torch.Tensor, v: torch.Tensor, state_v_first: bool) -> None:
    value_heads, V, K = v.shape[2], v.shape[3], q.shape[3]
    layout, matrix = ("[N, HV, V, K]", (V, K)) if state_v_first else ("[N, HV, K, V]", (K, V))
    tensor(name, x, layout, (rows, value_heads, *matrix), q.device)


def decode_step(
    x: KDAInputs,
    output_gate: Any,
    conv_state: Any,
    conv_weights: tuple[Any, Any, Any],
    norm_weight: Any,
    norm_eps: Any,
    state_indices: Any,
) -> None:
    """The arguments of `kda_decode_step`, whose `recurrent_state` is the initial state of `x`."""
    rank("q", x.q, "[B, 1, H, K]")
    batch, tokens, heads, K = x.q.shape
    if tokens != 1:
        raise ValueError(f"`q` must have one token a sequence, [B, 1, H, K], got {list(x.q.shape)}")
    rank("recurrent_state", x.initial_state, "[P, HV, V, K]" if x.state_v_first else "[P, HV, K, V]")
    kda(x._replace(initial_state=None))
    value_heads, V = x.v.shape[2:]
    rows = x.initial_state.shape[0]  # type: ignore[union-attr] # rank() has refused None
    state("recurrent_state", x.initial_state, rows, x.q, x.v, x.state_v_first)
    if state_indices is not None:
        tensor("state_indices", state_indices, "[B]", (batch,), x.q.device, INTEGERS)
    elif rows != batch:
        raise ValueError(f"`recurrent_state` must have B = {batch} rows without `state_indices`, got {rows}")
    tensor("output_gate", output_gate, "[B, 1, HV, V]", x.v.shape, x.q.device)
    rank("q_conv_weight", conv_weights[0], "[H * K, W]")
    width = conv_weights[0].shape[1]
    if width == 0:
        raise ValueError(f"`q_conv_weight` must have at least one tap, got {list(conv_weights[0].shape)}")
    channels = (heads * K, heads * K, value_heads * V)
    names = (("q_conv_weight", "[H * K, W]"), ("k_conv_weight", "[H * K, W]"), ("v_conv_weight", "[HV * V, W]"))
    for (name, layout), weight, count in zip(names, conv_weights, channels, strict=True):
        tensor(name, weight, layout, (count, width), x.q.device)
    tensor("conv_state", conv_state, "[P, 2 * H * K + HV * V, W]", (rows, sum(channels), width), x.q.device)
    tensor("norm_weight", norm_weight, "[V]", (V,), x.q.device)
    number("norm_eps", norm_eps)


def conv(x: Any, weight: Any, bias: Any, activation: Any, initial_state: Any, packed: Any) -> None:
    rank("x", x, "[B, T, D]")
    rank("weight", weight, "[D, W]")
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    tensor("x", x, "[B, T, D]", x.shape, x.device)
    if width == 0:
        raise ValueError(f"`weight` must have at least one tap, got {list(weight.shape)}")
    tensor("weight", weight, "[D, W]", (channels, width), x.device)
    if bias is not None:
        tensor("bias", bias, "[D]", (channels,), x.device)
    if activation not in ("silu", "swish", None):
        raise ValueError(f"`activation` must be 'silu', 'swish' or None, got {activation!r}")
    cu_seqlens(packed, None, batch, tokens, x.device)
    if initial_state is not None:
        rows = batch if packed is None else packed.shape[0] - 1
        tensor("initial_state", initial_state, "[N, D, W]", (rows, channels, width), x.device)
