"""The CUDA extension `kda_hf/_C.abi3.so`, where one was built."""

from pathlib import Path

import torch


EXTENSION = Path(__file__).parents[1] / "_C.abi3.so"


def _load() -> str | None:
    """Load the extension, which registers its operators with torch; returns why that failed, or None."""
    if not EXTENSION.exists():
        return "the CUDA extension is not built"
    try:
        torch.ops.load_library(EXTENSION)
    except OSError as error:
        return f"the CUDA extension does not load: {error}"
    return None


_unavailable = _load()


def refusal(op: str, device: torch.device, requires_grad: bool) -> str | None:
    """Why the extension cannot serve `op` on `device`, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    if _unavailable is not None:
        return _unavailable
    if requires_grad:
        return "the inputs require grad, and the CUDA operators have no backward"
    return f"the CUDA extension has no kernel for {op}"
