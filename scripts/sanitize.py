"""One call of the kernels for each instance and each kind of sequence, small: scripts/sanitize.sh runs it.

The first argument names compute-sanitizer's tool, since racecheck can't follow two of the calls. Others choose parts of
the calls: rows, choose, conv, decode, prefill."""

import itertools
import sys

import torch

from kda_hf import ops


DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = ((128, 128), (64, 64), (128, 64), (64, 128))
GATES = ("given", "safe", "softplus", "steep softplus")
LENGTHS = (None, [1, 0, 65, 64, 17])  # dense and packed


def run(
    dtype: torch.dtype, K: int, V: int, gate: str, lengths: list[int] | None, state_v_first: bool, HV: int = 2
) -> None:
    B, T, H = (2, 130, 1) if lengths is None else (1, sum(lengths) + 3, 1)
    N = B if lengths is None else len(lengths)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()  # made on the CPU: no other kernel writes it

    g = tensor(B, T, HV, K)
    inputs = {"q": tensor(B, T, H, K), "k": tensor(B, T, H, K), "v": tensor(B, T, HV, V), "beta": tensor(B, T, HV)}
    if gate == "given":
        inputs["g"] = -g.cpu().float().abs().cuda()
    else:
        spread = 30.0 if gate == "steep softplus" else 1.0  # beyond the range of the factored form
        shift = {"mild": -6.5, "steep": 3.0}.get(gate, 0.0)
        inputs |= {"g": (g.cpu() * spread).cuda(), "A_log": tensor(HV, dtype=torch.float32)}
        inputs |= {"dt_bias": (tensor(HV, K, dtype=torch.float32).cpu() + shift).cuda()}
        inputs |= {"lower_bound": -5.0 if gate in ("safe", "mild", "steep") else None}
    state = (V, K) if state_v_first else (K, V)
    state_dtype = torch.bfloat16 if state_v_first else torch.float32
    results = ops.chunk_kda(
        **inputs,
        initial_state=tensor(N, HV, *state, dtype=state_dtype),
        output_final_state=True,
        use_gate_in_kernel=gate != "given",
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        state_v_first=state_v_first,
        return_intermediate_states=state_v_first,
        cu_seqlens=None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)]).cuda(),
        backend="cuda",
    )
    # Reading every output tells initcheck whether all of it was written.
    assert all(x.cpu().isfinite().all() for x in results[:2])


def run_recurrent(
    dtype: torch.dtype,
    K: int,
    V: int,
    gate: str,
    lengths: list[int] | None,
    state_v_first: bool,
    state: torch.dtype,
    sequences: int = 3,
    tokens: int = 2,
) -> None:
    """A few tokens: into states of their own, and in place in a pool, of which one sequence has no row.

    `sequences`, `tokens`: how many sequences there are, and tokens of each, where they are dense."""
    B, T, H, HV = (sequences, tokens, 1, 2) if lengths is None else (1, sum(lengths) + 3, 1, 2)
    N = B if lengths is None else len(lengths)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()  # made on the CPU: no other kernel writes it

    inputs = {"q": tensor(B, T, H, K), "k": tensor(B, T, H, K), "v": tensor(B, T, HV, V), "beta": tensor(B, T, HV)}
    inputs["g"] = -tensor(B, T, HV, K).abs() if gate == "given" else tensor(B, T, HV, K)
    if gate != "given":
        inputs |= {"A_log": tensor(HV, dtype=torch.float32), "dt_bias": tensor(HV, K, dtype=torch.float32)}
        inputs |= {"lower_bound": -5.0 if gate == "safe" else None}
    matrix = (V, K) if state_v_first else (K, V)
    pool = torch.arange(N) + 1
    pool[0] = -1
    for indices in (None, pool.cuda()):
        results = ops.recurrent_kda(
            **inputs,
            initial_state=tensor(N if indices is None else N + 2, HV, *matrix, dtype=state),
            output_final_state=True,
            use_gate_in_kernel=gate != "given",
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=state_v_first,
            cu_seqlens=None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)]).cuda(),
            state_indices=indices,
            backend="cuda",
        )
        assert all(x.cpu().isfinite().all() for x in results)


def run_step(
    dtype: torch.dtype,
    K: int,
    V: int,
    width: int,
    state_v_first: bool,
    state: torch.dtype,
    HV: int,
    sequences: int = 3,
) -> None:
    B, H = sequences, 1

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()

    states = {
        "recurrent_state": tensor(B + 1, HV, *((V, K) if state_v_first else (K, V)), dtype=state),
        "conv_state": tensor(B + 1, 2 * H * K + HV * V, width),
    }
    out = ops.kda_decode_step(
        *(tensor(B, 1, heads, size) for heads, size in ((H, K), (H, K), (HV, V), (HV, K))),
        tensor(B, 1, HV),
        tensor(B, 1, HV, V),
        **states,
        q_conv_weight=tensor(H * K, width),
        k_conv_weight=tensor(H * K, width),
        v_conv_weight=tensor(HV * V, width),
        norm_weight=tensor(V),
        lower_bound=-5.0 if state_v_first else None,
        state_v_first=state_v_first,
        state_indices=torch.tensor([B, -1, *range(B - 2)]).cuda(),
        backend="cuda",
    )
    assert all(x.cpu().isfinite().all() for x in (out, *states.values()))


def run_low_rank_step(dtype: torch.dtype, B: int, H: int, state: torch.dtype) -> None:
    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()

    channels = H * 128
    q, k, v, out = (tensor(B, 1, H, 128) for _ in range(4))
    beta, g, output_gate = tensor(B, 1, H), tensor(B, 1, 1, 128), tensor(B, 1, 1, 128)
    states = tensor(B, H, 128, 128, dtype=state), tensor(B, 3 * channels, 4)
    conv_weights = (tensor(channels, 4) for _ in range(3))
    torch.ops.kda_hf_cuda.decode_step(
        q, k, v, g, beta, output_gate, 0.1, out, tensor(H), tensor(channels), None, *states, *conv_weights, tensor(128),
        1e-5, None, False, False, tensor(channels, 128), tensor(channels, 128),
    )  # fmt: skip
    assert all(x.cpu().isfinite().all() for x in (out, *states))


def run_conv(dtype: torch.dtype, width: int, lengths: list[int] | None, state: torch.dtype | None) -> None:
    """In place where there is a state, on the raw operator: `causal_conv1d` has no choice of backend."""
    B, T, D = (2, 37, 264) if lengths is None else (1, sum(lengths) + 3, 40)
    N = B if lengths is None else len(lengths)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()

    y = torch.empty(B, T, D, dtype=dtype, device="cuda")
    states = None if state is None else tensor(N, D, width, dtype=state)
    bounds = None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)]).cuda()
    torch.ops.kda_hf_cuda.causal_conv1d(
        tensor(B, T, D), tensor(D, width), tensor(D), states, bounds, y, states, state is not None
    )
    assert y.cpu().isfinite().all() and (states is None or states.cpu().isfinite().all())


def run_rows(dtype: torch.dtype, M: int, N: int, K: int) -> None:
    """Products of a decode step, with and without what they do besides, and what stands between those of more rows."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()

    linear = torch.ops.kda_hf_cuda.linear
    x, weight, norm, residual = tensor(M, K), tensor(2 * N, K) / K**0.5, tensor(K), tensor(M, 2 * N)
    out = torch.empty(M, 2 * N, dtype=dtype, device="cuda")
    half = torch.empty(M, N, dtype=dtype, device="cuda")
    of_norm: tuple[torch.Tensor | float | None, ...] = (norm, 1e-6, None)
    if M > 8:
        of_norm = (None, 1e-6, (torch.rand(M, 8) * K / 4).cuda())
    linear(x, weight, out, None, 0.0, None, None, None, None, None, 1, False)
    linear(x, weight, residual, *of_norm, residual, None, None, None, 1, False)
    linear(x, weight, half, *of_norm, None, None, None, None, 1, True)
    normed = torch.empty_like(x)
    torch.ops.kda_hf_cuda.rms_norm(x, norm, 1e-6, normed)
    assert all(y.cpu().isfinite().all() for y in (out, residual, half, normed))
    if M > 8:
        squares = torch.empty(M, torch.ops.kda_hf_cuda.linear_parts(M, 2 * N, K), device="cuda")
        next_x = torch.empty_like(out)
        linear(x, weight, out, None, 0.0, None, residual, tensor(2 * N), next_x, squares, 1, False)
        assert next_x.cpu().isfinite().all() and squares.cpu().isfinite().all()
    if N % 8 == 0:
        torch.ops.kda_hf_cuda.swiglu(out, half)
    if N % 64 == 0:
        linear(tensor(M, 2 * K), weight, out, None, 0.0, None, None, None, None, None, 2, False)
    assert half.cpu().isfinite().all() and out.cpu().isfinite().all()


def run_gated_norm(dtype: torch.dtype, M: int, N: int) -> None:
    x, gate = (torch.randn(M, N, device="cuda", dtype=dtype) for _ in range(2))
    weight, out = torch.randn(N, device="cuda", dtype=dtype), torch.empty_like(x)
    torch.ops.kda_hf_cuda.gated_rms_norm(x, weight, gate, 1e-6, out)
    assert out.cpu().isfinite().all()


def run_attention(dtype: torch.dtype, H: int, KVH: int, D: int, lengths: tuple[int, ...]) -> None:
    """A step of attention after another, with one workspace."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).cuda()

    B, capacity = 2, max(lengths) + 5
    keys, values = tensor(B, KVH, capacity, D), tensor(B, KVH, capacity, D)
    size = torch.ops.kda_hf_cuda.attention_step_workspace_bytes(B, H, KVH, D, capacity)
    workspace, starts = torch.zeros(size, dtype=torch.uint8).cuda(), torch.tensor([0, 3]).cuda()
    for length in lengths:
        out = torch.empty(B, H, D, dtype=dtype, device="cuda")
        torch.ops.kda_hf_cuda.attention_step(
            *(tensor(B, heads, D) for heads in (H, KVH, KVH)), keys, values, torch.tensor([length]).cuda(), starts,
            tensor(D), tensor(D), 1e-6, tensor(B, D), tensor(B, D), D**-0.5, workspace, out,
        )  # fmt: skip
        assert out.cpu().isfinite().all()


def run_choice(dtype: torch.dtype, V: int, top_k: int, top_p: float, draws: bool) -> None:
    """Of logits of which many are equal, so that a cut goes between equals."""
    logits = (torch.randn(3, V) * 2).round().to(dtype).cuda()
    noise = torch.empty(3, V).exponential_().cuda() if draws else None
    pad, eos = torch.tensor(1).cuda(), torch.tensor([0, 2]).cuda()
    unfinished, tokens = torch.tensor([True, False, True]).cuda(), torch.empty(3, dtype=torch.long).cuda()
    torch.ops.kda_hf_cuda.choose_tokens(logits, noise, 0.7, top_k, top_p, 0.01, pad, eos, unfinished, tokens)
    assert tokens.cpu().lt(V).all() and tokens.cpu().ge(0).all() and unfinished.cpu().numel() == 3


def choose() -> None:
    for dtype, V in itertools.product((*DTYPES, torch.float32), (5, 97, 5001)):
        for top_k, top_p, draws in ((V, 1.0, False), (V, 1.0, True), (50, 1.0, True), (V, 0.8, True), (50, 0.9, True)):
            run_choice(dtype, V, top_k, top_p, draws)


def rows(tool: str) -> None:
    shapes = [(64, 128), (33, 264), (40, 1024)]
    # racecheck takes minutes for a product of many CTAs, and does not come to an end where a CTA of a cluster has
    # three chunks of columns or more: products are then in flight while a barrier is told of others.
    if tool != "racecheck":
        shapes += [(40, 2560), (4608, 1032)]
    for dtype, M, (N, K) in itertools.product(DTYPES, (1, 8, 11, 31), shapes):
        if M <= 8 or N % 8 == 0:
            print(f"  {dtype}: {M} rows of x, {K} columns, {N} of the weight", flush=True)
            run_rows(dtype, M, N, K)
    for dtype, M, N in itertools.product(DTYPES, (1, 37), (64, 128, 256)):
        run_gated_norm(dtype, M, N)
    for dtype, D, (H, KVH) in itertools.product(DTYPES, (64, 128), ((16, 4), (9, 1), (32, 1))):
        print(f"  {dtype}: attention of {H} and {KVH} heads of {D}", flush=True)
        run_attention(dtype, H, KVH, D, (0, 3, 127, 128, 300, 2100))


def conv() -> None:
    for dtype, width, state in itertools.product((*DTYPES, torch.float32), (2, 3, 4), (None, torch.float32, *DTYPES)):
        for lengths in (None, [5, 0, 1, 2, 3, 70]):
            run_conv(dtype, width, lengths, state)


def decode() -> None:
    for dtype, state, (K, V), v_first in itertools.product(
        (*DTYPES, torch.float32), (torch.float32, torch.bfloat16), WIDTHS, (False, True)
    ):
        for gate, lengths in zip(GATES[:3], (None, [1, 0, 33, 16, 17], [1, 1, 1]), strict=True):
            run_recurrent(dtype, K, V, gate, lengths, v_first, state)
        for HV in (1, 2):
            run_step(dtype, K, V, 4 if v_first else 3, v_first, state, HV)
    # Four CTAs a head, two, and one, on 132 SMs.
    for dtype, state, (B, H) in itertools.product(DTYPES, (torch.float32, torch.bfloat16), ((3, 2), (50, 1), (70, 1))):
        run_low_rank_step(dtype, B, H, state)
    # So many sequences that CTAs hint at what later ones need, and, but for one token, have more value channels.
    for v_first, state in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        for lengths, tokens in ((None, 1), (None, 2), ([1, 0, 2] * 80, 0), ([3, 0, 2] * 80, 0)):
            run_recurrent(torch.bfloat16, 128, 128, "safe", lengths, v_first, state, sequences=240, tokens=tokens)
        run_step(torch.bfloat16, 128, 128, 4, v_first, state, HV=2, sequences=240)


def prefill(tool: str) -> None:
    for dtype, (K, V), gate, lengths in itertools.product(DTYPES, WIDTHS, GATES, LENGTHS):
        run(dtype, K, V, gate, lengths, state_v_first=dtype == torch.float16)
    for (K, V), v_first in zip(WIDTHS, (False, True, True, False), strict=True):  # states are composed
        run(torch.bfloat16, K, V, "mild", [3100, 70], state_v_first=v_first)
    run(torch.bfloat16, 128, 128, "steep", [1500, 70], state_v_first=True)  # segments that begin with zeros
    if tool != "racecheck":  # which does not see what the CTAs of a cluster tell each other's barriers
        run(torch.bfloat16, 128, 128, "mild", [4800], state_v_first=False, HV=20)  # composed, by clusters
        run(torch.bfloat16, 128, 128, "safe", [2048], state_v_first=False, HV=96)  # as below, with clusters
    run(torch.bfloat16, 128, 64, "safe", [2048], state_v_first=False, HV=96)  # both kernels side by side


def main() -> None:
    tool, *chosen = sys.argv[1:] or [""]
    torch.manual_seed(0)
    parts = {
        "rows": lambda: rows(tool),
        "choose": choose,
        "conv": conv,
        "decode": decode,
        "prefill": lambda: prefill(tool),
    }
    for name, part in parts.items():
        if not chosen or name in chosen:
            print(name, flush=True)
            part()
    torch.cuda.synchronize()
    print("every call served")


if __name__ == "__main__":
    main()
