"""The CUDA decode kernels, through `recurrent_kda` and `kda_decode_step`, against float64. They need a GPU."""

import itertools
import math
import os

import pytest
import test_fwd
import test_ops_decode_step as layer
import torch
from test_fwd import DEVICE, GATES, WIDTHS, Guarded, arguments, error, packed, randn

from kda_hf import ops


pytestmark = test_fwd.pytestmark

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STATES = [torch.float32, torch.bfloat16]
# Relative L2: rounding the output to its dtype, and the state to bf16, is nearly all of it.
OUTPUT_BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4, torch.float32: 3e-6}
STATE_BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2.5e-3}


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
    return inputs | {"state_v_first": True, "initial_state": inputs["initial_state"].mT.contiguous()}


# -------------------------------------------------------------------------------------------------------- recurrent_kda


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 2, 5, 16])
def test_lengths_gates_widths_dtypes(T, gate, widths, dtype):
    for state in STATES:
        inputs = arguments(3, T, 2, 4, *widths, gate, dtype, state=state)
        check(inputs)
        check(values_first(inputs))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("beta", ["given", "sigmoid", "negative"])
@pytest.mark.parametrize("gate", ["given", "safe", "softplus", "no parameters"])
@pytest.mark.parametrize("state", [None, *STATES])
def test_flags(state, gate, beta, norm):
    inputs = arguments(2, 3, 2, 2, gate="softplus" if gate == "softplus" else "steep", state=state)
    inputs["use_qk_l2norm_in_kernel"] = norm
    if not norm:
        inputs["k"] = torch.nn.functional.normalize(inputs["k"].float(), dim=-1).bfloat16()
    inputs["use_beta_sigmoid_in_kernel"] = beta != "given"
    inputs["allow_neg_eigval"] = beta == "negative"
    if beta == "given":
        inputs["beta"] = inputs["beta"].sigmoid()
    if gate == "given":
        inputs |= {"use_gate_in_kernel": False, "g": -inputs["g"].float().abs(), "A_log": None, "dt_bias": None}
        inputs["lower_bound"] = None
    elif gate == "no parameters":
        inputs |= {"A_log": None, "dt_bias": None}
    check(inputs)
    check(inputs | {"scale": -0.5, "beta": inputs["beta"].float()})


@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (2, 8), (5, 5), (4, 32)])
def test_grouped_value_heads(heads):
    check(arguments(2, 3, *heads, gate="bimodal"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes(dtype):
    inputs = arguments(2, 2)
    for names in (("A_log", "dt_bias"), ("A_log",), ("dt_bias",)):
        check(inputs | {name: inputs[name].to(dtype) for name in names})


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("lengths", [[1, 0, 16, 3], [0, 0, 1], [33, 1, 0, 2], [1] * 300], ids=str)
def test_packed(lengths, spare, integer):
    inputs = packed(lengths, spare, integer, gate="mild")
    o, state = kernel(inputs)
    assert_close(o, state, exact(inputs))
    assert not o[:, sum(lengths) :].any()


def test_many_sequences():
    check(packed(torch.randint(0, 3, (4096,)).tolist(), H=1, HV=2))


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


@pytest.mark.parametrize("bounds", [[0, 50, 3, 9], [7, 2, 1, 0], [-4, 1, 2, 1000]])
def test_bad_bounds(bounds):
    inputs = packed([4, 4, 4]) | {"cu_seqlens": torch.tensor(bounds, device=DEVICE)}
    o, state = kernel(inputs)
    torch.cuda.synchronize()
    assert o.shape == inputs["v"].shape and state.shape == inputs["initial_state"].shape


# ---------------------------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("T", [1, 16, 17, 50])
def test_pool(T, state, integer):
    rows = [5, -1, 0, 7, 2, -(2**31), 8]  # of 8: three of them are none
    inputs = arguments(7, T, 2, 4, gate="mild", N=8, state=state)
    pool = inputs["initial_state"]
    before = pool.clone()
    indices = torch.tensor(rows, dtype=integer, device=DEVICE)
    o, final_state = kernel(inputs, state_indices=indices)
    assert final_state is pool
    used = [i for i, row in enumerate(rows) if 0 <= row < 8]
    own = {name: inputs[name][used] for name in ("q", "k", "v", "g", "beta")}
    expected = exact(inputs | own | {"initial_state": before[[rows[i] for i in used]]})
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


@pytest.mark.parametrize(
    ("indices", "error_type", "words"),
    [
        (lambda: torch.tensor([0], device=DEVICE), ValueError, "`state_indices`"),
        (lambda: torch.tensor([0.0, 1.0], device=DEVICE), ValueError, "`state_indices`"),
        (lambda: torch.tensor([0, 1]), RuntimeError, "`state_indices`"),
        (lambda: [0, 1], TypeError, "`state_indices`"),
    ],
)
def test_errors_come_before_anything_is_written(indices, error_type, words):
    inputs = arguments(2, 1)
    kernel(inputs, state_indices=torch.tensor([0, 1], device=DEVICE))
    before = inputs["initial_state"].clone()
    with pytest.raises(error_type, match=words):
        kernel(inputs, state_indices=indices())
    assert torch.equal(inputs["initial_state"], before)


# -------------------------------------------------------------------------------------------------------- raw operators


def raw(inputs, out, final_state, states=None, indices=None):
    x = inputs
    torch.ops.kda_hf_cuda.recurrent(
        x["q"], x["k"], x["v"], x["g"], x["beta"], 0.1, out, x["A_log"], x["dt_bias"], x["lower_bound"],
        x.get("initial_state"), final_state, states, x.get("cu_seqlens"), indices, True, True, True, False, False,
    )  # fmt: skip


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 20]], ids=["dense", "packed"])
def test_nothing_is_written_beyond_the_outputs(lengths, widths):
    K, V = widths
    inputs = arguments(2, 5, 2, 4, K, V) if lengths is None else packed(lengths, 3, H=2, HV=4, K=K, V=V)
    B, T = inputs["q"].shape[:2]
    for dtype in STATES:
        inputs["initial_state"] = inputs["initial_state"].to(dtype)
        out, final = Guarded(B, T, 4, V, dtype=torch.bfloat16), Guarded(*inputs["initial_state"].shape, dtype=dtype)
        states = Guarded(B, T, 4, K, V, dtype=dtype)
        raw(inputs, out.tensor, final.tensor, states.tensor)
        assert out.is_intact() and final.is_intact() and states.is_intact()
        assert_close(out.tensor, final.tensor, exact(inputs | {"scale": 0.1}))
        end = 5 if lengths is None else 3  # of the first sequence
        for token in range(end):
            first = {name: inputs[name][:1, : token + 1] for name in ("q", "k", "v", "g", "beta")}
            first |= {"initial_state": inputs["initial_state"][:1], "cu_seqlens": None}
            assert error(states.tensor[0, token], exact(inputs | first)[1][0]) <= STATE_BOUNDS[dtype]


def test_outputs_alone_leave_the_state():
    """What a block of drafted tokens gives, and the first of them later."""
    inputs = arguments(2, 8, gate="mild")
    before = inputs["initial_state"].clone()
    out = torch.full_like(inputs["v"], math.nan)
    raw(inputs, out, None)
    assert torch.equal(inputs["initial_state"], before)
    assert error(out, exact(inputs | {"scale": 0.1})[0]) <= OUTPUT_BOUNDS[torch.bfloat16]
    kept = {name: inputs[name][:, :3] for name in ("q", "k", "v", "g", "beta")}
    _, state = kernel(inputs | kept)
    for token in range(3):
        one = {name: inputs[name][:, token : token + 1] for name in kept}
        kernel(inputs | one, state_indices=torch.arange(2, device=DEVICE))
    assert error(inputs["initial_state"], state.double()) <= STATE_BOUNDS[torch.float32]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_poison_stays_in_its_sequence_and_head(name, value):
    inputs = arguments(3, 2, 2, 4)
    o, state = kernel(inputs)
    poisoned = inputs[name].clone()
    heads = [2, 3] if name in ("q", "k") else [1]
    poisoned[(1, 0, 1) if name == "initial_state" else (1, slice(None), 1)] = value
    if name == "initial_state":
        heads, poisoned = [1], inputs[name].clone()
        poisoned[1, 1] = value
    actual = kernel(inputs | {name: poisoned})
    clean = torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
    clean[1, heads] = False
    assert torch.equal(actual[0].transpose(1, 2)[clean], o.transpose(1, 2)[clean])
    assert torch.equal(actual[1][clean], state[clean])
    if math.isnan(value):
        assert actual[0].transpose(1, 2)[~clean].isnan().any()


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
        one = {name: inputs[name][:, token : token + 1] for name in ("q", "k", "v", "g", "beta")}
        outputs.append(kernel(inputs | one | {"initial_state": state}, state_indices=row)[0])
    assert error(state, expected[1]) <= 1e-5
    assert error(torch.cat(outputs, 1), expected[0]) <= OUTPUT_BOUNDS[torch.bfloat16]
    assert error(prefilled, state.double()) <= test_fwd.STATE_BOUND


@pytest.mark.parametrize("sizes", [[1] * 20, [16, 1, 3], [5, 15]])
def test_calls_that_pass_the_state_on_equal_one_call(sizes):
    inputs = arguments(2, 20, gate="bimodal softplus")
    expected = exact(inputs)
    outputs, state, start = [], inputs["initial_state"], 0
    for size in sizes:
        piece = {n: inputs[n][:, start : start + size] for n in ("q", "k", "v", "g", "beta")}
        o, state = kernel(inputs | piece | {"initial_state": state})
        outputs.append(o)
        start += size
    assert_close(torch.cat(outputs, 1), state, expected)


def test_same_bits_every_time():
    inputs = arguments(4, 9, 4, 8, gate="mild")
    first = kernel(inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(kernel(inputs), first, strict=True))


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
    moved = {n: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    o, state = kernel(moved)
    assert o.device == state.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_close(o.to(DEVICE), state.to(DEVICE), exact(inputs))


def test_compiles_without_graph_breaks():
    for inputs, others in ((arguments(3, 2), {}), (arguments(3, 1), {"state_indices": torch.arange(3, device=DEVICE)})):
        fresh = inputs | {"initial_state": inputs["initial_state"].clone()}
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
        for actual, expected in zip(compiled(inputs, **others), kernel(fresh, **others), strict=True):
            assert torch.equal(actual, expected)


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
    for state, bound in itertools.product(STATES, (-5.0, None)):
        check_step(step_arguments(dtype, state, K=K, V=V, W=W, v_first=v_first, lower_bound=bound))


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
