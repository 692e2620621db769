"""The PyTorch operators as `torch.library` custom ops: schemas, kernels, fake kernels and gradients.

A gradient is computed from the saved inputs alone: the backward op runs the differentiable chunked form once more, so
that what is kept between the two passes is the inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import chunked, conv, recurrent, reference


Tensors = tuple[torch.Tensor, ...]
Kernel = Callable[..., Any]

library = torch.library.Library("kda_hf", "DEF")

# Every operator on [B,T,H,D] tensors takes these, in this order; `ACTIVATIONS` is what `reference.activate` takes.
INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, {state}, Tensor? A_log, Tensor? dt_bias, Tensor? cu_seqlens, "
    "bool state_v_first"
)
ACTIVATIONS = (
    "float scale, float? lower_bound, bool use_gate, bool use_qk_norm, bool use_beta_sigmoid, bool allow_neg_eigval"
)


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


def _key_first(state: torch.Tensor | None, state_v_first: bool, dtype: torch.dtype) -> torch.Tensor | None:
    if state is None:
        return None
    return (state.mT if state_v_first else state).to(dtype)


def _stored(state: torch.Tensor, state_v_first: bool, dtype: torch.dtype) -> torch.Tensor:
    return (state.mT if state_v_first else state).to(dtype).contiguous()


def _state_dtype(q: torch.Tensor, initial_state: torch.Tensor | None) -> torch.dtype:
    return reference.compute_dtype(q) if initial_state is None else initial_state.dtype


def _chunk_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_v_first: bool,
    *activations: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chunked form with its activations, differentiable: o, final state, states at the chunks' starts."""
    activated = reference.activate(q, k, v, g, beta, A_log, dt_bias, *activations)
    state = _key_first(initial_state, state_v_first, activated[0].dtype)
    o, final_state, states = chunked.chunked_kda(*activated, state, cu_seqlens)
    dtype = _state_dtype(q, initial_state)
    return o.to(v.dtype), _stored(final_state, state_v_first, dtype), _stored(states, state_v_first, dtype)


def _recurrent_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_v_first: bool,
    *activations: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if cu_seqlens is not None or q.shape[1] == 0:
        # Without reading `cu_seqlens` there is no telling how long a sequence is; the chunk map needs not know.
        args = (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, state_v_first, *activations)
        return _chunk_forward(*args)[:2]
    activated = reference.activate(q, k, v, g, beta, A_log, dt_bias, *activations)
    dtype = activated[0].dtype
    state = _key_first(initial_state, state_v_first, dtype)
    if state is None:
        state = activated[1].new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    o, final_state = recurrent.recurrent_kda(*activated, state)
    return o.to(v.dtype), _stored(final_state, state_v_first, _state_dtype(q, initial_state))


def _fake_state(
    q: torch.Tensor, v: torch.Tensor, initial_state: torch.Tensor | None, state_v_first: bool, *leading: int
) -> torch.Tensor:
    K, V = q.shape[-1], v.shape[-1]
    matrix = (V, K) if state_v_first else (K, V)
    return v.new_empty(*leading, v.shape[2], *matrix, dtype=_state_dtype(q, initial_state))


def _sequences(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@define(
    f"chunk_kda({INPUTS.format(state='Tensor? initial_state')}, {ACTIVATIONS}, bool output_final_state, "
    "bool output_states) -> (Tensor o, Tensor final_state, Tensor states)"
)
def chunk_kda(q: torch.Tensor, *args: Any) -> Tensors:
    *inputs, output_final_state, output_states = args
    o, final_state, states = _chunk_forward(q, *inputs)
    return (
        o.contiguous(),
        final_state if output_final_state else final_state.new_empty(0),
        states if output_states else states.new_empty(0),
    )


@register_fake("chunk_kda")
def _(q: torch.Tensor, *args: Any) -> Tensors:
    _, v, _, _, initial_state, _, _, cu_seqlens, state_v_first = args[:9]
    output_final_state, output_states = args[-2:]
    nothing = v.new_empty(0, dtype=_state_dtype(q, initial_state))
    sequences = _sequences(q, cu_seqlens)
    chunks = chunked.max_chunks(q.shape[1], 1 if cu_seqlens is None else sequences)
    state = (q, v, initial_state, state_v_first)
    return (
        v.new_empty(v.shape),
        _fake_state(*state, sequences) if output_final_state else nothing,
        _fake_state(*state, q.shape[0], chunks) if output_states else nothing,
    )


@define(
    f"recurrent_kda({INPUTS.format(state='Tensor? initial_state')}, {ACTIVATIONS}, bool output_final_state) "
    "-> (Tensor o, Tensor final_state)"
)
def recurrent_kda(q: torch.Tensor, *args: Any) -> Tensors:
    *inputs, output_final_state = args
    o, final_state = _recurrent_forward(q, *inputs)
    return o.contiguous(), final_state if output_final_state else final_state.new_empty(0)


@register_fake("recurrent_kda")
def _(q: torch.Tensor, *args: Any) -> Tensors:
    _, v, _, _, initial_state, _, _, cu_seqlens, state_v_first = args[:9]
    if args[-1]:
        final_state = _fake_state(q, v, initial_state, state_v_first, _sequences(q, cu_seqlens))
    else:
        final_state = v.new_empty(0, dtype=_state_dtype(q, initial_state))
    return v.new_empty(v.shape), final_state


@define(
    f"recurrent_kda_pool({INPUTS.format(state='Tensor(a!) state_pool')}, {ACTIVATIONS}, Tensor state_indices) "
    "-> Tensor o"
)
def recurrent_kda_pool(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state_pool: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_v_first: bool,
    *args: Any,
) -> torch.Tensor:
    *activations, state_indices = args
    if len(state_indices) == 0 or len(state_pool) == 0:
        return torch.zeros_like(v, memory_format=torch.contiguous_format)
    indices = state_indices.long()
    used = (indices >= 0) & (indices < len(state_pool))
    # A skipped row stands for the first used one: both write the same state to the same place, and nothing is read on
    # the host. Where no row is used, all write back what they read.
    row = torch.arange(len(indices), device=indices.device)
    row = torch.where(used, row, used.byte().argmax())
    indices = indices[row].clamp(0, len(state_pool) - 1)
    before = state_pool.index_select(0, indices)
    o, after = _recurrent_forward(q, k, v, g, beta, before, A_log, dt_bias, cu_seqlens, state_v_first, *activations)
    state_pool.index_copy_(0, indices, torch.where(used[row, None, None, None], after[row], before))
    if cu_seqlens is None:
        is_used = used[:, None]
    else:
        token = torch.arange(q.shape[1], device=q.device)
        sequence = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)
        is_used = used[sequence.clamp(max=len(used) - 1)][None]
    return o.masked_fill(~is_used[..., None, None], 0).contiguous()


@register_fake("recurrent_kda_pool")
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
    activations = (scale, lower_bound, True, True, True, False)
    inputs = (q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens)
    o, state, _ = _chunk_forward(*inputs, True, *activations)
    out.copy_(o)
    if final_state is not None:
        final_state.copy_(state)


@register_fake("fwd")
def _(*args: Any) -> None:
    return None


@define(
    f"kda_backward({INPUTS.format(state='Tensor? initial_state')}, {ACTIVATIONS}, Tensor grad_o, "
    "Tensor grad_final_state, Tensor grad_states, bool[] needs_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, "
    "Tensor dbeta, Tensor dinitial_state, Tensor dA_log, Tensor ddt_bias)"
)
def kda_backward(*args: Any) -> Tensors:
    *tensors, cu_seqlens, state_v_first = args[:10]
    *activations, grad_o, grad_final_state, grad_states, needs_grad = args[10:]

    def forward(*leaves: torch.Tensor | None) -> Tensors:
        return _chunk_forward(*leaves, cu_seqlens, state_v_first, *activations)  # type: ignore[arg-type]

    return differentiate(forward, tensors, (grad_o, grad_final_state, grad_states), needs_grad)


@register_fake("kda_backward")
def _(*args: Any) -> Tensors:
    return fake_gradients(args[:8], grad_output=args[-4], needs_grad=args[-1])


def _save_kda(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:16]
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
    shape = (_sequences(x, cu_seqlens), *weight.shape) if output_final_state else (0,)
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
