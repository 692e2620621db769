"""The gated norm of a layer's heads."""

import torch

from . import cuda


WIDTHS = (64, 128, 256)  # of the kernel


def gated_norm(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor | None:
    """
    `x / sqrt(mean(x²) + eps) · weight · sigmoid(gate)`, computed in fp32 and rounded once, in one pass over memory.

    Args:
        x, gate (`torch.Tensor` of shape `[..., V]`).
        weight (`torch.Tensor` of shape `[V]`).

    Returns:
        `torch.Tensor` of shape `[..., V]`, or None where there is no kernel for it.
    """
    width = x.shape[-1]
    if (
        width not in WIDTHS
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not (x.dtype == weight.dtype == gate.dtype and x.device == weight.device == gate.device)
        or x.dtype not in (torch.bfloat16, torch.float16)
        or not all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (x, weight, gate))
        or not cuda.is_wanted()
        or cuda.refusal_of_device(x.device) is not None
    ):
        return None
    out = torch.empty_like(x)
    torch.ops.kda_hf_cuda.gated_rms_norm(x.view(-1, width), weight, gate.view(-1, width), eps, out.view(-1, width))
    return out
