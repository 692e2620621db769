"""The CUDA extension `kda_hf/_C.abi3.so`, where there is one: why it cannot serve a call, and its calls.

The extension checks every argument itself and writes nothing where one is wrong, so that Python need not look at the
tensors of a call that succeeds. What it refuses goes through the checks of :mod:`.checks`, which raise the documented
errors, and, where they find none, to another backend.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import chunked
from .inputs import KDAInputs


if TYPE_CHECKING:
    from .backends import Call


EXTENSION = Path(__file__).parents[1] / "_C.abi3.so"
OPERATORS = ("fwd", "chunk_kda", "recurrent_kda", "kda_decode_step", "causal_conv1d")
WIDTHS = (64, 128)  # of K and V
CAPABILITY = (9, 0)  # the kernels are of sm_90a, which runs on this one only
REFUSED = "kda_hf refuses: "  # how the message starts where the extension has written nothing
RECURRENT_TOKENS = 16  # up to so many a sequence, on average, token by token; more go through the chunked kernels


def _load() -> str | None:
    """Load the extension, which registers its operators with torch; returns why that failed, or None."""
    if not EXTENSION.exists():
        return "the CUDA extension is not built (it needs nvcc when kda_hf is installed)"
    try:
        torch.ops.load_library(EXTENSION)
    except OSError as error:
        return f"the CUDA extension does not load: {error.__cause__ or error}"
    return None


_unavailable = _load()


def status() -> str:
    """Whether the extension is there, in words."""
    return "the CUDA extension is loaded" if _unavailable is None else _unavailable


if _unavailable is None:
    _refusals = {
        "prefill": torch.ops.kda_hf_cuda.prefill_refusal.default,
        "recurrent": torch.ops.kda_hf_cuda.recurrent_refusal.default,
    }
    _library = torch.library.Library("kda_hf_cuda", "IMPL")

    def _fake(*args: Any) -> None:
        # A real meta tensor among the arguments brings a call here that has to fail.
        if len({x.device for x in args if isinstance(x, torch.Tensor)}) > 1:
            raise RuntimeError(f"{REFUSED}the tensors must be on one device")

    _kernels = {
        name: getattr(torch.ops.kda_hf_cuda, name).default
        for name in ("prefill", "recurrent", "decode_step", "causal_conv1d")
    }
    for _kernel in _kernels:
        # They have no gradient, and calls that want one go elsewhere: autograd has nothing to do here.
        _library.impl(_kernel, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"kda_hf_cuda::{_kernel}", _fake, lib=_library)


@torch.compiler.assume_constant_result
def _refused_by_device(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability(index) == CAPABILITY:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"{torch.cuda.get_device_name(index)} is sm_{major}{minor}, and the kernels need the wgmma and TMA "
        "instructions of sm_90a (Hopper)"
    )


def is_wanted() -> bool:
    """Whether the environment leaves the choice of a backend to us, or asks for this one."""
    return os.environ.get("FLA_FLASH_KDA") != "0" and os.environ.get("KDA_HF_BACKEND", "auto") in ("auto", "cuda")


def refusal_of_device(device: torch.device) -> str | None:
    """Why no kernel of the extension runs there, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    return _unavailable or _refused_by_device(device.index)


@torch.compiler.assume_constant_result
def _refused_by_kernel(kernel: str, K: int, V: int, dtype: torch.dtype, state_dtype: torch.dtype) -> str | None:
    return _refusals[kernel](K, V, dtype, state_dtype) or None


def _goes_by_token(tokens: int, sequences: int, intermediate_states: bool, has_to: bool) -> bool:
    """Whether `recurrent_kda` has the kernel that goes token by token: for few tokens, and where only that one can."""
    return has_to or (not intermediate_states and tokens <= RECURRENT_TOKENS * sequences)


def refusal(call: "Call") -> str | None:
    """Why the extension cannot serve the call, or None."""
    if call.device.type != "cuda":
        return f"the tensors are on {call.device}"
    if _unavailable is not None:
        return _unavailable
    if call.extension_refusal is not None:
        return call.extension_refusal
    if call.requires_grad:
        return "the inputs require grad, and the CUDA operators have no backward"
    if call.op not in OPERATORS:
        return f"the CUDA extension has no kernel for {call.op}"
    if call.mixed_dtypes:
        return "q, k and v have several dtypes, or g or beta has neither theirs nor torch.float32"
    if call.op == "causal_conv1d":
        return _refused_by_device(call.device.index)
    if call.K not in WIDTHS or call.V not in WIDTHS:
        return f"the head dimensions are {call.K} and {call.V}, and there are kernels for {WIDTHS[0]} and {WIDTHS[1]}"
    # By comparison, since torch.compile may trace a head dimension as a symbol: it becomes a number here.
    K, V = (next(known for known in WIDTHS if known == width) for width in (call.K, call.V))
    goes_by_token = call.op == "recurrent_kda" and _goes_by_token(
        call.tokens, call.sequences, call.intermediate_states, call.state_pool or call.token_states
    )
    kernel = "recurrent" if goes_by_token or call.op == "kda_decode_step" else "prefill"
    reason = _refused_by_kernel(kernel, K, V, call.dtype, call.state_dtype or torch.float32)
    return reason or _refused_by_device(call.device.index)


_served: set[tuple[str, int]] = set()


def note_served(op: str, q: torch.Tensor) -> None:
    _served.add((op, q.get_device()))


def serves_again(op: str, q: Any) -> bool:
    """Whether a call may go to the extension unchecked: it has served the operator on this device, as was logged then,
    and no variable of the environment says otherwise."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is torch.Tensor
        and (op, q.get_device()) in _served
        and os.environ.get("FLA_FLASH_KDA") != "0"
        and os.environ.get("KDA_HF_BACKEND", "auto") in ("auto", "cuda")
        and os.environ.get("KDA_HF_CHECK") != "1"
    )


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    initial_state: torch.Tensor | None,
    final_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> str | None:
    """Why the extension refused, and wrote nothing, or None."""
    # fmt: off
    return _call(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, None,
                 cu_seqlens, True, True, True, False, True)
    # fmt: on


def chunk_kda(
    x: KDAInputs, output_final_state: bool, output_states: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | str:
    """o, the final state and the states at the chunks' starts, each where it is asked for; or why it was refused."""
    try:
        (batch, tokens, _, K), (_, _, heads, V) = x.q.shape, x.v.shape
        sequences, dtype = x.sequences, x.state_dtype
    except (AttributeError, IndexError, ValueError):  # not tensors of these ranks: the checks will say so
        return "the arguments are not what chunk_kda takes"
    state = (heads, V, K) if x.state_v_first else (heads, K, V)
    # Traced code may not call torch.sym_min, as `max_chunks` does; Python's min it may.
    chunks = chunked.chunks_of(tokens)
    if x.cu_seqlens is not None:
        chunks = min(tokens, (tokens + (chunked.CHUNK_SIZE - 1) * sequences) // chunked.CHUNK_SIZE)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    final_state = x.q.new_empty((sequences, *state), dtype=dtype) if output_final_state else None
    states = x.q.new_empty((batch, chunks, *state), dtype=dtype) if output_states else None
    # fmt: off
    reason = _call(x.q, x.k, x.v, x.g, x.beta, x.scale, o, x.A_log, x.dt_bias, x.lower_bound, x.initial_state,
                   final_state, states, x.cu_seqlens, x.use_gate, x.use_qk_norm, x.use_beta_sigmoid,
                   x.allow_neg_eigval, x.state_v_first)
    # fmt: on
    return (o, final_state, states) if reason is None else reason


def recurrent_kda(
    x: KDAInputs,
    output_final_state: bool,
    output_states: bool,
    token_states: bool,
    state_indices: torch.Tensor | None,
    by_token: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | str:
    """As `chunk_kda`; with `state_indices` the initial state is a pool, updated in place, and the final state. With
    `token_states` the third result is the states after every token. `by_token` goes token by token however many there
    are."""
    if output_states and state_indices is not None:
        return "there are no intermediate states of a pool"
    try:
        (batch, tokens, _, K), (_, _, heads, V) = x.q.shape, x.v.shape
        sequences, dtype = 1 if x.cu_seqlens is None else x.sequences, x.state_dtype
    except (AttributeError, IndexError, ValueError):  # not tensors of these ranks: the checks will say so
        return "the arguments are not what recurrent_kda takes"
    has_to = by_token or state_indices is not None or token_states
    if not _goes_by_token(tokens, sequences, output_states, has_to):
        return chunk_kda(x, output_final_state, output_states)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    matrix = (V, K) if x.state_v_first else (K, V)
    states = x.q.new_empty((batch, tokens, heads, *matrix), dtype=dtype) if token_states else None
    initial_state, final_state = None, x.initial_state  # a pool is one argument of the extension, which writes it
    if state_indices is None:
        initial_state = x.initial_state
        final_state = x.q.new_empty((x.sequences, heads, *matrix), dtype=dtype) if output_final_state else None
    # fmt: off
    reason = _call(x.q, x.k, x.v, x.g, x.beta, x.scale, o, x.A_log, x.dt_bias, x.lower_bound, initial_state,
                   final_state, states, x.cu_seqlens, state_indices, x.use_gate, x.use_qk_norm, x.use_beta_sigmoid,
                   x.allow_neg_eigval, x.state_v_first, kernel="recurrent")
    # fmt: on
    return (o, final_state if output_final_state else None, states) if reason is None else reason


def decode_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> torch.Tensor | str:
    """The step's output, or why it was refused. `others` are the operator's arguments, in its order, without `out`."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    reason = _call(q, k, v, *others[:4], out, *others[4:], kernel="decode_step")
    return out if reason is None else reason


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    activation: str | None,
    cu_seqlens: torch.Tensor | None,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None] | str:
    """y and the final state, or why the call was refused."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = None
    if output_final_state:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dtype = x.dtype if initial_state is None else initial_state.dtype
        final_state = x.new_empty((sequences, *weight.shape), dtype=dtype)
    arguments = (x, weight, bias, initial_state, cu_seqlens, y, final_state, activation is not None)
    reason = _call(*arguments, kernel="causal_conv1d")
    return (y, final_state) if reason is None else reason


def _call(*args: Any, kernel: str = "prefill") -> str | None:
    operator = _kernels[kernel]
    if torch.compiler.is_compiling():
        operator(*args)  # traced with fake tensors, which nothing refuses
        return None
    try:
        operator(*args)
    except (RuntimeError, TypeError) as error:
        # Besides its own refusals, torch's, of a value that is not of the schema's type.
        message = str(error)
        if message.startswith(REFUSED):
            return message.removeprefix(REFUSED)
        if f"kda_hf_cuda::{kernel}" in message:
            return message.splitlines()[0]
        raise
    return None
