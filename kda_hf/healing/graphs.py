"""The gradients of a row as a CUDA graph: thousands of small kernels are launched as one."""

import logging
from collections.abc import Callable, Sequence

import torch

from ..ops import fla
from .attention import VARLEN_FITS
from .data import FixedRow


logger = logging.getLogger("kda_hf")

ALIGNMENT = 64  # numbers, at the start of each gradient
WARM_UP = 3  # calls before the capture: kernels are compiled and chosen in them
# Computes the loss on a row and adds a share of its gradients
Compute = Callable[[FixedRow, torch.Tensor], torch.Tensor]


def can_capture(device: torch.device, autocast: bool, dropout: float) -> bool:
    """Whether rows of packed documents can be captured: attention and KDA must need nothing from the host."""
    has_fla = fla.VERSION is not None and fla.VERSION >= (0, 6)
    return device.type == "cuda" and autocast and has_fla and VARLEN_FITS and not dropout


class GraphedRow:
    """
    `compute` on a row of fixed shape, captured once.

    Args:
        compute: what to capture.
        row: where the documents of each call are put.
        parameters: those that get gradients, of one dtype. They get them at a fixed place, and it must stay theirs:
            gradients are to be zeroed, not dropped.

    Attributes:
        gradients (`torch.Tensor` of shape `[numbers]`): all of them one after the other, with some room between.
    """

    def __init__(self, compute: Compute, row: FixedRow, parameters: Sequence[torch.nn.Parameter]):
        self.row, self.share = row, torch.zeros((), device=row.input_ids.device)
        sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
        self.gradients = parameters[0].new_zeros(sum(sizes), requires_grad=False)
        for parameter, place in zip(parameters, self.gradients.split(sizes), strict=True):
            parameter.grad = place[: parameter.numel()].view_as(parameter)
        with fla.fixed_shapes():
            self._capture(lambda: compute(row, self.share))
        self.gradients.zero_()

    def _capture(self, compute: Callable[[], torch.Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # the graph has a pool of its own
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread alone: NCCL's looks after its collectives meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = compute()

    def replay(self) -> None:
        self.graph.replay()

    def __call__(self, documents: Sequence[torch.Tensor], share: float) -> torch.Tensor:
        """The loss on these documents, which the row must hold; `share` of its gradients is added."""
        self.row.fill(documents)
        self.share.fill_(share)
        self.replay()
        return self.loss.clone()


def captured(compute: Compute, row: FixedRow, parameters: Sequence[torch.nn.Parameter]) -> GraphedRow | None:
    """The graph, or None where the capture fails, which is logged."""
    try:
        return GraphedRow(compute, row, parameters)
    except RuntimeError as error:  # memory, a kernel that can't be captured
        logger.warning("healing goes on without CUDA graphs: %s", error)
    for parameter in parameters:
        parameter.grad = None
    torch.cuda.empty_cache()
    return None
