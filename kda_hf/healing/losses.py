"""What healing minimises: the error of each layer's output (stage 1), the divergence of the logits (stage 2)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_kda import KDAForCausalLM
from .attention import last_hidden_state
from .data import PackedRow


Backward = Callable[[torch.Tensor], None]


def swapped_layers(student: KDAForCausalLM) -> list[int]:
    """Indices of the student's KDA layers."""
    return [i for i, layer in enumerate(student.model.layers) if layer.layer_type == "linear_attention"]


def output_error(output: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """`‖output − target‖² / ‖target‖²` over all elements, in fp32: 1 for an output of zeros, whatever the layer's
    scale. Finite where the target is all zeros. Of tokens that are not `valid` `[T]`, nothing counts."""
    target = target.float()
    if valid is not None:
        output, target = (x.masked_fill(~valid[:, None], 0) for x in (output, target))
    scale = target.square().sum().clamp_min(1e-12 * target.numel())
    return (output.float() - target).square().sum() / scale


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    cross_entropy: float = 0.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The sum over T tokens, or those that are `valid`, of KL(teacher ‖ student), plus `cross_entropy` times that of the
    labels' negative log-probability, in fp32.

    Args:
        student_logits, teacher_logits (`torch.Tensor` of shape `[T, vocab_size]`).
        labels (`torch.Tensor` of shape `[T]`, int64): the tokens that follow; -100 for none.
        valid (`torch.Tensor` of shape `[T]`, bool, *optional*).
    """
    # A dtype for the softmax, rather than of its input: the logits exist in fp32 once less
    student = student_logits.log_softmax(-1, dtype=torch.float32)
    teacher = teacher_logits.log_softmax(-1, dtype=torch.float32)
    loss = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    loss = (loss if valid is None else loss.masked_fill(~valid, 0)).sum()
    if cross_entropy:
        loss = loss + cross_entropy * nn.functional.nll_loss(student, labels, reduction="sum", ignore_index=-100)
    return loss


def next_tokens(row: PackedRow) -> torch.Tensor:
    """The labels `[T]` of a packed row: the last token of a document has none."""
    ids = row.input_ids[0]
    labels = torch.cat([ids[1:], ids.new_full((1,), -100)])
    labels.index_fill_(0, row.cu_seqlens[1:] - 1, -100)
    return labels if row.valid is None else labels.masked_fill(~row.valid, -100)


@contextmanager
def attention_records(teacher: PreTrainedModel, layers: list[int]) -> Iterator[dict]:
    """Within, each forward of the teacher leaves the input and the output `[1, T, hidden_size]` of its attention layers
    here, by index."""
    records: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def recorder(index):
        def record(module, args, kwargs, output):
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            records[index] = (inputs, output[0])

        return record

    decoder_layers = teacher.get_decoder().layers
    hooks = [decoder_layers[i].self_attn.register_forward_hook(recorder(i), with_kwargs=True) for i in layers]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def layer_matching(
    teacher: PreTrainedModel, student: KDAForCausalLM, row: PackedRow, backward: Backward | None = None
) -> torch.Tensor:
    """
    Stage 1 on one row: each KDA layer gets what the teacher's attention layer in its place got, and its output is
    compared with the teacher's. No layer sees another's error, so that all are trained in one pass.

    Args:
        backward: called with each layer's share of the mean, right after its forward: only one layer's activations
            are alive at a time.

    Returns:
        The error of each layer, `[layers]`, detached.
    """
    layers = swapped_layers(student)
    with attention_records(teacher, layers) as records, torch.no_grad():
        last_hidden_state(teacher, row)
    errors = []
    for index in layers:
        inputs, target = records.pop(index)
        output = student.model.layers[index].linear_attn(inputs, cu_seqlens=row.cu_seqlens)
        error = output_error(output, target, row.valid)
        if backward is not None:
            backward(error / len(layers))
        errors.append(error.detach())
    return torch.stack(errors)


def logit_matching(
    teacher: PreTrainedModel,
    student: KDAForCausalLM,
    row: PackedRow,
    backward: Backward | None = None,
    *,
    chunk: int = 1024,
    cross_entropy: float = 0.0,
) -> torch.Tensor:
    """
    Stage 2 on one row: the mean over its tokens of `divergence`. Logits are made for `chunk` tokens at a time, and with
    `backward` their gradients too, so that memory does not grow with the row times the vocabulary.

    Args:
        backward: called with each chunk's share of the loss; then the gradient of the last hidden states, which it
            leaves behind, is carried on through the student.

    Returns:
        The loss, a scalar, detached.
    """
    with torch.no_grad():
        teacher_states = last_hidden_state(teacher, row)[0]
    states = last_hidden_state(student, row)[0]
    leaf = states.detach().requires_grad_(backward is not None)
    labels = next_tokens(row)
    total = torch.zeros((), device=states.device)
    for start in range(0, len(row), chunk):
        part = slice(start, start + chunk)
        with torch.no_grad():
            teacher_logits = teacher.get_output_embeddings()(teacher_states[part])
        logits = student.lm_head(leaf[part])
        valid = None if row.valid is None else row.valid[part]
        loss = divergence(logits, teacher_logits, labels[part], cross_entropy, valid) / row.tokens
        if backward is not None:
            backward(loss)
        total += loss.detach()
    if backward is not None:
        with torch.autocast(states.device.type, enabled=False):
            states.backward(leaf.grad)
    return total
