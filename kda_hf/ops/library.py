"""The PyTorch operators as `torch.library` custom ops: schemas, kernels, fake kernels and gradients.

A gradient is computed from the saved inputs alone: the backward op runs the differentiable chunked form once more, so
that what is kept between the two passes is the inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import chunked, conv, recurrent
from .inputs import NUM_INPUTS, SCHEMA, KDAInputs, fwd_inputs


Tensors = tuple[torch.Tensor, ...]
Kernel = Callable[..., Any]

library = torch.library.Library("kda_hf", "DEF")


def define(schema: str) -> Callable[[Kernel], Kernel]:
    """Define an operator; the decorated function is its kernel on every device, and runs outside of autocast."""
    name = schema.split("(", 1)[0]
    library.define(schema)

    def register(kernel: Kernel) -> Kernel:
        def without_autocast(first: torch.Tensor, *args: Any) -> Any:
            device_type = first.device.type
            if not torch.is_autocast_enabled(device_type):
                return kernel(first, *args)
            with torch.autocast(device_type, enabled=False):
                return kernel(first, *args)

        library.impl(name, without_autocast, "CompositeExplicitAutograd")
        return kernel

    return register


def register_fake(name: str) -> Callable[[Kernel], Kernel]:
    return torch.library.register_fake(f"kda_hf::{name}", lib=library)


def differentiate(
    forward: Callable[..., Tensors],
    tensors: Sequence[torch.Tensor | None],
    grad_outputs: Sequence[torch.Tensor],
    needs_grad: Sequence[bool],
) -> Tensors:
    """Vector-Jacobian product of `forward` for the tensors that need it; an empty tensor for each of the others."""
    # A compiled graph runs with autograd's dispatch key off: on again, or `forward` records nothing.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd, torch.enable_grad():
        leaves = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(tensors, needs_grad, strict=True)
        ]
        outputs = forward(*leaves)
        # An output that nobody wanted has an empty gradient.
        pairs = [
            (y, dy) for y, dy in zip(outputs, grad_outputs, strict=True) if y.requires_grad and y.shape == dy.shape
        ]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        if pairs:
            ys, dys = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(ys, wanted, dys, allow_unused=True, materialize_grads=True))
        else:
            found = iter([torch.zeros_like(leaf) for leaf in wanted])
    # Copies: an operator's result may alias neither its arguments nor its other results.
    return tuple(
        torch.empty_like(x).copy_(next(found)) if x is not None and needed else grad_outputs[0].new_empty(0)
        for x, needed in zip(tensors, needs_grad, strict=True)
    )


def fake_gradients(
    tensors: Sequence[torch.Tensor | None], grad_output: torch.Tensor, needs_grad: Sequence[bool]
) -> Tensors:
    return tuple(
        torch.empty_like(x) if x is not None and needed else grad_output.new_empty(0)
        for x, needed in zip(tensors, needs_grad, strict=True)
    )


def wanted_gradients(gradients: Sequence[torch.Tensor], needs_grad: Sequence[bool]) -> list[torch.Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, needs_grad, strict=True)]


# ------------------------------------------------------------------------------------------------ Kimi Delta Attention


def _stored(state: torch.Tensor, x: KDAInputs) -> torch.Tensor:
    return (state.mT if x.state_v_first else state).to(x.state_dtype).contiguous()


def _chunk_forward(x: KDAInputs, output_states: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chunked form with its activations, differentiable: o, final state, and the states at the chunks' starts,
    which are empty unless wanted."""
    activated = x.activated()
    state = x.key_first_state(activated[0].dtype)
    o, final_state, states = chunked.chunked_kda(*activated, state, x.cu_seqlens, output_states)
    final_state = _stored(final_state, x)
    return o.to(x.v.dtype), final_state, final_state.new_empty(0) if states is None else _stored(states, x)


def _recurrent_forward(x: KDAInputs, output_states: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, final state, and the states after the tokens, which are empty unless wanted."""
    tokens = x.q.shape[1]
    if (x.cu_seqlens is not None and not output_states) or tokens == 0:
        # Without reading `cu_seqlens` there is no telling how long a sequence is; the chunk map needs not know.
        o, final_state, nothing = _chunk_forward(x)
        return o, final_state, _empty_state(x, x.q.shape[0], 0) if output_states else nothing
    activated = x.activated()
    state = x.key_first_state(activated[0].dtype)
    if state is None:
        state = activated[1].new_zeros(x.sequences, x.v.shape[2], x.k.shape[3], x.v.shape[3])
    if not output_states:
        o, final_state = recurrent.recurrent_kda(*activated, state)
        final_state = _stored(final_state, x)
        return o.to(x.v.dtype), final_state, final_state.new_empty(0)
    outputs, states = [], []
    sequence = None if x.cu_seqlens is None else _sequence_of_tokens(x.cu_seqlens, tokens)
    for token in range(tokens):
        q, k, v, g, beta = (y[:, token : token + 1] for y in activated)
        if sequence is None:
            o, after = recurrent.recurrent_kda(q, k, v, g, beta, state)
            state = after
        else:
            own = sequence[token : token + 1]
            n, exists = own.clamp(max=x.sequences - 1), own < x.sequences
            before = state.index_select(0, n)
            o, after = recurrent.recurrent_kda(q, k, v, g, beta, before)
            o = o.masked_fill(~exists, 0)
            state = state.index_copy(0, n, torch.where(exists[:, None, None, None], after, before))
        outputs.append(o)
        states.append(after)
    return torch.cat(outputs, 1).to(x.v.dtype), _stored(state, x), _stored(torch.stack(states, 1), x)


def _sequence_of_tokens(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The packed sequence that each token is of, and N for a token of none."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)


def _empty_state(x: KDAInputs, *leading: int) -> torch.Tensor:
    K, V = x.q.shape[-1], x.v.shape[-1]
    matrix = (V, K) if x.state_v_first else (K, V)
    return x.v.new_empty(*leading, x.v.shape[2], *matrix, dtype=x.state_dtype)


@define(
    f"chunk_kda({SCHEMA.format(state='Tensor? initial_state')}, bool output_final_state, bool output_states) "
    "-> (Tensor o, Tensor final_state, Tensor states)"
)
def chunk_kda(*args: Any) -> Tensors:
    *inputs, output_final_state, output_states = args
    o, final_state, states = _chunk_forward(KDAInputs(*inputs), output_states)
    return o.contiguous(), final_state if output_final_state else final_state.new_empty(0), states


@register_fake("chunk_kda")
def _(*args: Any) -> Tensors:
    *inputs, output_final_state, output_states = args
    x = KDAInputs(*inputs)
    nothing = x.v.new_empty(0, dtype=x.state_dtype)
    chunks = chunked.max_chunks(x.q.shape[1], 1 if x.cu_seqlens is None else x.sequences)
    return (
        x.v.new_empty(x.v.shape),
        _empty_state(x, x.sequences) if output_final_state else nothing,
        _empty_state(x, x.q.shape[0], chunks) if output_states else nothing,
    )


@define(
    f"recurrent_kda({SCHEMA.format(state='Tensor? initial_state')}, bool output_final_state, bool output_states) "
    "-> (Tensor o, Tensor final_state, Tensor states)"
)
def recurrent_kda(*args: Any) -> Tensors:
    *inputs, output_final_state, output_states = args
    o, final_state, states = _recurrent_forward(KDAInputs(*inputs), output_states)
    return o.contiguous(), final_state if output_final_state else final_state.new_empty(0), states


@register_fake("recurrent_kda")
def _(*args: Any) -> Tensors:
    *inputs, output_final_state, output_states = args
    x = KDAInputs(*inputs)
    return (
        x.v.new_empty(x.v.shape),
        _empty_state(x, x.sequences) if output_final_state else x.v.new_empty(0, dtype=x.state_dtype),
        _empty_state(x, *x.q.shape[:2]) if output_states else x.v.new_empty(0, dtype=x.state_dtype),
    )


def _pool_rows(state_indices: torch.Tensor, size: int) -> Tensors:
    """Rows of the pool to read and write, which of the sequences each belongs to, and which sequences are not skipped.

    A skipped one stands for the first that is not: both write the same state to the same place, and nothing is read on
    the host. Where all are skipped, all write back what they read.
    """
    indices = state_indices.long()
    used = (indices >= 0) & (indices < size)
    row = torch.arange(len(indices), device=indices.device)
    row = torch.where(used, row, used.byte().argmax())
    return indices[row].clamp(0, size - 1), row, used


@define(
    f"recurrent_kda_pool({SCHEMA.format(state='Tensor(a!) state_pool')}, Tensor state_indices, bool output_states) "
    "-> (Tensor o, Tensor states)"
)
def recurrent_kda_pool(*args: Any) -> Tensors:
    *inputs, state_indices, output_states = args
    x = KDAInputs(*inputs)
    state_pool = x.initial_state
    if state_pool is None or len(state_indices) == 0 or len(state_pool) == 0:
        o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
        return o, _empty_state(x, *x.q.shape[:2]) if output_states else o.new_empty(0, dtype=x.state_dtype)
    indices, row, used = _pool_rows(state_indices, len(state_pool))
    before = state_pool.index_select(0, indices)
    o, after, states = _recurrent_forward(x._replace(initial_state=before), output_states)
    state_pool.index_copy_(0, indices, torch.where(used[row, None, None, None], after[row], before))
    if x.cu_seqlens is None:
        is_used = used[:, None]
    else:
        is_used = used[_sequence_of_tokens(x.cu_seqlens, x.q.shape[1]).clamp(max=len(used) - 1)][None]
    return o.masked_fill(~is_used[..., None, None], 0).contiguous(), states


@register_fake("recurrent_kda_pool")
def _(*args: Any) -> Tensors:
    *inputs, _, output_states = args
    x = KDAInputs(*inputs)
    states = _empty_state(x, *x.q.shape[:2]) if output_states else x.v.new_empty(0, dtype=x.state_dtype)
    return x.v.new_empty(x.v.shape), states


@define(
    "kda_decode_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, float scale, "
    "Tensor? A_log, Tensor? dt_bias, float? lower_bound, Tensor(a!) recurrent_state, Tensor(b!) conv_state, "
    "Tensor q_conv_weight, Tensor k_conv_weight, Tensor v_conv_weight, Tensor norm_weight, float norm_eps, "
    "Tensor? state_indices, bool allow_neg_eigval, bool state_v_first) -> Tensor o"
)
def kda_decode_step(*args: Any) -> torch.Tensor:
    *inputs, state_indices, allow_neg_eigval, state_v_first = args
    v, states = inputs[2], inputs[10:12]  # recurrent_state, conv_state
    flags: Any = {"allow_neg_eigval": allow_neg_eigval, "state_v_first": state_v_first}
    if len(v) == 0 or len(states[0]) == 0:
        return torch.zeros_like(v, memory_format=torch.contiguous_format)
    if state_indices is None:
        return recurrent.decode_step(*inputs, **flags).contiguous()
    indices, row, used = _pool_rows(state_indices, len(states[0]))
    before = [pool.index_select(0, indices) for pool in states]
    after = [x.clone() for x in before]
    o = recurrent.decode_step(*inputs[:10], *after, *inputs[12:], **flags)
    for pool, old, new in zip(states, before, after, strict=True):
        is_used = used[row].view(-1, *[1] * (pool.ndim - 1))
        pool.index_copy_(0, indices, torch.where(is_used, new[row], old))
    return o.masked_fill(~used[:, None, None, None], 0).contiguous()


@register_fake("kda_decode_step")
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> torch.Tensor:
    return v.new_empty(v.shape)


@define(
    "fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor? A_log, "
    "Tensor? dt_bias, float? lower_bound, Tensor? initial_state, Tensor(b!)? final_state, Tensor? cu_seqlens) -> ()"
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
) -> None:
    inputs = fwd_inputs(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)
    o, state, _ = _chunk_forward(inputs)
    out.copy_(o)
    if final_state is not None:
        final_state.copy_(state)


@register_fake("fwd")
def _(*args: Any) -> None:
    return None


@define(
    f"kda_backward({SCHEMA.format(state='Tensor? initial_state')}, Tensor grad_o, Tensor grad_final_state, "
    "Tensor grad_states, bool[] needs_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, "
    "Tensor dinitial_state, Tensor dA_log, Tensor ddt_bias)"
)
def kda_backward(*args: Any) -> Tensors:
    *inputs, grad_o, grad_final_state, grad_states, needs_grad = args
    x = KDAInputs(*inputs)

    def forward(*leaves: Any) -> Tensors:
        return _chunk_forward(KDAInputs._make((*leaves, *x[8:])), output_states=grad_states.numel() > 0)

    return differentiate(forward, x.tensors, (grad_o, grad_final_state, grad_states), needs_grad)


@register_fake("kda_backward")
def _(*args: Any) -> Tensors:
    return fake_gradients(args[:8], grad_output=args[-4], needs_grad=args[-1])


def _save_kda(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:NUM_INPUTS]
    ctx.unused = len(inputs) - 8


def _backward_kda(ctx: Any, grad_o: torch.Tensor, grad_final_state: torch.Tensor, *grad_states: torch.Tensor) -> tuple:
    needs_grad = list(ctx.needs_input_grad[:8])
    states = grad_states[0] if grad_states else grad_final_state.new_empty(0)
    gradients = torch.ops.kda_hf.kda_backward(
        *ctx.saved_tensors, *ctx.options, grad_o, grad_final_state, states, needs_grad
    )
    return (*wanted_gradients(gradients, needs_grad), *[None] * ctx.unused)


for _name in ("chunk_kda", "recurrent_kda"):
    torch.library.register_autograd(f"kda_hf::{_name}", _backward_kda, setup_context=_save_kda, lib=library)


# --------------------------------------------------------------------------------------------------- causal convolution


def _conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    activation: str | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, final_state = conv.causal_conv1d(x, weight, bias, initial_state, activation, cu_seqlens)
    return y.to(x.dtype), final_state.to(x.dtype if initial_state is None else initial_state.dtype)


@define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, str? activation, Tensor? cu_seqlens, "
    "bool output_final_state) -> (Tensor y, Tensor final_state)"
)
def causal_conv1d(x: torch.Tensor, *args: Any) -> Tensors:
    *inputs, output_final_state = args
    y, final_state = _conv_forward(x, *inputs)
    return y.contiguous(), final_state.contiguous() if output_final_state else final_state.new_empty(0)


@register_fake("causal_conv1d")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    activation: str | None,
    cu_seqlens: torch.Tensor | None,
    output_final_state: bool,
) -> Tensors:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, *weight.shape) if output_final_state else (0,)
    dtype = x.dtype if initial_state is None else initial_state.dtype
    return x.new_empty(x.shape), x.new_empty(shape, dtype=dtype)


@define(
    "causal_conv1d_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, str? activation, "
    "Tensor? cu_seqlens, Tensor grad_y, Tensor grad_final_state, bool[] needs_grad) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)"
)
def causal_conv1d_backward(*args: Any) -> Tensors:
    *tensors, activation, cu_seqlens, grad_y, grad_final_state, needs_grad = args

    def forward(*leaves: torch.Tensor | None) -> Tensors:
        return _conv_forward(*leaves, activation, cu_seqlens)  # type: ignore[arg-type, call-arg]

    return differentiate(forward, tensors, (grad_y, grad_final_state), needs_grad)


@register_fake("causal_conv1d_backward")
def _(*args: Any) -> Tensors:
    return fake_gradients(args[:4], grad_output=args[-3], needs_grad=args[-1])


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, activation, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)
    ctx.activation = activation


def _backward_conv(ctx: Any, grad_y: torch.Tensor, grad_final_state: torch.Tensor) -> tuple:
    needs_grad = list(ctx.needs_input_grad[:4])
    *tensors, cu_seqlens = ctx.saved_tensors
    gradients = torch.ops.kda_hf.causal_conv1d_backward(
        *tensors, ctx.activation, cu_seqlens, grad_y, grad_final_state, needs_grad
    )
    return (*wanted_gradients(gradients, needs_grad), None, None, None)


torch.library.register_autograd("kda_hf::causal_conv1d", _backward_conv, setup_context=_save_conv, lib=library)
