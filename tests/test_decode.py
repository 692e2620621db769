"""The CUDA decode kernels, through `recurrent_kda` and `kda_decode_step`, against float64. They need a GPU."""

import itertools
import math
import os

import pytest
import test_fwd
import test_ops_decode_step as layer
import torch
import torch.nn.functional as F
from test_fwd import DEVICE, GATES, WIDTHS, Guarded, arguments, error, packed, randn

from kda_hf import ops
from kda_hf.ops import cuda
from kda_hf.ops.rows import KernelRows


pytestmark = test_fwd.pytestmark

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STATES = [torch.float32, torch.bfloat16]
# Relative L2: rounding the output to its dtype, and the state to bf16, is nearly all of it.
OUTPUT_BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4, torch.float32: 3e-6}
STATE_BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2.5e-3}
PER_TOKEN = ("q", "k", "v", "g", "beta")


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    for variable in ("KDA_HF_BACKEND", "FLA_FLASH_KDA", "KDA_HF_CHECK"):
        monkeypatch.delenv(variable, raising=False)


def kernel(inputs, **others):
    return ops.recurrent_kda(**inputs, **{"output_final_state": True, "backend": "cuda"} | others)


def exact(inputs, **others):
    """o and the final state in float64, of the values that the kernel is given."""
    doubles = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    return ops.recurrent_kda(**doubles, output_final_state=True, backend="torch", **others)


def assert_close(o, state, expected):
    assert error(o, expected[0]) <= OUTPUT_BOUNDS[o.dtype]
    assert error(state, expected[1]) <= STATE_BOUNDS[state.dtype]


def check(inputs):
    o, state = kernel(inputs)
    assert o.dtype == inputs["v"].dtype and o.is_contiguous() and state.is_contiguous()
    assert_close(o, state, exact(inputs))


def values_first(inputs):
    state = inputs.get("initial_state")
    others = {} if state is None else {"initial_state": state.mT.contiguous()}
    return inputs | {"state_v_first": True} | others


def tokens_of(inputs, *where):
    return inputs | {name: inputs[name][where] for name in PER_TOKEN}


def guarded(inputs):
    """Guarded `out`, `final_state` and `states` for the raw operator."""
    B, T, HV, _ = inputs["v"].shape
    state = inputs["initial_state"]
    return (
        Guarded(*inputs["v"].shape, dtype=inputs["v"].dtype),
        Guarded(*state.shape, dtype=state.dtype),
        Guarded(B, T, *state.shape[1:], dtype=state.dtype),
    )


# -------------------------------------------------------------------------------------------------------- recurrent_kda


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 15, 16])
def test_lengths_gates_widths_dtypes(T, gate, widths, dtype):
    for state in STATES:
        inputs = arguments(3, T, 2, 4, *widths, gate, dtype, state=state)
        check(inputs)
        check(values_first(inputs))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("beta", ["given", "sigmoid", "negative"])
@pytest.mark.parametrize(
    "gate",
    ["given", *(f"{g}{w}" for g in ("safe", "softplus") for w in ("", " -A_log", " -dt_bias", " -A_log -dt_bias"))],
)
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state", [None, *STATES])
def test_flags(state, v_first, gate, beta, norm):
    inputs = arguments(2, 3, 2, 2, gate="softplus" if gate.startswith("softplus") else "steep", state=state)
    inputs["use_qk_l2norm_in_kernel"] = norm
    if not norm:
        inputs["k"] = F.normalize(inputs["k"].float(), dim=-1).bfloat16()
    inputs["use_beta_sigmoid_in_kernel"] = beta != "given"
    inputs["allow_neg_eigval"] = beta == "negative"
    if beta == "given":
        inputs["beta"] = inputs["beta"].sigmoid()
    if gate == "given":
        inputs |= {"use_gate_in_kernel": False, "g": -inputs["g"].abs(), "lower_bound": None}
    inputs |= {name: None for name in ("A_log", "dt_bias") if gate == "given" or f"-{name}" in gate}
    if v_first:
        inputs = values_first(inputs)
    check(inputs)
    check(inputs | {"scale": -0.5, "g": inputs["g"].float(), "beta": inputs["beta"].float()})


@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (2, 8), (3, 6), (5, 5), (4, 32)])
def test_grouped_value_heads(heads):
    check(arguments(2, 3, *heads, gate="bimodal"))
    check(values_first(packed([2, 0, 1], 1, H=heads[0], HV=heads[1], gate="bimodal")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes(dtype):
    inputs = arguments(2, 2)
    for names in (("A_log", "dt_bias"), ("A_log",), ("dt_bias",)):
        check(inputs | {name: inputs[name].to(dtype) for name in names})
    check(inputs | {"dt_bias": inputs["dt_bias"].to(dtype).flatten()})


@pytest.mark.parametrize("dtypes", [(torch.float32, None), (None, torch.float32), (torch.float32, torch.float32)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_g_and_beta_in_fp32(dtype, dtypes):
    inputs = arguments(2, 5, dtype=dtype)
    check(inputs | {name: inputs[name].to(other or dtype) for name, other in zip(("g", "beta"), dtypes, strict=True)})


@pytest.mark.parametrize("steps", [0.0, 1.0, 20.0, 100.0, 3e3, math.inf])
def test_any_decay_is_exact(steps):
    """Log-decays between 0 and -`steps`, drawn for each token and channel: none may overflow, or be clamped."""
    inputs = arguments(1, 16) | {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None, "lower_bound": None}
    uniform = torch.rand(1, 16, 2, 128, device=DEVICE)
    inputs["g"] = torch.where(uniform < 0.5, 0.0, -math.inf) if steps == math.inf else -uniform.pow(4) * steps
    check(inputs)
    check(values_first(inputs))


# At most 16 tokens a sequence on average, spare ones included.
PACKINGS = {
    "one token": [1],
    "all empty": [0, 0, 0],
    "empty at the ends": [0, 7, 0],
    "last": [0, 0, 1],
    "odd": [1, 0, 16, 3],
    "full": [16, 16, 3],
    "one longer than 16": [33, 1, 0, 2],
    "single tokens": [1] * 70,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_packed(lengths, spare, integer, dtype):
    inputs = packed(lengths, spare, integer, gate="mild", dtype=dtype)
    for call in (inputs, values_first(inputs)):
        check(call)
        assert not kernel(call)[0][:, sum(lengths) :].any()


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_many_sequences(widths, state, v_first):
    others = {"state": state, **dict(zip("KV", widths, strict=True))}
    for inputs in (
        arguments(400, 1, 2, 4, **others),
        arguments(400, 2, 2, 4, **others),
        arguments(400, 1, 3, 3, **others) | {"initial_state": None},
        packed(torch.randint(0, 3, (4096,)).tolist(), H=1, HV=2, **others),
        packed([3, *torch.randint(0, 6, (1000,)).tolist()], H=1, HV=2, **others),
    ):
        check(values_first(inputs) if v_first else inputs)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("T", [1, 2])
def test_many_sequences_of_a_pool(T, state, v_first):
    """Rows in any order, some without one: those of the others stay what they are."""
    inputs = arguments(400, T, 2, 4, N=500, state=state)
    inputs = values_first(inputs) if v_first else inputs
    before = inputs["initial_state"].clone()
    indices = torch.randperm(500, device=DEVICE)[:400]
    has_row = torch.rand(400, device=DEVICE) < 0.9
    expected = exact(inputs | {"initial_state": before[indices]})
    o, pool = kernel(inputs, state_indices=torch.where(has_row, indices, -1))
    assert error(o[has_row], expected[0][has_row]) <= OUTPUT_BOUNDS[o.dtype] and not o[~has_row].any()
    assert error(pool[indices[has_row]], expected[1][has_row]) <= STATE_BOUNDS[state]
    unused = torch.ones(500, dtype=torch.bool, device=DEVICE)
    unused[indices[has_row]] = False
    assert torch.equal(pool[unused], before[unused])


def test_more_sequences_than_a_grid_takes():
    """Without a state, a token's output is β (k · q) v."""
    inputs = arguments(70_000, 1, 1, 1, 64, 64, state=None)
    o, state = kernel(inputs, output_final_state=False)
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (inputs[n].double() for n in "qk"))
    weights = inputs["beta"].double().sigmoid() * (q * k).sum(-1) * 64**-0.5
    assert state is None and error(o, weights.unsqueeze(-1) * inputs["v"].double()) <= OUTPUT_BOUNDS[torch.bfloat16]


@pytest.mark.parametrize(
    ("make", "others", "expected"),
    [
        (lambda: arguments(2, 16), {}, "recurrent"),
        (lambda: arguments(2, 17), {}, "prefill"),
        (lambda: packed([30, 0], 2), {}, "recurrent"),
        (lambda: packed([30, 0], 3), {}, "prefill"),
        (lambda: arguments(2, 1), {"return_intermediate_states": True}, "prefill"),
        (lambda: arguments(2, 17), {"return_token_states": True}, "recurrent"),
        (lambda: arguments(2, 17), {"state_indices": [1, 0]}, "recurrent"),
        (lambda: packed([30, 0], 3), {"state_indices": [1, 0]}, "recurrent"),
    ],
)
def test_which_kernel_serves(make, others, expected, monkeypatch):
    calls, call = [], cuda._call
    monkeypatch.setattr(
        cuda, "_call", lambda *args, **how: calls.append(how.get("kernel", "prefill")) or call(*args, **how)
    )
    others = {name: torch.tensor(x, device=DEVICE) if isinstance(x, list) else x for name, x in others.items()}
    kernel(make(), **others)
    assert calls == [expected]


def test_views_of_one_projection():
    widths = {"q": (2, 128), "k": (2, 128), "v": (4, 64), "g": (4, 128)}
    flat = randn(3, 2, sum(a * b for a, b in widths.values()) + 16, dtype=torch.bfloat16)
    inputs, start = arguments(3, 2, 2, 4, V=64), 8
    for name, (heads, width) in widths.items():
        inputs[name] = flat[..., start : start + heads * width].unflatten(-1, (heads, width))
        start += heads * width
    check(inputs)
    check(
        inputs
        | {"k": inputs["k"].transpose(0, 1).contiguous().transpose(0, 1), "beta": inputs["beta"].mT.contiguous().mT}
    )


@pytest.mark.parametrize("name", PER_TOKEN)
@pytest.mark.parametrize("layout", test_fwd.LAYOUTS)
def test_any_layout(layout, name):
    inputs = arguments(2, 3)
    check(inputs | {name: test_fwd.laid_out(inputs[name], layout)})


def test_any_layout_of_initial_states_and_indices():
    inputs = arguments(3, 2)
    check(inputs | {"initial_state": inputs["initial_state"].mT})
    pool = inputs["initial_state"].clone()
    indices = torch.tensor([2, 7, 0, 7, 1, 7], device=DEVICE)[::2]
    expected = exact(inputs | {"initial_state": pool[indices]})
    o, _ = kernel(inputs | {"initial_state": pool}, state_indices=indices)
    assert_close(o, pool[indices], expected)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds", [[0, 50, 3, 9], [7, 2, 1, 0], [-4, 1, 2, 1000], [0, 2**31 - 1, 4, 12]])
def test_bad_bounds(bounds, integer, monkeypatch):
    """Nothing is written out of bounds, whatever the device's bounds say; and they are checked on demand."""
    inputs = packed([4, 4, 4]) | {"cu_seqlens": torch.tensor(bounds, dtype=integer, device=DEVICE)}
    buffers = guarded(inputs)
    raw(inputs, *(x.tensor for x in buffers))
    torch.cuda.synchronize()
    assert all(x.is_intact() for x in buffers)
    monkeypatch.setenv("KDA_HF_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens"):
        kernel(inputs)


# ---------------------------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("T", [1, 16, 17, 50])
def test_pool(T, state, v_first, dtype, integer):
    # Of 8: three of them are none, one of which ends with the bits of 3.
    rows = [5, -1, 0, 7, 2, -(2**31) if integer == torch.int32 else 2**32 + 3, 8]
    inputs = arguments(7, T, 2, 4, gate="mild", dtype=dtype, N=8, state=state)
    if v_first:
        inputs = values_first(inputs)
    pool = inputs["initial_state"]
    before = pool.clone()
    indices = torch.tensor(rows, dtype=integer, device=DEVICE)
    o, final_state = kernel(inputs, state_indices=indices)
    assert final_state is pool
    used = [i for i, row in enumerate(rows) if 0 <= row < 8]
    expected = exact(tokens_of(inputs, used) | {"initial_state": before[[rows[i] for i in used]]})
    assert_close(o[used], pool[[rows[i] for i in used]], expected)
    assert not o[[1, 5, 6]].any()
    assert all(torch.equal(pool[row], before[row]) for row in (1, 3, 4, 6))


def test_pool_of_packed_sequences():
    inputs = packed([3, 0, 1, 20], 2, gate="mild")
    inputs["initial_state"] = randn(6, 2, 128, 128)
    before = inputs["initial_state"].clone()
    indices = torch.tensor([4, 1, -1, 0], device=DEVICE)
    o, pool = kernel(inputs, state_indices=indices)
    expected = exact(inputs | {"initial_state": before[[4, 1, 2, 0]]})
    assert error(o[:, :3], expected[0][:, :3]) <= OUTPUT_BOUNDS[o.dtype]
    assert error(o[:, 4:24], expected[0][:, 4:24]) <= OUTPUT_BOUNDS[o.dtype]
    assert not o[:, 3].any() and not o[:, 24:].any()
    assert error(pool[[4, 0]], expected[1][[0, 3]]) <= STATE_BOUNDS[torch.float32]
    assert all(torch.equal(pool[row], before[row]) for row in (1, 2, 3, 5))


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("T", [1, 16])
def test_in_place_is_as_out_of_place(T, state, v_first):
    inputs = arguments(3, T, state=state)
    if v_first:
        inputs = values_first(inputs)
    o, final_state = kernel(inputs)
    out, alone = torch.full_like(o, math.nan), inputs["initial_state"].clone()
    raw(inputs | {"initial_state": alone, "scale": 128**-0.5}, out, alone)
    assert torch.equal(out, o) and torch.equal(alone, final_state)
    for order in ([0, 1, 2], [2, 0, 1]):
        pool = torch.empty_like(inputs["initial_state"])
        pool[order] = inputs["initial_state"]
        again, result = kernel(inputs | {"initial_state": pool}, state_indices=torch.tensor(order, device=DEVICE))
        assert result is pool and torch.equal(again, o) and torch.equal(pool[order], final_state)
    none = kernel(inputs, state_indices=torch.arange(3, device=DEVICE), output_final_state=False)
    assert none[1] is None and torch.equal(inputs["initial_state"], final_state)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("T", [17, 50])
def test_blocks_of_16_tokens_are_as_calls(T, v_first):
    inputs = arguments(2, T, gate="mild")
    if v_first:
        inputs = values_first(inputs)
    indices = torch.arange(2, device=DEVICE)
    pieces = inputs | {"initial_state": inputs["initial_state"].clone()}
    o, state = kernel(inputs, state_indices=indices)
    outputs = [
        kernel(tokens_of(pieces, slice(None), slice(start, start + 16)), state_indices=indices)[0]
        for start in range(0, T, 16)
    ]
    assert torch.equal(torch.cat(outputs, 1), o) and torch.equal(pieces["initial_state"], state)


def test_pool_without_a_valid_row():
    for inputs, N in ((arguments(3, 2, N=2), 3), (packed([2, 0, 3], 1), 3), (arguments(3, 2, N=0), 3)):
        before = inputs["initial_state"].clone()
        o, pool = kernel(inputs, state_indices=torch.full((N,), -1, device=DEVICE))
        assert not o.any() and torch.equal(pool, before)


@pytest.mark.parametrize("served_before", [False, True])
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda x: {"state_indices": torch.tensor([0], device=DEVICE)}, ValueError, "`state_indices`"),
        (lambda x: {"state_indices": torch.tensor([[0], [1]], device=DEVICE)}, ValueError, "`state_indices`"),
        (lambda x: {"state_indices": torch.tensor([0.0, 1.0], device=DEVICE)}, ValueError, "`state_indices`"),
        (lambda x: {"state_indices": torch.tensor([0, 1])}, RuntimeError, "`state_indices`"),
        (lambda x: {"state_indices": [0, 1]}, TypeError, "`state_indices`"),
        (lambda x: {"initial_state": None}, TypeError, "`initial_state`"),
        (lambda x: {"initial_state": x["initial_state"][:, :1]}, ValueError, "`initial_state`"),
        (lambda x: {"initial_state": x["initial_state"].mT}, RuntimeError, "`initial_state` must be contiguous"),
        (lambda x: {"return_intermediate_states": True}, ValueError, "intermediate states"),
        (lambda x: {"v": x["v"].clone().requires_grad_()}, ValueError, "gradients"),
    ],
    ids=["length", "rank", "dtype", "device", "list", "no pool", "heads", "strided pool", "states", "gradients"],
)
def test_errors_come_before_anything_is_written(change, kind, words, served_before, monkeypatch):
    inputs = arguments(2, 1) | {"state_indices": torch.tensor([0, 1], device=DEVICE)}
    monkeypatch.setattr(cuda, "_served", set())
    if served_before:
        kernel(inputs)
        assert cuda.serves_again("recurrent_kda", inputs["q"])
    before = inputs["initial_state"].clone()
    with pytest.raises(kind, match=words):
        kernel(inputs | change(inputs))
    assert torch.equal(inputs["initial_state"], before)


# -------------------------------------------------------------------------------------------------------- raw operators


def raw(inputs, out, final_state, states=None, indices=None):
    x = inputs
    torch.ops.kda_hf_cuda.recurrent(
        x["q"], x["k"], x["v"], x["g"], x["beta"], x.get("scale", 0.1), out, x["A_log"], x["dt_bias"], x["lower_bound"],
        x.get("initial_state"), final_state, states, x.get("cu_seqlens"), indices, True, True, True, False,
        x.get("state_v_first", False),
    )  # fmt: skip


def exact_states(inputs):
    """The state in float64 after every token, [B, T, HV, ...]; NaN for tokens of no sequence."""
    bounds, (B, T) = inputs.get("cu_seqlens"), inputs["q"].shape[:2]
    spans = [(b, 0, T) for b in range(B)]
    if bounds is not None:
        spans = [(0, start, end) for start, end in itertools.pairwise(bounds.tolist())]
    found = inputs["initial_state"].new_full((B, T, *inputs["initial_state"].shape[1:]), math.nan, dtype=torch.float64)
    for n, (b, start, end) in enumerate(spans):
        state = inputs["initial_state"][n : n + 1].double()
        for t in range(start, end):
            one = tokens_of(inputs, slice(b, b + 1), slice(t, t + 1)) | {"initial_state": state, "cu_seqlens": None}
            state = exact(one)[1]
            found[b, t] = state[0]
    return found


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 20]], ids=["dense", "packed"])
def test_nothing_is_written_beyond_the_outputs(lengths, v_first, dtype, widths):
    """And the states after every token are right."""
    K, V = widths
    shape = {"H": 2, "HV": 4, "K": K, "V": V, "dtype": dtype}
    for state in STATES:
        inputs = arguments(2, 5, state=state, **shape) if lengths is None else packed(lengths, 3, state=state, **shape)
        if v_first:
            inputs = values_first(inputs)
        buffers = out, final, states = guarded(inputs)
        raw(inputs, *(x.tensor for x in buffers))
        assert all(x.is_intact() for x in buffers)
        inputs["scale"] = 0.1
        assert_close(out.tensor, final.tensor, exact(inputs))
        tokens = slice(None) if lengths is None else slice(0, sum(lengths))
        assert not out.tensor[:, sum(lengths or [5]) :].any()
        assert error(states.tensor[:, tokens], exact_states(inputs)[:, tokens]) <= STATE_BOUNDS[state]


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 40]], ids=["dense", "packed"])
def test_states_after_every_token(lengths, state, pool):
    inputs = arguments(4, 5, state=state) if lengths is None else packed(lengths, 3, state=state)
    expected, others = exact_states(inputs), {"return_token_states": True}
    if pool:
        others["state_indices"] = torch.arange(4, device=DEVICE)
    o, final_state, states = kernel(inputs | {"initial_state": inputs["initial_state"].clone()}, **others)
    assert_close(o, final_state, exact(inputs))
    tokens = slice(None) if lengths is None else slice(0, sum(lengths))
    assert error(states[:, tokens], expected[:, tokens]) <= STATE_BOUNDS[state]


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("T", [1, 20])
def test_nothing_is_written_beside_a_pool(T, v_first):
    inputs = arguments(3, T, 2, 4, V=64, N=5)
    if v_first:
        inputs = values_first(inputs)
    before = inputs["initial_state"]
    out, pool, _ = guarded(inputs)
    pool.tensor.copy_(before)
    indices = torch.tensor([4, 5, 0], device=DEVICE)
    raw(inputs | {"initial_state": None}, out.tensor, pool.tensor, None, indices)
    assert out.is_intact() and pool.is_intact()
    expected = exact(tokens_of(inputs, [0, 2]) | {"initial_state": before[[4, 0]], "scale": 0.1})
    assert_close(out.tensor[[0, 2]], pool.tensor[[4, 0]], expected)
    assert not out.tensor[1].any() and torch.equal(pool.tensor[1:4], before[1:4])


@pytest.mark.parametrize("layout", ["heads first", "every other", "odd start"])
def test_any_layout_of_outputs(layout):
    inputs = arguments(2, 3)
    results = [torch.full_like(x.tensor, math.nan) for x in guarded(inputs)]
    for i, x in enumerate(results):
        if layout == "heads first":
            results[i] = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "every other":
            results[i] = x.repeat_interleave(2, -1)[..., ::2]
        else:
            results[i] = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=DEVICE)[1:].view(x.shape)
    raw(inputs, *results)
    inputs["scale"] = 0.1
    assert_close(*results[:2], exact(inputs))
    assert error(results[2], exact_states(inputs)) <= STATE_BOUNDS[torch.float32]


def test_raw_errors_come_before_anything_is_written():
    inputs = arguments(2, 3)
    state, indices = inputs["initial_state"], torch.tensor([0, 1], device=DEVICE)
    out, final, states = (torch.full_like(x.tensor, 7.0) for x in guarded(inputs))
    for arguments_, words in (
        ((out, final, None, indices), "`state_indices`"),
        ((out, final, states[:, :2]), "states"),
        ((out, final, states.bfloat16()), "dtype"),
        ((out, final.bfloat16(), states), "dtype"),
        ((out[:, :2], final, states), "out"),
    ):
        before = state.clone()
        with pytest.raises(RuntimeError, match=f"kda_hf refuses: .*{words}"):
            raw(inputs, *arguments_)
        assert all((x == 7).all() for x in (out, final, states)) and torch.equal(state, before)


def test_outputs_alone_leave_the_state():
    """What a block of drafted tokens gives, and the first of them later."""
    inputs = arguments(2, 8, gate="mild")
    before = inputs["initial_state"].clone()
    out = torch.full_like(inputs["v"], math.nan)
    raw(inputs, out, None)
    assert torch.equal(inputs["initial_state"], before)
    assert error(out, exact(inputs | {"scale": 0.1})[0]) <= OUTPUT_BOUNDS[torch.bfloat16]
    _, state = kernel(tokens_of(inputs, slice(None), slice(0, 3)))
    for token in range(3):
        one = tokens_of(inputs, slice(None), slice(token, token + 1))
        kernel(one, state_indices=torch.arange(2, device=DEVICE))
    assert error(inputs["initial_state"], state.double()) <= STATE_BOUNDS[torch.float32]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_poison_stays_in_its_sequence_and_head(name, value):
    inputs = arguments(3, 2, 2, 4)
    o, state = kernel(inputs)
    poisoned = inputs[name].clone()
    heads = [2, 3] if name in ("q", "k") else [1]
    poisoned[(1, 1) if name == "initial_state" else (1, slice(None), 1)] = value
    actual = kernel(inputs | {name: poisoned})
    clean = torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
    clean[1, heads] = False
    assert torch.equal(actual[0].transpose(1, 2)[clean], o.transpose(1, 2)[clean])
    assert torch.equal(actual[1][clean], state[clean])
    if math.isnan(value):
        assert actual[0].transpose(1, 2)[~clean].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*PER_TOKEN, "initial_state", "A_log", "dt_bias"])
def test_poison_of_packed_sequences(name, value):
    inputs = packed([3, 0, 1, 20, 2], 4, H=2, HV=4)
    for x in (inputs[n] for n in PER_TOKEN):
        x[:, 26:] = value  # of no sequence
    o, state = kernel(inputs)
    assert o.isfinite().all() and state.isfinite().all() and not o[:, 26:].any()
    poisoned = inputs[name].clone()
    clean, clean_state = torch.ones_like(o, dtype=torch.bool), torch.ones_like(state, dtype=torch.bool)
    if name in ("A_log", "dt_bias"):
        poisoned[1] = value
        clean[:, :, 1], clean_state[:, 1] = False, False
    else:
        poisoned[(3, 1) if name == "initial_state" else (0, 14, 1)] = value
        heads = slice(2, 4) if name in ("q", "k") else slice(1, 2)  # value heads 2 and 3 read query and key head 1
        clean[:, 4 if name == "initial_state" else 14 : 24, heads], clean_state[3, heads] = False, False
    actual = kernel(inputs | {name: poisoned})
    assert torch.equal(actual[0][clean], o[clean]) and torch.equal(actual[1][clean_state], state[clean_state])
    if math.isnan(value):
        assert actual[0][~clean].isnan().any()


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("name", ["v", "initial_state"])
def test_poison_stays_in_its_value_channel(name, v_first):
    inputs = arguments(2, 5)
    poisoned = inputs | {name: inputs[name].clone()}
    poisoned[name][(1, 1, 3, 70) if name == "initial_state" else (1, 2, 1, 70)] = math.nan
    calls = [values_first(x) if v_first else x for x in (inputs, poisoned)]
    (o, state), actual = kernel(calls[0]), kernel(calls[1])
    state, actual_state = (x.mT if v_first else x for x in (state, actual[1]))
    hit = torch.zeros_like(o, dtype=torch.bool)
    hit[1, 0 if name == "initial_state" else 2 :, 1, 70] = True
    hit_state = torch.zeros_like(state, dtype=torch.bool)
    hit_state[1, 1, :, 70] = True
    assert torch.equal(actual[0].isnan(), hit) and torch.equal(actual_state.isnan(), hit_state)
    assert torch.equal(actual[0][~hit], o[~hit]) and torch.equal(actual_state[~hit_state], state[~hit_state])


@pytest.mark.parametrize("gate", ["steep", "steep softplus"])
@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "initial_state"])
def test_a_nan_is_never_forgotten(name, gate):
    inputs = arguments(1, 16, gate=gate)
    inputs[name][(0, 1, 3) if name == "initial_state" else (0, 0, 1)] = math.nan
    o, state = kernel(inputs)
    assert o[0, -1, 1].isnan().any() and state[0, 1].isnan().any()
    assert o[:, :, 0].isfinite().all() and state[:, 0].isfinite().all()


def test_poison_of_skipped_sequences_and_unused_rows():
    inputs = arguments(3, 2, N=4)
    clean = inputs | {"initial_state": inputs["initial_state"].clone()}
    for x in (inputs[n] for n in PER_TOKEN):
        x[1] = math.nan
    inputs["initial_state"][[0, 2]] = math.nan
    indices = torch.tensor([3, -1, 1], device=DEVICE)
    expected = kernel(tokens_of(clean, [0, 2]), state_indices=indices[[0, 2]])
    o, pool = kernel(inputs, state_indices=indices)
    assert torch.equal(o[[0, 2]], expected[0]) and torch.equal(pool[[3, 1]], expected[1][[3, 1]])
    assert not o[1].any() and pool[[0, 2]].isnan().all()


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("gate", ["mild", "softplus", "steep"])
def test_4096_single_steps(gate):
    """In place, in fp32: no more than 1e-5 from the recurrence in float64, and as prefill leaves the state."""
    T = 4096
    inputs = arguments(1, T, 2, 2, gate=gate)
    expected = ops.chunk_kda(
        **{n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()},
        output_final_state=True,
        backend="torch",
    )
    prefilled = ops.chunk_kda(**inputs, output_final_state=True, backend="cuda")[1]
    state = inputs["initial_state"].clone()
    row = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    outputs = []
    for token in range(T):
        one = tokens_of(inputs, slice(None), slice(token, token + 1)) | {"initial_state": state}
        outputs.append(kernel(one, state_indices=row)[0])
    assert error(state, expected[1]) <= 1e-5
    assert error(torch.cat(outputs, 1), expected[0]) <= OUTPUT_BOUNDS[torch.bfloat16]
    assert error(prefilled, state.double()) <= test_fwd.STATE_BOUND


@pytest.mark.parametrize("gate", ["mild", "bimodal softplus"])
@pytest.mark.parametrize("sizes", [[1] * 20, [16, 1, 3], [5, 15], list(range(1, 17))], ids=["1", "16", "5", "1 to 16"])
def test_calls_that_pass_the_state_on_equal_one_call(sizes, gate):
    inputs = arguments(2, sum(sizes), gate=gate)
    expected = exact(inputs)
    outputs, state, start = [], inputs["initial_state"], 0
    for size in sizes:
        piece = tokens_of(inputs, slice(None), slice(start, start + size))
        o, state = kernel(piece | {"initial_state": state})
        outputs.append(o)
        start += size
    assert_close(torch.cat(outputs, 1), state, expected)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 20]], ids=["dense", "packed"])
def test_same_bits_every_time(lengths, v_first):
    inputs = arguments(64, 9, 4, 8, gate="mild") if lengths is None else packed(lengths, H=4, HV=8)
    inputs = values_first(inputs) if v_first else inputs
    first = kernel(inputs)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(kernel(inputs), first, strict=True))


@pytest.mark.parametrize("T", [1, 16])
def test_calls_that_need_each_other(T):
    """A call starts while the one before it ends: what that writes is read afterwards, not overwritten early."""
    inputs = arguments(8, T, 4, 4, gate="mild")
    indices, results = torch.arange(8, device=DEVICE), []
    for waits in (True, False):
        call = inputs | {"initial_state": inputs["initial_state"].clone()}
        for _ in range(20):
            call["v"], state = kernel(call, state_indices=indices)
            call["v"], call["k"] = call["k"], call["v"]
            if waits:
                torch.cuda.synchronize()
        results.append((call["v"], call["k"], state))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --------------------------------------------------------------------------------------------- graphs, streams, devices


@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 20]], ids=["dense", "packed"])
def test_graph_replay_equals_eager(lengths):
    make = (lambda: arguments(3, 2)) if lengths is None else (lambda: packed(lengths))
    inputs = make()
    kernel(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = kernel(inputs)
    for _ in range(3):
        other = make()
        for name, x in inputs.items():
            if isinstance(x, torch.Tensor):
                x.copy_(other[name])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, kernel(other), strict=True))


def test_graph_of_a_pool():
    """The indices are read on the device: a captured call serves other rows."""
    inputs = arguments(3, 2, N=6)
    pool, indices = inputs["initial_state"], torch.tensor([0, 1, 2], device=DEVICE)
    kernel(inputs, state_indices=indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = kernel(inputs, state_indices=indices)
    for rows in ([0, 1, 2], [5, -1, 3], [2, 6, 0]):
        indices.copy_(torch.tensor(rows))
        expected = kernel(inputs | {"initial_state": pool.clone()}, state_indices=indices)
        graph.replay()
        assert torch.equal(o, expected[0]) and torch.equal(pool, expected[1])


def test_other_stream():
    given = arguments(2, 3)
    expected = exact(given)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        inputs = {n: torch.full_like(x, math.nan) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        torch.cuda._sleep(100_000_000)
        for name, x in inputs.items():
            if isinstance(x, torch.Tensor):
                x.copy_(given[name])
        o, state = kernel(inputs)
        o, state = o.clone(), state.clone()
    stream.synchronize()
    assert_close(o, state, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    inputs = arguments(2, 3)
    moved = test_fwd.check_on_second_device(inputs, kernel, exact(inputs), assert_close)
    with pytest.raises(RuntimeError, match="`state_indices` must be on cuda:1"):
        kernel(moved, state_indices=torch.arange(2, device=DEVICE))


# ---------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["dense", "packed", "pool"])
def test_compiles_without_graph_breaks(kind, dynamic):
    inputs = packed([3, 0, 4]) if kind == "packed" else arguments(3, 2)
    if kind == "pool":
        inputs["state_indices"] = torch.tensor([2, -1, 0], device=DEVICE)
    again = inputs | {"initial_state": inputs["initial_state"].clone()}
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for actual, expected in zip(compiled(inputs), kernel(again), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(inputs["initial_state"], again["initial_state"])


@pytest.mark.parametrize("lengths", [None, [3, 0, 4]], ids=["dense", "packed"])
def test_opcheck(lengths):
    inputs = arguments(2, 3) if lengths is None else packed(lengths)
    x, state = [inputs[name] for name in PER_TOKEN], inputs["initial_state"]
    outputs = (torch.zeros_like(inputs["v"]), inputs["A_log"], inputs["dt_bias"], -5.0, state, torch.zeros_like(state))
    states = torch.zeros(*inputs["q"].shape[:2], *state.shape[1:], device=DEVICE)
    torch.library.opcheck(
        torch.ops.kda_hf_cuda.recurrent.default,
        (*x, 0.1, *outputs, states, inputs.get("cu_seqlens"), None, True, True, True, False, False),
    )


# ------------------------------------------------------------------------------------------------------ kda_decode_step


def step_arguments(dtype=torch.bfloat16, state=torch.float32, **others):
    x = layer.arguments(DEVICE, dtype=dtype, **{"H": 2, "HV": 4, "K": 128, "V": 128} | others)
    return x | {"recurrent_state": x["recurrent_state"].to(state)}


def check_step(x, rows=None, **others):
    states = {name: x[name].clone() for name in ("conv_state", "recurrent_state")}
    o = ops.kda_decode_step(**x | states, backend="cuda", **others)
    assert o.dtype == x["v"].dtype and o.is_contiguous()
    # One part after the other, rounded in between as the kernel does.
    wanted = [x | {name: x[name].clone() for name in states} | {"backend": "torch"}]
    expected = ops.kda_decode_step(**wanted[0], **others)
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}[o.dtype]
    assert error(o, expected.double()) <= tolerance
    assert torch.equal(states["conv_state"], wanted[0]["conv_state"])
    bound = 1e-5 if o.dtype == torch.float32 else 3e-4
    bound = bound if states["recurrent_state"].dtype == torch.float32 else 3e-3
    assert error(states["recurrent_state"], wanted[0]["recurrent_state"].double()) <= bound
    return o


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("v_first", [False, True])
def test_step(v_first, W, widths, dtype):
    K, V = widths
    for state, bound, H in itertools.product(STATES, (-5.0, None), (4, 2)):  # value heads of their own, and shared ones
        check_step(step_arguments(dtype, state, K=K, V=V, W=W, v_first=v_first, lower_bound=bound, H=H, HV=4))


@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (2, 8), (32, 32)])
def test_step_of_grouped_value_heads(heads):
    for options in ({}, {"allow_neg_eigval": True, "scale": 0.3}):
        check_step(step_arguments(H=heads[0], HV=heads[1]), **options)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_step_of_a_pool(integer):
    x = step_arguments(B=4, rows=6)
    o = check_step(x, state_indices=torch.tensor([5, -1, 0, 6], dtype=integer, device=DEVICE))
    assert not o[[1, 3]].any() and o[[0, 2]].any()


def test_step_of_other_dtypes():
    x = step_arguments()
    weights = [name for name in x if name.endswith("weight")]
    check_step(x | {name: x[name].float() for name in weights})
    check_step(x | {"conv_state": x["conv_state"].float(), "A_log": x["A_log"].float(), "beta": x["beta"].float()})
    check_step(x | {"g": x["g"].float()})


def test_step_of_views_and_of_a_graph():
    x = step_arguments()
    flat = torch.cat([x[name].flatten(2) for name in ("q", "k", "v", "g", "output_gate")], -1)
    views, start = {}, 0
    for name in ("q", "k", "v", "g", "output_gate"):
        views[name] = flat[..., start : start + x[name][0].numel()].unflatten(-1, x[name].shape[2:])
        start += x[name][0].numel()
    check_step(x | views)
    call = x | views | {name: x[name].clone() for name in ("conv_state", "recurrent_state")}
    ops.kda_decode_step(**call, backend="cuda")
    for name in ("conv_state", "recurrent_state"):
        call[name].copy_(x[name])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = ops.kda_decode_step(**call, backend="cuda")
    eager = {name: x[name].clone() for name in ("conv_state", "recurrent_state")}
    for _ in range(3):  # each goes on from where the one before left
        graph.replay()
        assert torch.equal(o, ops.kda_decode_step(**call | eager, backend="cuda"))
        assert all(torch.equal(call[name], eager[name]) for name in eager)


# -------------------------------------------------------------------- kda_decode_step with second layers of its inputs


def low_rank_arguments(dtype=torch.bfloat16, state=torch.float32, H=2, **others):
    """As `step_arguments`, with what g and the output gate are made of: vectors side by side, and two weights."""
    x = step_arguments(dtype, state, H=H, HV=H, **others)
    low_rank = torch.randn(len(x["q"]), 256, device=DEVICE).to(dtype)
    weights = tuple((torch.randn(H * 128, 128, device=DEVICE) / 128**0.5).to(dtype) for _ in range(2))
    torch.cuda.synchronize()  # weights must not be what the kernel right before the step writes
    return x, low_rank, weights


def low_rank_step(x, low_rank, weights, out=None, **changed):
    """The kernel alone, in place."""
    g, gate = low_rank.view(len(low_rank), 1, 2, 1, 128).unbind(2)
    out = torch.full_like(x["v"], float("nan")) if out is None else out
    defaults = {"scale": 128**-0.5, "allow_neg_eigval": False, "state_indices": None}
    x = x | defaults | {"g": g, "output_gate": gate} | changed
    names = ("q", "k", "v", "g", "beta", "output_gate", "scale")
    more = ("A_log", "dt_bias", "lower_bound", "recurrent_state", "conv_state")
    others = ("q_conv_weight", "k_conv_weight", "v_conv_weight", "norm_weight", "norm_eps")
    torch.ops.kda_hf_cuda.decode_step(
        *(x[name] for name in names), out, *(x[name] for name in (*more, *others)),
        x["state_indices"], x["allow_neg_eigval"], x["state_v_first"], *weights,
    )  # fmt: skip
    return out


def check_low_rank_step(x, low_rank, weights, **changed):
    states = {name: x[name].clone() for name in ("conv_state", "recurrent_state")}
    o = low_rank_step(x | states, low_rank, weights, **changed)
    made = [
        (part.double() @ weight.double().T).to(o.dtype).view(x["v"].shape)
        for part, weight in zip(low_rank.chunk(2, 1), weights, strict=True)
    ]
    wanted = x | {name: x[name].clone() for name in states} | dict(zip(("g", "output_gate"), made, strict=True))
    expected = ops.kda_decode_step(**wanted | changed, backend="torch")
    assert error(o, expected.double()) <= {torch.bfloat16: 4e-3, torch.float16: 6e-4}[o.dtype]
    assert torch.equal(states["conv_state"], wanted["conv_state"])
    bound = 3e-4 if states["recurrent_state"].dtype == torch.float32 else 3e-3
    assert error(states["recurrent_state"], wanted["recurrent_state"].double()) <= bound
    return o


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 16), (4, 16), (50, 1), (8, 16), (70, 1), (40, 8)], ids=str)
def test_low_rank_step(size, dtype):
    """Four CTAs a head, two, and one, on 132 SMs; and more than there is room for at once."""
    for state, bound in itertools.product(STATES, (-5.0, -0.01, None)):
        check_low_rank_step(*low_rank_arguments(dtype, state, B=size[0], H=size[1], lower_bound=bound))
    check_low_rank_step(*low_rank_arguments(dtype, B=size[0], H=size[1]), allow_neg_eigval=True, scale=0.3)


def test_low_rank_steps_follow_each_other():
    """In a graph, after a product that makes their inputs: each goes on from where the last one left, always alike."""
    x, low_rank, weights = low_rank_arguments(B=2, H=4)
    q_channels = 4 * 128
    projection = (torch.randn(3 * q_channels + 256, 512, device=DEVICE) / 512**0.5).bfloat16()
    hidden = torch.randn(2, 512, device=DEVICE).bfloat16()
    ours = KernelRows()

    def step():
        y = ours.product(hidden, projection)
        q, k, v = (part.view(2, 1, 4, 128) for part in y[:, : 3 * q_channels].split(q_channels, 1))
        return low_rank_step(x | {"q": q, "k": k, "v": v}, y[:, 3 * q_channels :], weights)

    def start():
        for name, state in before.items():
            x[name].copy_(state)

    before = {name: x[name].clone() for name in ("conv_state", "recurrent_state")}
    expected = [(step(), *(x[name].clone() for name in before)) for _ in range(3)]
    start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    for _ in range(20):
        start()
        for wanted in expected:
            graph.replay()
            assert all(torch.equal(*pair) for pair in zip((o, *(x[name] for name in before)), wanted, strict=True))


REFUSED = ["pair", "g", "gate", "weight", "dtype", "widths", "heads", "layout", "strided", "A_log"]


@pytest.mark.parametrize("what", [*REFUSED, "W", "pool", "rows", "beta"])
def test_what_the_low_rank_step_refuses(what):
    shapes = {"widths": {"K": 64, "V": 64}, "W": {"W": 3}}.get(what, {})
    x = step_arguments(H=2, **{"HV": 4 if what == "heads" else 2} | shapes)
    _, low_rank, (g_weight, gate_weight) = low_rank_arguments()
    one_head = dict.fromkeys(("g", "output_gate"), x["q"][:, :, :1])
    apart = torch.cat([x["q"], x["q"]], -1)[..., :128]
    changed, match = {
        "pair": ({"weights": (g_weight, None)}, "go together"),
        "g": ({"g": x["g"]}, "`g` must have shape"),
        "gate": ({"output_gate": x["output_gate"]}, "`output_gate` must have shape"),
        "weight": ({"weights": (g_weight[:-1], gate_weight)}, "`g_weight` must have shape"),
        "dtype": ({"weights": (g_weight.float(), gate_weight)}, "dtype of `q`"),
        "widths": (one_head, "128 wide"),
        "heads": (one_head, "as many heads"),
        "layout": ({"state_v_first": True}, r"\[K, V\]"),
        "strided": ({"weights": (g_weight.repeat_interleave(2, 1)[:, ::2], gate_weight)}, "contiguous"),
        "A_log": ({"A_log": None}, "needs `A_log`"),
        "W": ({}, "4 wide"),
        "pool": ({"state_indices": torch.arange(3, device=DEVICE)}, "no `state_indices`"),
        "rows": ({"q": apart}, "side by side"),
        "beta": ({"beta": x["beta"].repeat_interleave(2, -1)[..., ::2]}, "`beta` must have"),
    }[what]
    changed = {"weights": (g_weight, gate_weight)} | changed
    states = {name: x[name].clone() for name in ("conv_state", "recurrent_state")}
    out = torch.full_like(x["v"], float("nan"))
    with pytest.raises(RuntimeError, match=match):
        low_rank_step(x, low_rank, changed.pop("weights"), out=out, **changed)
    torch.cuda.synchronize()
    assert out.isnan().all() and all(torch.equal(x[name], state) for name, state in states.items())
