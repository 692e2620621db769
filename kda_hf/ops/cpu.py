"""The CPU extension `kda_hf/_cpu.abi3.so`, where there is one: a decode step in few calls of C++.

As with the CUDA extension, the checks are its own: it writes nothing where an argument is wrong or not what it serves,
and Python then finds the documented error, or goes on by PyTorch.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .backends import Call


EXTENSION = Path(__file__).parents[1] / "_cpu.abi3.so"
OPERATORS = ("kda_decode_step",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REFUSED = "kda_hf refuses: "  # how the message starts where the extension has written nothing


def _load() -> str | None:
    """Load the extension, which registers its operators with torch; returns why that failed, or None."""
    if not EXTENSION.exists():
        return "the CPU extension is not built (it needs a C++ compiler and torch when kda_hf is installed)"
    try:
        torch.ops.load_library(EXTENSION)
    except OSError as error:
        return f"the CPU extension does not load: {error.__cause__ or error}"
    return None


_unavailable = _load()


def status() -> str:
    """Whether the extension is there, in words."""
    return "the CPU extension is loaded" if _unavailable is None else _unavailable


if _unavailable is None:
    _library = torch.library.Library("kda_hf_cpu", "IMPL")
    _operators = {
        name: getattr(torch.ops.kda_hf_cpu, name).default
        for name in ("decode_step", "kda_layer", "attention_inputs", "attention_output", "mlp", "rms_norm")
    }
    for _name in _operators:
        # They have no gradient, and calls that want one go elsewhere: autograd has nothing to do here.
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    rms_norm = _operators["rms_norm"]
    torch.library.register_fake("kda_hf_cpu::rms_norm", lambda x, *_: x.new_empty(x.shape), lib=_library)


def is_wanted() -> bool:
    """Whether the extension is there, and the environment does not ask for another backend."""
    return _unavailable is None and os.environ.get("KDA_HF_BACKEND", "auto") in ("auto", "cpu")


def refusal(call: "Call") -> str | None:
    """Why the extension cannot serve the call, or None."""
    if call.device.type != "cpu":
        return f"the tensors are on {call.device}"
    if call.op not in OPERATORS:
        return f"the CPU extension has no {call.op}"
    if _unavailable is not None:
        return _unavailable
    if call.extension_refusal is not None:
        return call.extension_refusal
    if call.requires_grad:
        return "the inputs require grad, and the CPU extension has no backward"
    if call.dtype not in DTYPES:
        return f"the tensors are {call.dtype}"
    if torch.compiler.is_compiling():
        return "torch.compile traces PyTorch's operator, which serves tensors of any strides"
    return None


_has_served = False


def note_served() -> None:
    global _has_served
    _has_served = True


def serves_again(q: Any) -> bool:
    """Whether a call may go to the extension unchecked: it has served one, as was logged then, and no variable of the
    environment says otherwise."""
    return (
        _has_served
        and not torch.compiler.is_compiling()
        and type(q) is torch.Tensor
        and q.device.type == "cpu"
        and q.dtype in DTYPES
        and is_wanted()
    )


def decode_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> torch.Tensor | str:
    """The step's output, or why it was refused. `others` are the operator's arguments, in its order, without `out`."""
    if not isinstance(v, torch.Tensor):
        return "`v` is no tensor"
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    reason = _call("decode_step", q, k, v, *others[:4], out, *others[4:])
    return out if reason is None else reason


def kda_layer(*args: Any) -> torch.Tensor | str:
    """x `[B, D]` of one token a row plus a KDA layer of its norm, or why it was refused. Weights are `[in, out]`."""
    return _call("kda_layer", *args)


def attention_inputs(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | str:
    """q, k and v `[B, heads, 1, head_dim]` of the norm of x `[B, D]`, of one token a row, or why it was refused."""
    return _call("attention_inputs", *args)


def attention_output(*args: Any) -> torch.Tensor | str:
    """x `[B, D]` plus what attention of q to all keys and values comes to, or why it was refused."""
    return _call("attention_output", *args)


def mlp(*args: Any) -> torch.Tensor | str:
    """x `[B, D]` plus the SwiGLU layer of its norm, or why it was refused. Weights are `[in, out]`, gate before up."""
    return _call("mlp", *args)


def _call(name: str, *args: Any) -> Any:
    try:
        return _operators[name](*args)
    except (RuntimeError, TypeError) as error:
        # Besides its own refusals, torch's, of a value that is not of the schema's type.
        message = str(error)
        if message.startswith(REFUSED):
            return message.removeprefix(REFUSED)
        if f"kda_hf_cpu::{name}" in message:
            return message.splitlines()[0]
        raise
