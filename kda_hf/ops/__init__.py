"""Kimi Delta Attention operators: each validates its arguments, picks a backend and calls it."""

import torch

from . import backends, checks, chunked, cpu, cuda, fla
from . import library as library  # registers the operators
from .backends import backend_report
from .inputs import KDAInputs, fwd_inputs


__all__ = [
    "backend_report",
    "causal_conv1d",
    "chunk_kda",
    "fused_recurrent_kda",
    "fwd",
    "kda_decode_step",
    "recurrent_kda",
]


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
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """FlashKDA's forward call: L2 norm of q and k, sigmoid of β and the gate are applied inside. Not differentiable.

    Args:
        q, k: [B, T, H, K], bf16, fp16 or fp32 (as all tensors without a dtype here).
        v: [B, T, HV, V], HV a multiple of H.
        g: gate logits [B, T, HV, K].
        beta: logits [B, T, HV].
        scale: factor of the output, as a rule K ** -0.5.
        out: [B, T, HV, V], dtype of v; written in place. Tokens past `cu_seqlens[-1]` become zeros.
        A_log: [HV] fp32 or None, which is 0.
        dt_bias: [HV, K] or [HV * K] fp32, or None, which is 0.
        lower_bound: in [-5, 0] for the gate `lower_bound * sigmoid(exp(A_log) * (g + dt_bias))`; None selects
            `-exp(A_log) * softplus(g + dt_bias)`.
        initial_state: [N, HV, V, K] or None, which is zeros. N is B, or the number of packed sequences.
        final_state: like `initial_state` and of its dtype; written in place. May be `initial_state` itself.
        cu_seqlens: [N + 1] int32 or int64, boundaries of sequences packed along T; B must be 1.

    Raises:
        ValueError: a shape, dtype or value is wrong. TypeError: an argument is of the wrong kind.
        RuntimeError: tensors on different devices, or a backend demanded by KDA_HF_BACKEND that cannot serve.

    Source: arXiv 2510.26692; FlashKDA's `fwd`.
    """
    arguments = (q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)
    if cuda.serves_again("fwd", q) and cuda.fwd(*arguments) is None:
        return
    inputs = fwd_inputs(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)
    checks.kda(inputs)
    checks.tensor("out", out, "[B, T, HV, V]", v.shape, q.device, (v.dtype,))
    if final_state is not None:
        checks.state("final_state", final_state, inputs.sequences, q, v, True)
        if initial_state is not None and final_state.dtype != initial_state.dtype:
            raise ValueError(
                f"`final_state` must have the dtype of `initial_state`, {initial_state.dtype}, got {final_state.dtype}"
            )
    state = final_state if initial_state is None else initial_state
    call = backends.Call(
        "fwd",
        q.device,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        state_dtype=None if state is None else state.dtype,
        mixed_dtypes=inputs.has_mixed_dtypes,
    )
    if backends.select(call) == "cuda":
        reason = cuda.fwd(*arguments)
        if reason is None:
            cuda.note_served("fwd", q)
            return
        backends.select(call._replace(extension_refusal=reason))
    with torch.no_grad():
        torch.ops.kda_hf.fwd(*arguments)


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    safe_gate: bool = False,
    use_gate_in_kernel: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    transpose_state_layout: bool | None = None,
    return_intermediate_states: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Kimi Delta Attention over whole sequences, in chunks of 64 tokens: FLA's `chunk_kda`.

    Args:
        q, k: [B, T, H, K], bf16, fp16, fp32 or fp64.
        v: [B, T, HV, V]; HV is a multiple of H, and value head h reads query/key head `h // (HV // H)`.
        g: [B, T, HV, K], log-decay ≤ 0; with `use_gate_in_kernel`, gate logits.
        beta: [B, T, HV] in [0, 1]; with `use_beta_sigmoid_in_kernel`, logits.
        scale: factor of the output, K ** -0.5 by default.
        initial_state: [N, HV, K, V], zeros by default. N is B, or the number of packed sequences.
        output_final_state: whether to return the state after the last token.
        A_log: [HV] fp32, 0 by default; used with `use_gate_in_kernel`.
        dt_bias: [HV, K] or [HV * K] fp32, 0 by default; used with `use_gate_in_kernel`.
        lower_bound: in [-5, 0], selects the gate `lower_bound * sigmoid(exp(A_log) * (g + dt_bias))`; None selects
            `-exp(A_log) * softplus(g + dt_bias)`.
        safe_gate: states that the log-decay is at least -5 a token; with `use_gate_in_kernel` this needs `lower_bound`.
        use_qk_l2norm_in_kernel: normalise q and k over K, x * rsqrt(Σ x² + 1e-6).
        allow_neg_eigval: β = 2 sigmoid(beta); needs `use_beta_sigmoid_in_kernel`.
        state_v_first: states are [N, HV, V, K]. `transpose_state_layout` is the older name.
        return_intermediate_states: return also the states before every 64th token of each sequence.
        cu_seqlens: [N + 1] int32 or int64, boundaries of sequences packed along T; B must be 1. Some may be empty.
        cu_seqlens_cpu: a copy on the CPU, for backends that plan on the host.
        backend: "cuda", "fla" or "torch"; by default KDA_HF_BACKEND decides, and else the best that can serve.

    Returns:
        o [B, T, HV, V] in the dtype of v, zeros past `cu_seqlens[-1]`; the final state in the dtype of `initial_state`,
        fp32 without one, or None; and, if asked for, the intermediate states [B, NT, HV, K, V] in that dtype. For
        packed sequences NT counts the chunks of all of them, in order. Where the values of `cu_seqlens` cannot be read
        without waiting (on a GPU without `cu_seqlens_cpu`, or compiled), NT is the most chunks that there could be,
        `min(T, (T + 63 N) // 64)`, and the rows beyond the real ones mean nothing.

    Raises:
        ValueError: a shape, dtype or value is wrong. TypeError: an argument is of the wrong kind.
        RuntimeError: tensors on different devices, or a backend asked for that cannot serve, with the reason.

    Source: arXiv 2510.26692, sections 2 and 3.
    """
    inputs = KDAInputs(
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        A_log,
        dt_bias,
        cu_seqlens,
        state_v_first=state_v_first if transpose_state_layout is None else transpose_state_layout,
        scale=checks.default_scale(q) if scale is None else scale,
        lower_bound=lower_bound,
        use_gate=use_gate_in_kernel,
        use_qk_norm=use_qk_l2norm_in_kernel,
        use_beta_sigmoid=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
    )
    o, final_state, states = _kda(
        "chunk_kda",
        inputs,
        cu_seqlens_cpu=cu_seqlens_cpu,
        safe_gate=safe_gate,
        output_final_state=output_final_state,
        intermediate_states=return_intermediate_states,
        backend=backend,
    )
    return (o, final_state, states) if return_intermediate_states else (o, final_state)


def recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    safe_gate: bool = False,
    use_gate_in_kernel: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    transpose_state_layout: bool | None = None,
    return_intermediate_states: bool = False,
    return_token_states: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Kimi Delta Attention token by token, for decoding and short blocks: FLA's `fused_recurrent_kda`.

    The function is that of :func:`chunk_kda`, and so are the arguments, results and errors. Besides those:

    Args:
        state_indices: [N] int32 or int64. `initial_state` is then a pool [P, HV, K, V] ([V, K] with `state_v_first`):
            sequence n starts from row `state_indices[n]` and leaves its final state there, in place. A negative index
            skips the sequence: its output is zeros and the pool is untouched. The rows must differ. Not differentiable.
        return_token_states: return also the states after every token, [B, T, HV, K, V] in the dtype of the final state;
            they mean nothing for tokens of no sequence, or of one that is skipped. Not differentiable, and not together
            with `return_intermediate_states`.

    Returns:
        as :func:`chunk_kda`; with `state_indices` the final state is the pool.
    """
    if return_token_states and return_intermediate_states:
        raise ValueError("`return_token_states` and `return_intermediate_states` ask for different third results")
    inputs = KDAInputs(
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        A_log,
        dt_bias,
        cu_seqlens,
        state_v_first=state_v_first if transpose_state_layout is None else transpose_state_layout,
        scale=checks.default_scale(q) if scale is None else scale,
        lower_bound=lower_bound,
        use_gate=use_gate_in_kernel,
        use_qk_norm=use_qk_l2norm_in_kernel,
        use_beta_sigmoid=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
    )
    o, final_state, states = _kda(
        "recurrent_kda",
        inputs,
        state_indices=state_indices,
        cu_seqlens_cpu=cu_seqlens_cpu,
        safe_gate=safe_gate,
        output_final_state=output_final_state,
        intermediate_states=return_intermediate_states,
        token_states=return_token_states,
        backend=backend,
    )
    return (o, final_state, states) if return_intermediate_states or return_token_states else (o, final_state)


fused_recurrent_kda = recurrent_kda


def _kda(
    op: str,
    inputs: KDAInputs,
    *,
    state_indices: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None,
    safe_gate: bool,
    output_final_state: bool,
    intermediate_states: bool,
    token_states: bool = False,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    requires_grad = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs.tensors)
    wanted = (output_final_state, intermediate_states, token_states)
    if (
        cuda.serves_again(op, inputs.q)
        and backend in (None, "auto", "cuda")
        and not requires_grad
        and cu_seqlens_cpu is None
        and not (safe_gate and inputs.lower_bound is None)
    ):
        results = _by_extension(op, inputs, wanted, state_indices)
        if not isinstance(results, str):
            return results if token_states else _without_spare_chunks(*results, inputs)
    checks.kda(inputs, state_indices, cu_seqlens_cpu, safe_gate)
    q, v, initial_state = inputs.q, inputs.v, inputs.initial_state
    if state_indices is not None and (requires_grad or intermediate_states):
        lacking = "gradients" if requires_grad else "intermediate states"
        raise ValueError(
            f"`state_indices` updates the states in place, which has no {lacking}; got a call that wants them"
        )
    if token_states and requires_grad:
        raise ValueError("`return_token_states` has no gradients; got a call that wants them: use torch.no_grad()")
    call = backends.Call(
        op,
        q.device,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        requires_grad,
        state_dtype=None if initial_state is None else initial_state.dtype,
        tokens=q.shape[1],
        sequences=1 if inputs.cu_seqlens is None else inputs.sequences,
        packed=inputs.cu_seqlens is not None,
        intermediate_states=intermediate_states,
        token_states=token_states,
        state_pool=state_indices is not None,
        mixed_dtypes=inputs.has_mixed_dtypes,
    )
    chosen = backends.select(call, backend)
    if chosen == "cuda":
        results = _by_extension(op, inputs, wanted, state_indices)
        if not isinstance(results, str):
            cuda.note_served(op, q)
            return results if token_states else _without_spare_chunks(*results, inputs, cu_seqlens_cpu)
        chosen = backends.select(call._replace(extension_refusal=results), backend)
    if chosen == "fla":
        o, final_state = fla.kda(op, inputs, cu_seqlens_cpu, safe_gate, output_final_state, requires_grad)
        return o, final_state, None
    if state_indices is not None:
        o, states = torch.ops.kda_hf.recurrent_kda_pool(*inputs, state_indices, token_states)
        return o, initial_state if output_final_state else None, states if token_states else None
    if op == "recurrent_kda" and not intermediate_states:
        o, final_state, states = torch.ops.kda_hf.recurrent_kda(*inputs, output_final_state, token_states)
        return o, final_state if output_final_state else None, states if token_states else None
    o, final_state, states = torch.ops.kda_hf.chunk_kda(*inputs, output_final_state, intermediate_states)
    final_state, states = final_state if output_final_state else None, states if intermediate_states else None
    return _without_spare_chunks(o, final_state, states, inputs, cu_seqlens_cpu)


def _by_extension(
    op: str, inputs: KDAInputs, wanted: tuple[bool, bool, bool], state_indices: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | str:
    if op == "recurrent_kda":
        return cuda.recurrent_kda(inputs, *wanted, state_indices)
    return cuda.chunk_kda(inputs, *wanted[:2])


def _without_spare_chunks(
    o: torch.Tensor,
    final_state: torch.Tensor | None,
    states: torch.Tensor | None,
    inputs: KDAInputs,
    cu_seqlens_cpu: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The intermediate states of packed sequences cut to as many as there are, where the bounds can be read."""
    bounds = inputs.cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    if states is not None and bounds is not None and checks.values_are_readable(bounds):
        states = states[:, : sum(chunked.chunks_of(length) for length in bounds.diff().tolist())]
    return o, final_state, states


def kda_decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    output_gate: torch.Tensor,
    *,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    q_conv_weight: torch.Tensor,
    k_conv_weight: torch.Tensor,
    v_conv_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float = 1e-5,
    scale: float | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    state_indices: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """One token through a KDA layer, from its projections to the input of `o_proj`: convolution and SiLU of q, k and v,
    L2 norm of q and k, gate, sigmoid of β, recurrence, and the norm of the output times the sigmoid of its gate,
    `rms_norm(o) * norm_weight * sigmoid(output_gate)`. Both states are updated in place. Not differentiable.

    Args:
        q, k: projections [B, 1, H, K] before the convolution, bf16, fp16, fp32 or fp64; any strides.
        v: projection [B, 1, HV, V] before the convolution, HV a multiple of H.
        g: gate logits [B, 1, HV, K].
        beta: logits [B, 1, HV].
        output_gate: logits [B, 1, HV, V].
        conv_state: [B, 2 * H * K + HV * V, W], the last W inputs of q, k and v side by side, oldest first.
        recurrent_state: [B, HV, K, V], or [B, HV, V, K] with `state_v_first`.
        q_conv_weight, k_conv_weight: [H * K, W]; the last column meets the current token.
        v_conv_weight: [HV * V, W].
        norm_weight: [V].
        norm_eps: what the norm adds to the mean of the squares.
        scale, A_log, dt_bias, lower_bound, allow_neg_eigval: as in :func:`chunk_kda`.
        state_indices: [B] int32 or int64. Both states are then pools of P rows, and sequence b has row
            `state_indices[b]` of each. A negative index, or one past the end, skips the sequence: its output is zeros
            and the pools are untouched. The others must differ.
        backend: "cuda", "cpu" or "torch"; by default KDA_HF_BACKEND decides, and else the best that can serve.

    Returns:
        [B, 1, HV, V] in the dtype of v.

    Raises:
        ValueError: a shape, dtype or value is wrong. TypeError: an argument is of the wrong kind.
        RuntimeError: tensors on different devices, or a backend asked for that cannot serve, with the reason.

    Source: arXiv 2510.26692, sections 2 and 4.
    """
    inputs = KDAInputs(
        q,
        k,
        v,
        g,
        beta,
        recurrent_state,
        A_log,
        dt_bias,
        None,
        state_v_first=state_v_first,
        scale=checks.default_scale(q) if scale is None else scale,
        lower_bound=lower_bound,
        use_gate=True,
        use_qk_norm=True,
        use_beta_sigmoid=True,
        allow_neg_eigval=allow_neg_eigval,
    )
    weights = (q_conv_weight, k_conv_weight, v_conv_weight)
    # fmt: off
    arguments = (q, k, v, g, beta, output_gate, inputs.scale, A_log, dt_bias, lower_bound, recurrent_state, conv_state,
                 *weights, norm_weight, norm_eps, state_indices, allow_neg_eigval, state_v_first)
    # fmt: on
    tensors = (*inputs.tensors, output_gate, conv_state, *weights, norm_weight)
    requires_grad = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)
    if not requires_grad and backend in (None, "auto", "cuda") and cuda.serves_again("kda_decode_step", q):
        out = cuda.decode_step(*arguments)
        if not isinstance(out, str):
            return out
    if not requires_grad and backend in (None, "auto", "cpu") and cpu.serves_again(q):
        out = cpu.decode_step(*arguments)
        if not isinstance(out, str):
            return out
    checks.decode_step(inputs, output_gate, conv_state, weights, norm_weight, norm_eps, state_indices)
    if requires_grad:
        raise ValueError("`kda_decode_step` updates the states in place, which has no gradients; use torch.no_grad()")
    call = backends.Call(
        "kda_decode_step",
        q.device,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        state_dtype=recurrent_state.dtype,
        state_pool=state_indices is not None,
        mixed_dtypes=inputs.has_mixed_dtypes,
    )
    chosen = backends.select(call, backend)
    if chosen == "cuda":
        out = cuda.decode_step(*arguments)
        if not isinstance(out, str):
            cuda.note_served("kda_decode_step", q)
            return out
        backends.select(call._replace(extension_refusal=out), backend)
    if chosen == "cpu":
        out = cpu.decode_step(*arguments)
        if not isinstance(out, str):
            cpu.note_served()
            return out
        backends.select(call._replace(extension_refusal=out), backend)
    return torch.ops.kda_hf.kda_decode_step(*arguments)


def has_kernel(op: str, x: torch.Tensor, K: int, V: int, state_dtype: torch.dtype) -> bool:
    """Whether a kernel of ours serves inference with `op` for tensors like x: what else there is may be slower than
    another way."""
    return backends.has_kernel(backends.Call(op, x.device, x.dtype, K, V, state_dtype=state_dtype))


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = "silu",
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal depthwise convolution over tokens: y_t = activation(bias + Σ_w weight[:, w] x_{t - W + 1 + w}).

    Args:
        x: [B, T, D], bf16, fp16 or fp32; computed in fp32.
        weight: [D, W]; the last column meets the current token.
        bias: [D] or None.
        activation: "silu", "swish" (the same) or None.
        initial_state: [N, D, W], the last W inputs before the first token, oldest first; zeros by default. N is B, or
            the number of packed sequences. Column 0 is out of the reach of the first token.
        output_final_state: whether to return the last W inputs of each sequence.
        cu_seqlens: [N + 1] int32 or int64, boundaries of sequences packed along T; B must be 1. Some may be empty.

    Returns:
        y [B, T, D] in the dtype of x, zeros past `cu_seqlens[-1]`; and the final state [N, D, W] in the dtype of
        `initial_state`, else of x, or None.

    Raises:
        ValueError: a shape, dtype or value is wrong. TypeError: an argument is of the wrong kind.
        RuntimeError: tensors on different devices, or a backend demanded by KDA_HF_BACKEND that cannot serve.

    Source: arXiv 2510.26692, section 4 (the short convolution before q, k and v).
    """
    checks.conv(x, weight, bias, activation, initial_state, cu_seqlens)
    tensors = (x, weight, bias, initial_state)
    requires_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    call = backends.Call(
        "causal_conv1d",
        x.device,
        x.dtype,
        requires_grad=requires_grad,
        tokens=x.shape[1],
        packed=cu_seqlens is not None,
        conv_states=initial_state is not None or output_final_state,
    )
    backend = backends.select(call)
    if backend == "cuda":
        results = cuda.causal_conv1d(*tensors, activation, cu_seqlens, output_final_state)
        if not isinstance(results, str):
            return results
        backend = backends.select(call._replace(extension_refusal=results))
    if backend == "fla":
        return fla.causal_conv1d(x, weight, bias, activation, cu_seqlens), None
    y, final_state = torch.ops.kda_hf.causal_conv1d(*tensors, activation, cu_seqlens, output_final_state)
    return y, final_state if output_final_state else None
