"""Which backend a call gets, and why the others do not serve it."""

import logging
import os
from typing import NamedTuple, TypedDict

import torch

from . import cpu, cuda, fla


logger = logging.getLogger("kda_hf")

BACKENDS = ("cuda", "cpu", "fla", "torch")  # in the order of preference
OPERATORS = ("fwd", "chunk_kda", "recurrent_kda", "kda_decode_step", "causal_conv1d")
VARIABLE = "KDA_HF_BACKEND"

FLA_OPERATORS = ("chunk_kda", "recurrent_kda")  # and, with gradients, `causal_conv1d`
FLA_DTYPES = (torch.bfloat16, torch.float16)
FLA_MAX_HEAD_DIM = 256
FLA_FIRST_VERSION = (0, 6)  # the first to know `state_v_first`; older ones ignore it in silence


class Call(NamedTuple):
    """What tells whether a backend can serve a call."""

    op: str
    device: torch.device
    dtype: torch.dtype
    K: int = 128
    V: int = 128
    requires_grad: bool = False
    state_dtype: torch.dtype | None = None  # of the initial and the final state; None without an initial state
    tokens: int = 1
    sequences: int = 1  # that `tokens` are of: packed ones, or one of a batch
    packed: bool = False
    intermediate_states: bool = False
    token_states: bool = False
    conv_states: bool = False  # a convolution from a state or to one
    state_pool: bool = False
    mixed_dtypes: bool = False  # k or v differ from q, or g or β from q and float32
    extension_refusal: str | None = None  # what an extension said of these very arguments


class BackendStatus(TypedDict):
    backend: str
    usable: bool
    reason: str  # why not; empty where it is usable


def _refused_by_cuda(call: Call) -> str | None:
    if os.environ.get("FLA_FLASH_KDA") == "0":
        return "FLA_FLASH_KDA=0"
    return cuda.refusal(call)


def _refused_by_fla(call: Call) -> str | None:
    if call.op == "causal_conv1d" and not call.requires_grad:
        return "FLA's convolution is for gradients"
    if call.op not in (*FLA_OPERATORS, "causal_conv1d"):
        return f"FLA has no {call.op} with these arguments"
    if call.device.type != "cuda":
        return f"the tensors are on {call.device}"
    if fla.VERSION is None:
        return "flash-linear-attention is not installed"
    if fla.VERSION < FLA_FIRST_VERSION:
        return f"FLA is {'.'.join(map(str, fla.VERSION))}, 0.6 or newer is needed"
    if call.dtype not in FLA_DTYPES:
        return f"the tensors are {call.dtype}, which FLA multiplies in TF32"
    if max(call.K, call.V) > FLA_MAX_HEAD_DIM:
        return f"head dimensions {call.K} and {call.V} exceed {FLA_MAX_HEAD_DIM}"
    if call.state_dtype not in (None, torch.float32):
        return f"the initial state is {call.state_dtype}, FLA wants torch.float32"
    if call.tokens == 0:
        return "there are no tokens"
    if call.intermediate_states:
        return "FLA returns intermediate states rounded to the inputs' dtype"
    if call.token_states:
        return "FLA returns no states after every token"
    if call.conv_states:
        return "there is an initial or a final state"
    if call.state_pool:
        return "FLA has no state_indices"
    if torch.compiler.is_compiling():
        return "FLA's operators do not trace in torch.compile"
    if call.packed and torch.cuda.is_current_stream_capturing() and not fla.has_fixed_shapes():
        return "FLA reads cu_seqlens on the host, which a CUDA graph cannot capture"
    return None


def refusal(backend: str, call: Call) -> str | None:
    """Why `backend` cannot serve the call, or None. The PyTorch backend serves every call."""
    if backend == "cuda":
        return _refused_by_cuda(call)
    if backend == "cpu":
        return cpu.refusal(call)
    return _refused_by_fla(call) if backend == "fla" else None


def backends_of(op: str) -> tuple[str, ...]:
    """Those that may have the operator: the CPU extension is for one of them alone, and is no news elsewhere."""
    return tuple(name for name in BACKENDS if name != "cpu" or op in cpu.OPERATORS)


def _from_environment() -> str:
    name = os.environ.get(VARIABLE, "auto")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{VARIABLE} must be auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


def _binds(backend: str, call: Call) -> bool:
    """Whether the variable, which speaks for all operators, decides this call: a backend may lack an operator
    altogether, and gradients are computed where they can be."""
    if backend == "fla":
        return call.op in FLA_OPERATORS
    operators = {"cuda": cuda.OPERATORS, "cpu": cpu.OPERATORS}.get(backend, ())
    return backend == "torch" or (call.op in operators and not call.requires_grad)


def select(call: Call, backend: str | None = None) -> str:
    """The backend that serves the call: the one asked for, else the environment's, else the first that can.

    Raises ValueError for an unknown name, and RuntimeError with the reason where the backend asked for cannot serve.
    """
    if backend is not None and backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"`backend` must be None, auto, {', '.join(BACKENDS)}; got {backend!r}")
        _require(backend, call, f"backend={backend!r}")
        return backend
    wanted = _from_environment() if backend is None else "auto"
    if _binds(wanted, call):
        _require(wanted, call, f"{VARIABLE}={wanted}")
        return wanted
    for name in backends_of(call.op):
        reason = refusal(name, call)
        if reason is None:
            log_once(call.op, name, "serves the calls")
            return name
        log_once(call.op, name, f"refused: {reason}")
    raise AssertionError("the PyTorch backend serves every call")


def has_kernel(call: Call) -> bool:
    """Whether the call would get a kernel of the CUDA extension."""
    wanted = _from_environment()
    return wanted in ("auto", "cuda") and refusal("cuda", call) is None


def _require(backend: str, call: Call, asked: str) -> None:
    reason = refusal(backend, call)
    if reason is not None:
        log_once(call.op, backend, f"refused: {reason}")
        raise RuntimeError(f"{call.op}: {asked} cannot serve this call on {call.device}: {reason}")
    log_once(call.op, backend, "serves the calls")


_logged: set[tuple[str, str, str]] = set()


def log_once(op: str, backend: str, what: str) -> None:
    """One line the first time; none while tracing, where logging would break the graph."""
    if torch.compiler.is_compiling() or (op, backend, what) in _logged:
        return
    _logged.add((op, backend, what))
    logger.info("%s: backend %s %s", op, backend, what)


def backend_report(
    op: str = "chunk_kda",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    K: int = 128,
    V: int = 128,
    requires_grad: bool = False,
    state_dtype: torch.dtype | None = None,
) -> list[BackendStatus]:
    """Which backends could serve a call of `op`, best first: the call gets the first usable one.

    Without arguments: bf16 inference on this machine's default device. Raises ValueError for an unknown `op`.
    """
    if op not in OPERATORS:
        raise ValueError(f"`op` must be one of {', '.join(OPERATORS)}; got {op!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    call = Call(op, torch.device(device), dtype, K, V, requires_grad, state_dtype)
    wanted = _from_environment()
    report = []
    for name in backends_of(op):
        reason = refusal(name, call)
        if reason is None and wanted != name and _binds(wanted, call):
            reason = f"{VARIABLE}={wanted}"
        report.append(BackendStatus(backend=name, usable=reason is None, reason=reason or ""))
    return report
