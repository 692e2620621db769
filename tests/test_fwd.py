"""The CUDA prefill kernels, through `chunk_kda` and `fwd`, against float64. They need a GPU that can run them.

The yardstick is the chunked PyTorch form in float64 on the same device, and that is compared with the token recurrence.
"""

import itertools
import logging
import math
import os
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F

from kda_hf import ops
from kda_hf.ops import backends, cuda
from kda_hf.ops.reference import kda_reference


DEVICE = torch.device("cuda")


def _refusal() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    return next(row["reason"] or None for row in ops.backend_report("fwd") if row["backend"] == "cuda")


pytestmark = pytest.mark.skipif(_refusal() is not None, reason=f"no CUDA backend: {_refusal()}")

LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 4097]
WIDTHS = [(128, 128), (64, 64), (128, 64), (64, 128)]
DTYPES = [torch.bfloat16, torch.float16]
# Relative L2 of output and final state. A state that is stored in bf16 carries the error of rounding it besides.
OUTPUT_BOUND, STATE_BOUND = 4e-3, 3e-3
ROUNDED_STATE_BOUND = 3.5e-3
FLAGS = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


@pytest.fixture(autouse=True)
def seed():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in ("KDA_HF_BACKEND", "FLA_FLASH_KDA", "KDA_HF_CHECK"):
        monkeypatch.delenv(variable, raising=False)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


# ----------------------------------------------------------------------------------------------------- gates and inputs


def _steep(HV, K):
    return {"A_log": torch.rand(HV, device=DEVICE) * 0.2, "dt_bias": torch.zeros(HV, K, device=DEVICE)}


def _mild(HV, K):
    return {"A_log": torch.zeros(HV, device=DEVICE), "dt_bias": randn(HV, K) * 0.5 - 6.5}


def _bimodal(HV, K):
    """Half of each head's channels forget everything within a few tokens, the others remember."""
    is_steep = torch.rand(HV, K, device=DEVICE).argsort(-1) < K // 2
    return {"A_log": torch.zeros(HV, device=DEVICE), "dt_bias": torch.where(is_steep, 3.0, -7.0) + 0.3 * randn(HV, K)}


def _trained_softplus(HV, K):
    """A up to 16 and steps from 0.001 to 0.1, log-uniform, as such models are initialised."""
    step = torch.exp(torch.rand(HV, K, device=DEVICE) * math.log(100) + math.log(1e-3))
    A = torch.rand(HV, device=DEVICE) * 15 + 1
    return {"A_log": A.log(), "dt_bias": step + torch.log(-torch.expm1(-step))}


def _steep_softplus(HV, K):
    """Log-decay of -11 a token in the mean, and of -100 and more for some tokens and channels."""
    return {"A_log": torch.full((HV,), math.log(16.0), device=DEVICE), "dt_bias": randn(HV, K) * 3}


# Lower bound (None: softplus), and what makes A_log and dt_bias.
GATES = {
    "steep": (-5.0, _steep),
    "mild": (-5.0, _mild),
    "bimodal": (-5.0, _bimodal),
    "softplus": (None, _trained_softplus),
    "steep softplus": (None, _steep_softplus),
    "bimodal softplus": (None, _bimodal),
}


def arguments(B=1, T=130, H=2, HV=2, K=128, V=128, gate="steep", dtype=torch.bfloat16, N=None, state=torch.float32):
    """Random arguments of `chunk_kda`: raw logits, and one initial state for each sequence unless `state` is None."""
    lower_bound, parameters = GATES[gate]
    inputs = {
        "q": randn(B, T, H, K, dtype=dtype),
        "k": randn(B, T, H, K, dtype=dtype),
        "v": randn(B, T, HV, V, dtype=dtype),
        "g": randn(B, T, HV, K, dtype=dtype),
        "beta": randn(B, T, HV, dtype=dtype),
        "lower_bound": lower_bound,
        **parameters(HV, K),
        **FLAGS,
    }
    if state is not None:
        inputs["initial_state"] = randn(B if N is None else N, HV, K, V, dtype=state)
    return inputs


def packed(lengths, spare=0, integer=torch.int32, **others):
    """Arguments of packed sequences, with `spare` tokens after the last one."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE, dtype=integer)
    return arguments(T=sum(lengths) + spare, N=len(lengths), **others) | {"cu_seqlens": bounds}


def exact(inputs):
    """o, final state and intermediate states in float64, of the values that the kernel is given."""
    doubles = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    return ops.chunk_kda(**doubles, output_final_state=True, return_intermediate_states=True, backend="torch")


def kernel(inputs, **others):
    return ops.chunk_kda(**inputs, **{"output_final_state": True, "backend": "cuda"} | others)


def error(actual, expected):
    """‖actual - expected‖ / ‖expected‖; NaN where either side has one."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected).norm()
    return float(difference / expected.norm()) if expected.any() else float(difference)


def assert_close(o, state, expected, factor=1.0):
    assert error(o, expected[0]) <= factor * OUTPUT_BOUND
    if state is not None:
        bound = STATE_BOUND if state.dtype == torch.float32 else ROUNDED_STATE_BOUND
        assert error(state, expected[1]) <= factor * bound


def check(inputs, factor=1.0):
    o, state = kernel(inputs)
    assert o.dtype == inputs["v"].dtype and o.is_contiguous() and state.is_contiguous()
    assert_close(o, state, exact(inputs), factor)


def names_of_reference(inputs):
    names = {"use_gate_in_kernel": "use_gate", "use_qk_l2norm_in_kernel": "use_qk_norm",
             "use_beta_sigmoid_in_kernel": "use_beta_sigmoid"}  # fmt: skip
    return {names.get(n, n): x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}


# ------------------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("gate", GATES)
def test_the_yardstick_is_the_recurrence(gate):
    inputs = arguments(T=130, gate=gate)
    for actual, expected in zip(exact(inputs), kda_reference(**names_of_reference(inputs)), strict=True):
        assert error(actual, expected) < 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_gates_widths_dtypes(T, gate, widths, dtype):
    check(arguments(2, T, 2, 4, *widths, gate, dtype))


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("beta", ["given", "sigmoid", "twice sigmoid"])
@pytest.mark.parametrize(
    ("gate", "parameters"),
    [
        ("given", ""),
        ("given fp32", ""),
        *itertools.product(("safe", "softplus"), ("A_log, dt_bias", "A_log", "dt_bias", "")),
    ],
)
def test_flags(parameters, gate, beta, norm, state_v_first, state):
    inputs = arguments(1, 130, 2, 4, 128, 64, "softplus" if gate == "softplus" else "bimodal", state=state)
    for name in ("A_log", "dt_bias"):
        if name not in parameters:
            del inputs[name]
    if gate.startswith("given"):
        inputs |= {"use_gate_in_kernel": False, "lower_bound": None}
        inputs["g"] = -inputs["g"].float().exp().mul(0.3).to(torch.float32 if "fp32" in gate else torch.bfloat16)
    if beta == "given":
        inputs |= {"use_beta_sigmoid_in_kernel": False, "beta": inputs["beta"].sigmoid()}
    inputs["allow_neg_eigval"] = beta == "twice sigmoid"
    if not norm:
        inputs["use_qk_l2norm_in_kernel"] = False
        inputs |= {name: F.normalize(inputs[name].float(), dim=-1).bfloat16() for name in "qk"}
    if state_v_first:
        inputs["state_v_first"] = True
        if state is not None:
            inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    check(inputs)


@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (2, 8), (3, 6), (5, 5), (4, 32)])
def test_grouped_value_heads(heads):
    check(arguments(1, 200, *heads, gate="bimodal"))


@pytest.mark.parametrize("dtypes", [(torch.float32, None), (None, torch.float32), (torch.float32, torch.float32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_g_and_beta_in_fp32(dtypes, dtype):
    inputs = arguments(dtype=dtype)
    for name, other in zip(("g", "beta"), dtypes, strict=True):
        inputs[name] = inputs[name].to(other or dtype)
    check(inputs)


@pytest.mark.parametrize("scale", [1.0, 0.01, -3.0])
def test_scale(scale):
    check(arguments() | {"scale": scale})


@pytest.mark.parametrize("lower_bound", [0.0, -1e-3, -1.0, -5.0])
def test_lower_bounds(lower_bound):
    check(arguments() | {"lower_bound": lower_bound, "dt_bias": torch.full((2, 128), 5.0, device=DEVICE)})


@pytest.mark.parametrize("gate", ["mild", "steep", "bimodal", "softplus", "steep softplus"])
def test_long_sequences(gate):
    check(arguments(1, 4096, 2, 2, gate=gate))


@pytest.mark.parametrize("gate", ["mild", "steep"])
def test_very_long_sequences(gate):
    """Within the bounds of the documentation, and each chunk of 64 tokens as exact as all the others."""
    inputs = arguments(1, 65536, 2, 2, gate=gate)
    o, state = kernel(inputs)
    expected = exact(inputs)
    assert error(o, expected[0]) <= 6e-3 and error(state, expected[1]) <= 5e-3
    difference = (o.double() - expected[0]).unflatten(1, (-1, 64)).norm(dim=(2, 4))
    assert difference.amax() <= 3 * difference.mean()


# So many chunks and heads, and so distributed, that both kernels run side by side on a GPU of 132 SMs.
SIDE_BY_SIDE = {
    "one sequence": lambda **others: arguments(1, 8192, 24, 24, **others),
    "grouped value heads": lambda **others: arguments(1, 8000, 4, 24, **others),
    "heads by groups": lambda **others: arguments(1, 2048, 12, 96, **others),
    "heads by uneven groups": lambda **others: arguments(1, 3000, 10, 70, **others),
    "batch": lambda **others: arguments(2, 4096, 6, 24, **others),
    "packed": lambda **others: packed([1300, 547, 0, 2048, 963, 1, 2063], 100, H=24, HV=24, **others),
    "packed, by groups": lambda **others: packed([1800, 0, 1100, 1300], H=6, HV=96, **others),
}


def check_some_heads(inputs):
    """As `check`, for the value heads of the first, a middle and the last head of q and k, to save memory."""
    o, state = kernel(inputs)
    assert o.isfinite().all() and state.isfinite().all()
    H, HV = inputs["q"].shape[2], inputs["v"].shape[2]
    for h in (0, H // 2, H - 1):
        value_heads = slice(h * (HV // H), (h + 1) * (HV // H))
        part = inputs | {name: inputs[name][:, :, h : h + 1] for name in ("q", "k")}
        part |= {name: inputs[name][:, :, value_heads] for name in ("v", "g", "beta")}
        part |= {name: inputs[name][value_heads] for name in ("A_log", "dt_bias") if inputs[name] is not None}
        part["initial_state"] = inputs["initial_state"][:, value_heads]
        assert_close(o[:, :, value_heads], state[:, value_heads], exact(part))


@pytest.mark.parametrize("inputs", SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE)
@pytest.mark.parametrize("gate", ["mild", "steep"])
def test_side_by_side(inputs, gate):
    check_some_heads(inputs(gate=gate))


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["softplus", "steep softplus"])
def test_side_by_side_widths_dtypes(gate, dtype, widths):
    K, V = widths
    check_some_heads(packed([4000, 5, 3500], H=12, HV=24, K=K, V=V, gate=gate, dtype=dtype, state=torch.bfloat16))


@pytest.mark.parametrize("inputs", SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE)
def test_side_by_side_same_bits_every_time(inputs):
    inputs = inputs(gate="mild")
    first = kernel(inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(kernel(inputs), first, strict=True))


def test_side_by_side_on_many_streams():
    """Kernels that wait for one another across streams would stand still here."""
    calls = [fwd_arguments(make(gate="mild")) for make in SIDE_BY_SIDE.values()]
    for call in calls:
        ops.fwd(**call)
    expected = [(call["out"].clone(), call["final_state"].clone()) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(5):
        for call in calls:
            call["out"].fill_(math.nan)
        torch.cuda.synchronize()
        for _ in range(3):
            for call, stream in zip(calls, streams, strict=True):
                with torch.cuda.stream(stream):
                    ops.fwd(**call)
        torch.cuda.synchronize()
        for call, (out, state) in zip(calls, expected, strict=True):
            assert torch.equal(call["out"], out) and torch.equal(call["final_state"], state)


@pytest.mark.parametrize("bounds", [[0, 9000, 3000], [5000, 0, 9000], [0, 2**31 - 1, 70, 9000], [9000, 0]])
def test_side_by_side_ends_with_bad_bounds(bounds):
    inputs = arguments(1, 9000, 2, 24, N=len(bounds) - 1)
    kernel(inputs | {"cu_seqlens": torch.tensor(bounds, device=DEVICE)})
    torch.cuda.synchronize()
    check(arguments(1, 100))


def test_side_by_side_graph():
    call = fwd_arguments(SIDE_BY_SIDE["packed"](gate="mild"))
    ops.fwd(**call)
    expected = call["out"].clone(), call["final_state"].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.fwd(**call)
    for _ in range(3):
        call["out"].fill_(math.nan)
        graph.replay()
        assert torch.equal(call["out"], expected[0]) and torch.equal(call["final_state"], expected[1])


@pytest.mark.parametrize("lengths", [None, [1000, 3, 2900]], ids=["dense", "packed"])
@pytest.mark.parametrize("forgets", [(0, 200), (1000, 1064), (1000, 1500), (2500, 4000), (0, 4000)])
def test_stretches_that_forget_everything(forgets, lengths):
    """Several CTAs share a sequence where its gate forgets: between such stretches, it remembers."""
    inputs = arguments(1, 4000, gate="mild") if lengths is None else packed(lengths, gate="mild")
    inputs["g"][:, slice(*forgets)] += 9.0
    check(inputs)
    inputs["g"][:, slice(*forgets), :, 5] -= 9.0  # but for one channel
    check(inputs)


@pytest.mark.parametrize("gate", ["steep", "steep softplus"])
@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "initial_state"])
def test_a_nan_is_never_forgotten(name, gate):
    inputs = arguments(1, 4096, gate=gate)
    clean = kernel(inputs)
    inputs[name] = inputs[name].clone()
    poisoned = inputs[name]
    if name == "initial_state":
        poisoned[0, 1, 3] = math.nan
    else:
        poisoned[0, 10, 1] = math.nan
    o, state = kernel(inputs)
    assert o[0, -1, 1].isnan().any() and state[0, 1].isnan().any()
    assert torch.equal(o[:, :, 0], clean[0][:, :, 0]) and torch.equal(state[:, 0], clean[1][:, 0])


def check_states_too(inputs):
    """As `check`, with intermediate states, and the same bits once more."""
    results = kernel(inputs, return_intermediate_states=True)
    expected = exact(inputs)
    assert_close(*results[:2], expected)
    assert error(results[2], expected[2]) <= STATE_BOUND
    again = kernel(inputs, return_intermediate_states=True)
    assert all(torch.equal(a, b) for a, b in zip(again, results, strict=True))


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("gate", ["mild", "bimodal", "bimodal softplus"])
def test_composed_states(gate, widths):
    """A long chain, of so few heads that many CTAs share it, and nothing is forgotten."""
    check_states_too(arguments(1, 8229, 1, 2, *widths, gate))


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("T", [770, 2077, 3072, 4133])
@pytest.mark.parametrize("gate", ["mild", "bimodal", "steep"])
def test_composed_states_of_short_chains(gate, T, heads, widths):
    """Segments of a few chunks, or a few chunks before each that are enough to forget; the shortest are too short."""
    check_states_too(arguments(1, T, 1, heads, *widths, gate))


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "lengths", [[8200, 3, 0, 5000], [1, 12000], [64, 4000, 4000, 100, 64], [2000, 5, 0, 900, 3100]]
)
@pytest.mark.parametrize("gate", ["mild", "steep"])
def test_composed_states_of_packed_sequences(gate, lengths, integer):
    check(packed(lengths, 5, integer, H=1, HV=1, gate=gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [3200, 9000])
def test_composed_state_takes_the_place_of_the_initial_one(T, dtype):
    inputs = arguments(1, T, 1, 1, gate="mild", state=dtype)
    call = fwd_arguments(inputs)
    o, expected = kernel(inputs)
    state = call["initial_state"]
    ops.fwd(**call | {"final_state": state})
    assert torch.equal(state.mT, expected) and torch.equal(call["out"], o)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "initial_state"])
@pytest.mark.parametrize("T", [3200, 9000])
def test_composed_states_keep_a_poison(T, name, value):
    inputs = arguments(1, T, 2, 2, gate="mild")
    clean = kernel(inputs)
    inputs[name] = inputs[name].clone()
    inputs[name][(0, 1, 3) if name == "initial_state" else (0, T // 2, 1)] = value  # head 1
    o, state = kernel(inputs)
    if not (name in ("g", "beta") and value == math.inf):  # whose functions are finite there
        assert not o[0, -1, 1].isfinite().all() and not state[0, 1].isfinite().all()
    assert torch.equal(o[:, :, 0], clean[0][:, :, 0]) and torch.equal(state[:, 0], clean[1][:, 0])


# So many chunks and heads that two CTAs, one for each half of the value channels, copy records for each other, for a
# whole chain or for segments of one, on a GPU of 132 SMs.
SHARED_RECORDS = {
    "no segments": lambda **others: arguments(1, 2600, 20, 40, **others),
    "two segments": lambda **others: arguments(1, 4300, 6, 24, **others),
    "many segments": lambda **others: arguments(1, 12900, 4, 8, **others),
    "packed, many segments": lambda **others: packed([7900, 5000], 60, H=4, HV=8, **others),
    "packed, few segments": lambda **others: packed([7900, 3, 0, 5000], H=8, HV=8, **others),
}


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("inputs", SHARED_RECORDS.values(), ids=SHARED_RECORDS)
@pytest.mark.parametrize("gate", ["mild", "bimodal", "steep"])
def test_shared_records(gate, inputs, K):
    inputs = inputs(gate=gate, K=K)
    check_some_heads(inputs)
    first = kernel(inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(kernel(inputs), first, strict=True))


@pytest.mark.parametrize("gate", ["mild", "steep"])
@pytest.mark.parametrize("name", ["v", "initial_state"])
def test_shared_records_keep_a_poison_of_one_half(name, gate):
    """Both CTAs have to plan alike, where the values of one have a NaN: it stays in its value channel."""
    inputs = SHARED_RECORDS["many segments"](gate=gate)
    expected = kernel(inputs)
    inputs[name] = inputs[name].clone()
    inputs[name][(0, 1, 3, 70) if name == "initial_state" else (0, 6000, 1, 70)] = math.nan  # head 1
    o, state = kernel(inputs)
    assert o[0, -1, 1, 70].isnan() and state[0, 1, :, 70].isnan().all()
    others = torch.arange(8, device=DEVICE) != 1
    assert torch.equal(o[:, :, others], expected[0][:, :, others])
    assert torch.equal(state[:, others], expected[1][:, others])
    clean = slice(0, 64)
    assert error(o[:, :, 1, clean], expected[0][:, :, 1, clean].double()) <= 2 * OUTPUT_BOUND
    assert error(state[:, 1, :, clean], expected[1][:, 1, :, clean].double()) <= 2 * STATE_BOUND


def test_shared_records_and_the_state_in_place():
    call = fwd_arguments(SHARED_RECORDS["many segments"](gate="mild"))
    ops.fwd(**call)
    state, out = call["initial_state"].clone(), torch.full_like(call["out"], math.nan)
    ops.fwd(**call | {"initial_state": state, "final_state": state, "out": out})
    assert torch.equal(state, call["final_state"]) and torch.equal(out, call["out"])


@pytest.mark.parametrize("gate", ["steep", "mild", "softplus"])
def test_every_run_gives_the_same_bits(gate):
    """Many chunks, so that CTAs of both kernels run beside each other in every way."""
    inputs = arguments(1, 16384, 4, 4, gate=gate)
    o, state = kernel(inputs)
    for _ in range(10):
        again, state_again = kernel(inputs)
        assert torch.equal(again, o) and torch.equal(state_again, state)


@pytest.mark.parametrize("T, heads", [(4097, 8), (3072, 10), (2048, 12), (1024, 4)])
@pytest.mark.parametrize("gate", ["mild", "steep"])
def test_few_heads_give_the_same_bits(gate, T, heads):
    """Many CTAs to a chain, which compose states, share it or forget: a race may show once in forty runs."""
    inputs = arguments(1, T, heads, heads, gate=gate)
    o, state = kernel(inputs)
    for _ in range(60):
        again, state_again = kernel(inputs)
        assert torch.equal(again, o) and torch.equal(state_again, state)


@pytest.mark.parametrize("gate", ["mild", "steep"])
@pytest.mark.parametrize("lengths, heads", [([1024], 4), ([4096], 8), ([512, 700], 3), ([130], 40)])
def test_calls_that_need_each_other(lengths, heads, gate):
    """A call starts while the one before it ends: what that writes is read afterwards, not overwritten early."""
    inputs = packed(lengths, H=heads, HV=heads, gate=gate)
    results = []
    for waits in (True, False):
        call = dict(inputs)
        for _ in range(12):
            call["v"], call["initial_state"] = kernel(call)
            if waits:
                torch.cuda.synchronize()
        results.append((call["v"], call["initial_state"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("values, states", [(1e30, 1e30), (1e-25, 1e-25), (1e-30, 1.0), (1.0, 1e-30), (1e30, 1.0),
                                            (1.0, 1e30), (0.0, 1e-20), (0.0, 1e36)])  # fmt: skip
@pytest.mark.parametrize("T", [200, 1000, 4096])
def test_magnitudes(T, values, states):
    """Values and states of any size, alike or not, in short chains and in composed ones."""
    inputs = arguments(1, T, 3, 3, gate="mild")
    inputs["v"] = (inputs["v"].float() * values).bfloat16()
    inputs["initial_state"] *= states
    check(inputs)


@pytest.mark.parametrize("steps", [0.0, 1.0, 20.0, 100.0, 3e3, math.inf])
def test_any_decay_is_exact(steps):
    """Log-decays between 0 and -`steps`, drawn for each token and channel: no factor may overflow, or be clamped."""
    inputs = arguments(1, 300) | {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None, "lower_bound": None}
    uniform = torch.rand(1, 300, 2, 128, device=DEVICE)
    inputs["g"] = torch.where(uniform < 0.5, 0.0, -math.inf) if steps == math.inf else -uniform.pow(4) * steps
    o, state = kernel(inputs)
    expected = exact(inputs)
    assert o.isfinite().all() and state.isfinite().all()
    assert_close(o, state, expected)


@pytest.mark.parametrize("beta", [0.0, 4.0, 20.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_correlated_keys(spread, beta):
    """Keys that are nearly one key, β near 1, nothing forgotten: I + A is as far from I as it gets. Its inverse has
    large entries that cancel, and the bounds leave room for that."""
    inputs = arguments(1, 1000, gate="mild")
    inputs["k"] = (randn(1, 1, 2, 128) + spread * randn(1, 1000, 2, 128)).bfloat16()
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    check(inputs, factor=2.5)


# --------------------------------------------------------------------------------------------------- packed, and states

PACKINGS = {
    "one": [100],
    "one token": [1],
    "all empty": [0, 0, 0],
    "empty at the ends": [0, 70, 0],
    "odd": [1, 0, 64, 65, 0, 1, 127, 2, 63, 0, 300],
    "equal": [64] * 9,
    "single tokens": [1] * 65,
    "uneven": [1300, 1, 547, 0, 963],
}


@pytest.mark.parametrize("spare", [0, 37])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("gate", ["mild", "steep softplus"])
def test_packed(lengths, gate, integer, spare):
    inputs = packed(lengths, spare, integer, H=1, HV=2, gate=gate)
    check(inputs)
    o = kernel(inputs)[0]
    assert not o[:, sum(lengths) :].any()


@pytest.mark.parametrize("N", [1, 2, 33, 1000, 4096])
def test_many_sequences(N):
    lengths = torch.randint(0, 6, (N,)).tolist()
    lengths[N // 2] = 200
    check(packed(lengths, H=1, HV=1, K=64, V=64, gate="bimodal"))


@pytest.mark.parametrize("B", [1, 3, 300])
def test_batches(B):
    check(arguments(B, 70, 1, 2, 64, 64))


@pytest.mark.parametrize("T", [0, 5])
def test_empty_batch(T):
    o, state = kernel(arguments(0, T))
    assert o.shape == (0, T, 2, 128) and state.shape == (0, 2, 128, 128)


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("lengths", [None, *PACKINGS.values()], ids=["dense", *PACKINGS])
def test_intermediate_states(lengths, state_v_first, state):
    if lengths is None:
        inputs = arguments(2, 200, V=64, state=state)
        count = 4
    else:
        inputs = packed(lengths, 3, V=64, state=state)
        count = sum(-(-length // 64) for length in lengths)
    if state_v_first:
        inputs["state_v_first"] = True
        if state is not None:
            inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    o, final_state, states = kernel(inputs, return_intermediate_states=True)
    expected = exact(inputs)
    assert_close(o, final_state, expected)
    assert states.shape == expected[2].shape and states.dtype == final_state.dtype
    bound = STATE_BOUND if states.dtype == torch.float32 else ROUNDED_STATE_BOUND
    assert error(states[:, :count], expected[2][:, :count]) <= bound
    if lengths is not None:
        bounds = inputs["cu_seqlens"].cpu()
        assert kernel(inputs, return_intermediate_states=True, cu_seqlens_cpu=bounds)[2].shape[1] == count


# More value heads than the workspace may hold at a time: halves of one group, uneven parts of it, and groups.
LARGE_RECORDS = {
    "half a group": (1, 16, 128, 128),
    "parts of a group": (1, 11, 128, 64),
    "groups": (3, 12, 128, 64),
    "one group a part": (2, 34, 64, 64),
}


@pytest.mark.parametrize("lengths", [None, [4000, 1, 0, 1099]], ids=["dense", "packed"])
@pytest.mark.parametrize("shape", LARGE_RECORDS.values(), ids=LARGE_RECORDS)
def test_workspace_of_at_most_twice_the_inputs(shape, lengths):
    shape = dict(zip(("H", "HV", "K", "V"), shape, strict=True))
    inputs = arguments(1, 5100, gate="mild", **shape) if lengths is None else packed(lengths, gate="mild", **shape)
    if lengths is not None:
        inputs["beta"] = inputs["beta"].float()
    kernel(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = kernel(inputs, return_intermediate_states=True)
    workspace = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    assert 2**20 < workspace <= 2 * sum(x.nbytes for x in inputs.values() if isinstance(x, torch.Tensor))
    expected = exact(inputs)
    assert_close(*results[:2], expected)
    count = sum(-(-length // 64) for length in lengths or [5100])
    assert error(results[2][:, :count], expected[2][:, :count]) <= STATE_BOUND


@pytest.mark.parametrize("cuts", [[64], [1], [63, 65], [100, 101, 500], list(range(16, 1000, 16))])
@pytest.mark.parametrize("gate", ["mild", "bimodal softplus"])
def test_calls_that_pass_the_state_on_equal_one_call(cuts, gate):
    inputs = arguments(1, 1000, gate=gate)
    expected = exact(inputs)
    outputs, state = [], inputs["initial_state"]
    for start, end in itertools.pairwise([0, *cuts, 1000]):
        piece = {n: inputs[n][:, start:end] for n in ("q", "k", "v", "g", "beta")}
        o, state = kernel(inputs | piece | {"initial_state": state})
        outputs.append(o)
    o, whole_state = kernel(inputs)
    assert_close(torch.cat(outputs, 1), state, expected)
    assert_close(o, whole_state, expected)


# ---------------------------------------------------------------------------------------------------- FlashKDA's call


def fwd_arguments(inputs):
    """Arguments of `fwd` from those of `chunk_kda`: states of [V, K], and outputs full of NaN."""
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "cu_seqlens")
    call = {name: inputs.get(name) for name in names}
    call |= {"scale": inputs["q"].shape[-1] ** -0.5, "out": torch.full_like(inputs["v"], math.nan)}
    if "initial_state" in inputs:
        call["initial_state"] = inputs["initial_state"].mT.contiguous()
        call["final_state"] = torch.full_like(call["initial_state"], math.nan)
    return call


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [None, PACKINGS["odd"]], ids=["dense", "packed"])
@pytest.mark.parametrize("T", LENGTHS)
def test_fwd(T, lengths, gate):
    inputs = arguments(1, T, gate=gate) if lengths is None else packed([*lengths, T], 5, gate=gate)
    call = fwd_arguments(inputs)
    assert ops.fwd(**call) is None
    assert_close(call["out"], call["final_state"].mT, exact(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fwd_updates_the_state_in_place(dtype):
    inputs = arguments(2, 100, state=dtype)
    call = fwd_arguments(inputs)
    state = call["initial_state"]
    ops.fwd(**call | {"final_state": state})
    assert_close(call["out"], state.mT, exact(inputs))


def test_fwd_without_states():
    inputs = arguments(2, 100, state=None)
    call = fwd_arguments(inputs)
    final_state = torch.full((2, 2, 128, 128), math.nan, device=DEVICE)
    expected = exact(inputs)
    ops.fwd(**call)
    assert_close(call["out"], None, expected)
    ops.fwd(**call, final_state=final_state)
    assert_close(call["out"], final_state.mT, expected)


def test_fwd_takes_flat_dt_bias_and_bf16_parameters():
    inputs = arguments()
    inputs |= {"dt_bias": inputs["dt_bias"].bfloat16(), "A_log": inputs["A_log"].bfloat16()}
    call = fwd_arguments(inputs)
    ops.fwd(**call | {"dt_bias": call["dt_bias"].flatten()})
    assert_close(call["out"], call["final_state"].mT, exact(inputs))


def test_fwd_of_inputs_that_require_grad_records_nothing():
    call = fwd_arguments(arguments())
    call["q"].requires_grad_()
    ops.fwd(**call)
    assert not call["out"].requires_grad and call["out"].isfinite().all()


# ----------------------------------------------------------------------------------------------- where tensors may lie


def _views(B=2, T=100, H=2, HV=4, K=128, V=64):
    """q, k, v, g, β as slices of one projection, as a fused layer makes them: all rows at multiples of 16 bytes."""
    widths = {"q": (H, K), "k": (H, K), "v": (HV, V), "g": (HV, K), "beta": (HV, 1)}
    flat = randn(B, T, sum(a * b for a, b in widths.values()) + 4, dtype=torch.bfloat16)
    views, start = {}, 0
    for name, (heads, width) in widths.items():
        views[name] = flat[..., start : start + heads * width].unflatten(-1, (heads, width))
        start += heads * width
    return views | {"beta": views["beta"].squeeze(-1)}


def test_packed_projections_without_a_copy():
    views = _views()
    inputs = arguments(2, 100, 2, 4, 128, 64) | views
    whole = {name: x.contiguous() for name, x in views.items()}
    results, peaks = [], []
    for call in (inputs, inputs | whole) * 2:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append(kernel(call))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert_close(*results[-1], exact(inputs))
    assert all(torch.equal(a, b) for a, b in zip(results[2], results[3], strict=True))
    assert peaks[2] == peaks[3]


LAYOUTS = ("heads first", "every other", "odd start", "odd rows", "repeated")


def laid_out(x, layout):
    """x [B, T, heads, ...] as a view: not contiguous, not aligned, NaN beside it, or its first token repeated."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack((x, x * math.nan), -1).flatten(-2)[..., ::2]
    if layout == "odd start":
        return torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape).copy_(x)
    if layout == "odd rows":
        return F.pad(x, (0, 3), value=math.nan)[..., : x.shape[-1]]
    return x[:, :1].expand(x.shape)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(name, layout):
    inputs = arguments(2, 70, 2, 2)
    check(inputs | {name: laid_out(inputs[name], layout)})


@pytest.mark.parametrize("layout", ["heads first", "every other", "odd start"])
def test_any_layout_of_outputs(layout):
    inputs = arguments(2, 70)
    call = fwd_arguments(inputs)
    for name in ("out", "final_state"):
        x = call[name]
        if layout == "heads first":
            call[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "every other":
            call[name] = x.repeat_interleave(2, -1)[..., ::2]
        else:
            flat = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=DEVICE)
            call[name] = flat[1:].view(x.shape)
    call["initial_state"] = inputs["initial_state"].mT  # a view, too
    ops.fwd(**call)
    assert_close(call["out"], call["final_state"].mT, exact(inputs))


class Guarded:
    """A tensor of NaN between canaries: bytes that a kernel must leave alone."""

    margin, canary = 4096, 0xA5

    def __init__(self, *shape, dtype):
        bytes = math.prod(shape) * dtype.itemsize
        self.buffer = torch.full((bytes + 2 * self.margin,), self.canary, dtype=torch.uint8, device=DEVICE)
        self.tensor = self.buffer[self.margin : self.margin + bytes].view(dtype).view(shape).fill_(math.nan)

    def is_intact(self):
        edges = torch.cat((self.buffer[: self.margin], self.buffer[self.buffer.numel() - self.margin :]))
        return bool((edges == self.canary).all())


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("lengths", [None, [1, 0, 66]], ids=["dense", "packed"])
def test_nothing_is_written_beyond_the_outputs(lengths, T, dtypes, widths):
    K, V = widths
    dtype, state_dtype = dtypes
    if lengths is None:
        inputs, N, chunks = arguments(2, T, 2, 2, K, V, dtype=dtype, state=state_dtype), 2, -(-T // 64)
        B = 2
    else:
        inputs = packed([*lengths, T], 3, H=2, HV=2, K=K, V=V, dtype=dtype, state=state_dtype)
        B, N, total = 1, 4, T + 70
        chunks = min(total, (total + 63 * N) // 64)
    out = Guarded(*inputs["v"].shape, dtype=dtype)
    final_state, states = (Guarded(*n, 2, V, K, dtype=state_dtype) for n in ((N,), (B, chunks)))
    inputs |= {"initial_state": inputs["initial_state"].mT.contiguous(), "state_v_first": True}
    x = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    parameters = (inputs["A_log"], inputs["dt_bias"], inputs["lower_bound"], inputs["initial_state"])
    buffers = (final_state.tensor, states.tensor, inputs.get("cu_seqlens"))
    torch.ops.kda_hf_cuda.prefill(*x, K**-0.5, out.tensor, *parameters, *buffers, True, True, True, False, True)
    assert out.is_intact() and final_state.is_intact() and states.is_intact()
    assert_close(out.tensor, final_state.tensor, exact(inputs))


@pytest.mark.parametrize(
    "bounds", [[0, 90], [0, 40, 20], [3, 50], [-70, 50], [0, 2**31 - 1, 70], [70, 0], [0, 40, 2, 70]]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bad_bounds_on_the_gpu(bounds, dtype, monkeypatch):
    """Nothing is read or written out of bounds, whatever the device's bounds say; and they are checked on demand."""
    call = fwd_arguments(arguments(1, 70))
    call["cu_seqlens"] = torch.tensor(bounds, dtype=dtype, device=DEVICE)
    out = Guarded(*call["out"].shape, dtype=torch.bfloat16)
    final_state = Guarded(len(bounds) - 1, *call["initial_state"].shape[1:], dtype=torch.float32)
    call |= {"initial_state": None, "out": out.tensor, "final_state": final_state.tensor}
    ops.fwd(**call)
    torch.cuda.synchronize()
    assert out.is_intact() and final_state.is_intact()
    monkeypatch.setenv("KDA_HF_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens"):
        ops.fwd(**call)


def test_more_elements_than_32_bits_count():
    T, HV = 2**18, 72
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GB")
    inputs = arguments(1, T, 1, HV, 128, 128, "steep")
    o, state = kernel(inputs)
    last = {name: inputs[name][:, :, -1:] for name in ("v", "g", "beta")}
    last |= {name: inputs[name][-1:] for name in ("A_log", "dt_bias")}
    last["initial_state"] = inputs["initial_state"][:, -1:]
    tail = T - 4096  # the steep gate has forgotten all that came before the last few hundred tokens
    last |= {name: (last | inputs | last)[name][:, tail:] for name in ("q", "k", "v", "g", "beta")}
    expected = exact(inputs | last)
    assert error(o[:, tail + 1000 :, -1:], expected[0][:, 1000:]) <= OUTPUT_BOUND
    assert error(state[:, -1:], expected[1]) <= STATE_BOUND


# -------------------------------------------------------------------------------------- NaN and inf stay where they are


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias"])
@pytest.mark.parametrize("lengths", [None, [10, 70, 0, 1, 130]], ids=["dense", "packed"])
def test_poison_stays_in_its_sequence_and_head(lengths, name, value):
    inputs = arguments(3, 130, 2, 4) if lengths is None else packed(lengths, 9, H=2, HV=4)
    o, state = kernel(inputs)
    poisoned = inputs[name].clone()
    head = 1
    if name in ("A_log", "dt_bias"):
        poisoned[head] = value
    elif name == "initial_state":
        poisoned[1, head, 3, 5] = value
    elif lengths is None:
        poisoned[1, 40, head] = value
    else:
        poisoned[0, 40, head] = value
    actual = kernel(inputs | {name: poisoned})
    heads = slice(2, 4) if name in ("q", "k") else slice(1, 2)  # value heads 2 and 3 read query and key head 1
    clean, clean_state = torch.ones_like(o, dtype=torch.bool), torch.ones_like(state, dtype=torch.bool)
    if name in ("A_log", "dt_bias"):
        clean[:, :, heads], clean_state[:, heads] = False, False
    elif lengths is None:
        clean[1, :, heads], clean_state[1, heads] = False, False
    else:
        clean[0, 10:80, heads], clean_state[1, heads] = False, False
    assert torch.equal(actual[0][clean], o[clean]) and torch.equal(actual[1][clean_state], state[clean_state])
    if math.isnan(value):
        assert actual[0][~clean].isnan().any()


def test_poison_before_a_sequence_and_after_the_last():
    inputs = packed([64, 0, 10], 30)
    o, state = kernel(inputs)
    poisoned = {name: inputs[name].clone() for name in ("q", "k", "v", "g", "beta")}
    for x in poisoned.values():
        x[:, 74:] = math.nan
    actual = kernel(inputs | poisoned)
    assert torch.equal(actual[0], o) and torch.equal(actual[1], state)


def test_poison_comes_after_the_poisoned_token():
    """A causal operator: what precedes the token is as it was."""
    inputs = arguments(1, 200)
    o = kernel(inputs)[0]
    for name in ("q", "k", "v", "g", "beta"):
        poisoned = inputs[name].clone()
        poisoned[:, 150] = math.nan
        actual = kernel(inputs | {name: poisoned})[0]
        assert torch.equal(actual[:, :128], o[:, :128]), name


# ------------------------------------------------------------------------------------------- streams, graphs, devices


@pytest.mark.parametrize("lengths", [None, PACKINGS["odd"]], ids=["dense", "packed"])
def test_same_bits_every_time(lengths):
    inputs = arguments(2, 2000, 4, 8, gate="mild") if lengths is None else packed(lengths, H=4, HV=8)
    first = kernel(inputs)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(kernel(inputs), first, strict=True))


@pytest.mark.parametrize("lengths", [None, PACKINGS["odd"], [1000, 24]], ids=["dense", "odd", "two"])
def test_graph_replay_equals_eager(lengths):
    def fresh():
        return fwd_arguments(arguments(2, 1024, gate="bimodal") if lengths is None else packed(lengths))

    call = fresh()
    for _ in range(2):
        ops.fwd(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.fwd(**call)
    for _ in range(3):
        other = fresh()
        for name, x in call.items():
            if isinstance(x, torch.Tensor):
                x.copy_(other[name])
        graph.replay()
        ops.fwd(**other)
        assert torch.equal(call["out"], other["out"]) and torch.equal(call["final_state"], other["final_state"])


def test_graph_with_other_bounds():
    """The bounds are read on the device: a captured call serves other packings of as many sequences."""
    inputs = packed([30, 40, 130])
    call = fwd_arguments(inputs)
    ops.fwd(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.fwd(**call)
    for bounds in ([0, 0, 0, 200], [0, 65, 66, 150], [0, 200, 200, 200]):
        call["cu_seqlens"].copy_(torch.tensor(bounds))
        graph.replay()
        assert_close(call["out"], call["final_state"].mT, exact(inputs))


def test_other_stream():
    """The kernel runs on the current stream: after what made its inputs there, before what reads its outputs."""
    expected_inputs = arguments(1, 500)
    expected = exact(expected_inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        inputs = {n: torch.full_like(x, math.nan) if isinstance(x, torch.Tensor) else x for n, x in
                  expected_inputs.items()}  # fmt: skip
        torch.cuda._sleep(100_000_000)
        for name, x in inputs.items():
            if isinstance(x, torch.Tensor):
                x.copy_(expected_inputs[name])
        o, state = kernel(inputs)
        o, state = o.clone(), state.clone()
    stream.synchronize()
    assert_close(o, state, expected)


def check_on_second_device(inputs, run, expected, close):
    """And that tensors of both are refused. Returns the inputs over there."""
    moved = {n: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    for _ in range(2):
        o, state = run(moved)
        assert o.device == state.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        close(o.to(DEVICE), state.to(DEVICE), expected)
        close(*run(inputs), expected)
    with pytest.raises(RuntimeError, match="`k` must be on cuda:1"):
        run(moved | {"k": inputs["k"]})
    return moved


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    inputs = arguments(1, 300)
    check_on_second_device(inputs, kernel, exact(inputs), assert_close)


# ---------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lengths", [None, [30, 0, 170]], ids=["dense", "packed"])
def test_compiles_without_graph_breaks(lengths, dynamic):
    inputs = arguments(2, 200) if lengths is None else packed(lengths)
    call, again = fwd_arguments(inputs), fwd_arguments(inputs)
    chunk = torch.compile(kernel, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for actual, expected in zip(chunk(inputs), kernel(inputs), strict=True):
        assert torch.equal(actual, expected)
    torch.compile(ops.fwd, fullgraph=True, backend="aot_eager", dynamic=dynamic)(**call)
    ops.fwd(**again)
    assert torch.equal(call["out"], again["out"]) and torch.equal(call["final_state"], again["final_state"])


@pytest.mark.parametrize("lengths", [None, [30, 0, 40]], ids=["dense", "packed"])
def test_opcheck(lengths):
    inputs = arguments(2, 70) if lengths is None else packed(lengths)
    B, N = (2, 2) if lengths is None else (1, 3)
    x = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    state = inputs["initial_state"]
    states = torch.zeros(B, 2 if lengths is None else (70 + 63 * N) // 64, *state.shape[1:], device=DEVICE)
    outputs = (torch.zeros_like(inputs["v"]), inputs["A_log"], inputs["dt_bias"], -5.0, state, torch.zeros_like(state))
    torch.library.opcheck(
        torch.ops.kda_hf_cuda.prefill.default,
        (*x, 0.1, *outputs, states, inputs.get("cu_seqlens"), True, True, True, False, False),
    )


# ----------------------------------------------------------------------------------------- errors, and other backends

ERRORS = [
    (ValueError, "q", lambda x: x[0], "[B, T, H, K]"),
    (ValueError, "k", lambda x: x[:, 1:], "[B, T, H, K]"),
    (ValueError, "k", lambda x: x[..., :64], "[B, T, H, K]"),
    (ValueError, "v", lambda x: x[:, :, :1].expand(-1, -1, 3, -1), "multiple of the 2 heads"),
    (ValueError, "g", lambda x: x[..., :-1], "[B, T, HV, K]"),
    (ValueError, "beta", lambda x: x.unsqueeze(-1), "[B, T, HV]"),
    (ValueError, "A_log", lambda x: x[:1], "[HV]"),
    (ValueError, "dt_bias", lambda x: x[:, :1], "[HV, K]"),
    (ValueError, "initial_state", lambda x: x[:, :, :64], "[N, HV,"),
    (ValueError, "initial_state", lambda x: torch.cat((x, x)), "[N, HV,"),
    (ValueError, "q", lambda x: x.int(), "int32"),
    (ValueError, "beta", lambda x: x.long(), "int64"),
    (ValueError, "A_log", lambda x: x.int(), "int32"),
    (ValueError, "lower_bound", lambda _: -5.5, "[-5, 0]"),
    (ValueError, "lower_bound", lambda _: 0.5, "[-5, 0]"),
    (ValueError, "lower_bound", lambda _: math.nan, "nan"),
    (TypeError, "lower_bound", lambda _: "-5", "str"),
    (TypeError, "scale", lambda _: "1", "str"),
    (ValueError, "cu_seqlens", lambda _: torch.tensor([[0, 70]], device=DEVICE), "[N + 1]"),
    (ValueError, "cu_seqlens", lambda _: torch.tensor([0], device=DEVICE), "[N + 1]"),
    (ValueError, "cu_seqlens", lambda _: torch.tensor([0.0, 70.0], device=DEVICE), "int32 or int64"),
    (ValueError, "cu_seqlens", lambda _: torch.tensor([0, 70], device=DEVICE), "B = 2"),
    (TypeError, "cu_seqlens", lambda _: [0, 70], "list"),
    *((TypeError, name, lambda x: x.tolist(), "list") for name in ("q", "k", "v", "g", "beta", "A_log")),
    *((RuntimeError, name, lambda x: x.cpu(), "cpu") for name in ("k", "v", "g", "beta", "dt_bias", "initial_state")),
    *((RuntimeError, name, lambda x: x.to("meta"), "meta") for name in ("k", "beta", "initial_state")),
]


def serve_one_of_each():
    """From here on, calls go to the extension unchecked."""
    kernel(arguments(1, 2))
    ops.fwd(**fwd_arguments(arguments(1, 2)))
    assert cuda.serves_again("fwd", randn(1)) and cuda.serves_again("chunk_kda", randn(1))


@pytest.mark.parametrize("served_before", [False, True])
@pytest.mark.parametrize(("kind", "name", "change", "words"), ERRORS)
def test_errors_come_before_anything_is_written(kind, name, change, words, served_before, monkeypatch):
    monkeypatch.setattr(cuda, "_served", set())
    if served_before:
        serve_one_of_each()
    inputs = arguments(2, 70) | {"scale": 0.1}
    with pytest.raises(kind) as caught:
        ops.chunk_kda(**inputs | {name: change(inputs.get(name))}, output_final_state=True)
    assert f"`{name}`" in str(caught.value) and words in str(caught.value)

    call = fwd_arguments(inputs)
    buffers = {buffer: call[buffer].fill_(7.0) for buffer in ("out", "final_state")}
    with pytest.raises(kind) as caught:
        ops.fwd(**call | {name: change(call.get(name))})
    assert f"`{name}`" in str(caught.value)
    assert all((x == 7).all() for x in buffers.values())


@pytest.mark.parametrize("served_before", [False, True])
@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        (ValueError, "out", lambda x: x[:, 1:]),
        (ValueError, "out", lambda x: x.float()),
        (TypeError, "out", lambda x: None),
        (RuntimeError, "out", lambda x: x.cpu()),
        (ValueError, "final_state", lambda x: x[:1]),
        (ValueError, "final_state", lambda x: x.bfloat16()),
        (RuntimeError, "final_state", lambda x: x.cpu()),
        (TypeError, "final_state", lambda x: 1.0),
        (TypeError, "scale", lambda x: None),
    ],
)
def test_errors_of_the_outputs(kind, name, change, served_before, monkeypatch):
    monkeypatch.setattr(cuda, "_served", set())
    if served_before:
        serve_one_of_each()
    call = fwd_arguments(arguments(2, 70))
    buffers = {buffer: call[buffer].fill_(7.0) for buffer in ("out", "final_state")}
    with pytest.raises(kind, match=f"`{name}`"):
        ops.fwd(**call | {name: change(call[name])})
    assert all((x == 7).all() for x in buffers.values())


OTHER_BACKENDS = {
    "fp32 inputs": dict.fromkeys(("q", "k", "v", "g", "beta"), torch.float32),
    "fp32 q": {"q": torch.float32},
    "fp16 k": {"k": torch.float16},
    "fp16 g": {"g": torch.float16},
    "fp16 states": {"initial_state": torch.float16},
    "fp64 states": {"initial_state": torch.float64},
}


@pytest.mark.parametrize("served_before", [False, True])
@pytest.mark.parametrize("dtypes", OTHER_BACKENDS.values(), ids=OTHER_BACKENDS)
def test_what_the_kernel_lacks_another_backend_serves(dtypes, served_before, monkeypatch):
    monkeypatch.setattr(cuda, "_served", set())
    if served_before:
        serve_one_of_each()
    inputs = arguments(1, 70)
    inputs |= {name: inputs[name].to(dtype) for name, dtype in dtypes.items()}
    o, state = ops.chunk_kda(**inputs, output_final_state=True)
    assert o.dtype == inputs["v"].dtype and state.dtype == inputs["initial_state"].dtype
    assert error(o, exact(inputs)[0]) < 1e-2
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve"):
        kernel(inputs)
    call = fwd_arguments(inputs)
    ops.fwd(**call)
    assert error(call["out"], exact(inputs)[0]) < 1e-2


def test_gradients_go_elsewhere(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_logged", set())
    inputs = arguments(1, 70)
    inputs["v"].requires_grad_()
    with caplog.at_level(logging.INFO, "kda_hf"):
        for _ in range(2):
            ops.chunk_kda(**inputs)[0].sum().backward()
    assert inputs["v"].grad.any()
    assert sum("no backward" in record.getMessage() for record in caplog.records) == 1
    with torch.no_grad():
        assert_close(*kernel(inputs), exact(inputs))


def test_environment(monkeypatch):
    serve_one_of_each()
    calls = []
    call = cuda._call
    monkeypatch.setattr(cuda, "_call", lambda *args, **how: calls.append(len(calls)) or call(*args, **how))
    monkeypatch.setattr(backends.fla, "VERSION", None)
    inputs = arguments()

    def are_ours():
        """How many of two calls the extension served."""
        calls.clear()
        o, arguments = ops.chunk_kda(**inputs)[0], fwd_arguments(inputs)
        ops.fwd(**arguments)
        assert error(arguments["out"], o.double()) < 1e-4
        return len(calls)

    assert are_ours() == 2
    for variable, value in (("KDA_HF_BACKEND", "torch"), ("FLA_FLASH_KDA", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert are_ours() == 0
    monkeypatch.setenv("KDA_HF_BACKEND", "cuda")
    assert are_ours() == 2
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    with pytest.raises(RuntimeError, match="FLA_FLASH_KDA=0"):
        kernel(inputs)
    with pytest.raises(RuntimeError, match="KDA_HF_BACKEND=cuda"):
        ops.fwd(**fwd_arguments(inputs))


def _fla_version():
    try:
        return tuple(int(part) for part in metadata.version("fla-core").split(".")[:2])
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.skipif((_fla_version() or (0,)) < (0, 6), reason="needs fla-core 0.6 or newer")
@pytest.mark.parametrize("gate", ["steep", "mild", "softplus"])
@pytest.mark.parametrize("lengths", [None, [300, 1, 211]], ids=["dense", "packed"])
def test_parity_with_fla(lengths, gate):
    inputs = arguments(1, 512, 2, 4, gate=gate) if lengths is None else packed(lengths, H=2, HV=4, gate=gate)
    theirs = ops.chunk_kda(**inputs, output_final_state=True, backend="fla")
    expected = exact(inputs)
    ours = kernel(inputs)
    for a, b, yardstick in zip(ours, theirs, expected, strict=False):
        assert error(a, b.double()) < 1e-2
        assert error(a, yardstick) <= 1.05 * error(b, yardstick)


@pytest.mark.skipif((_fla_version() or (0,)) < (0, 6), reason="needs fla-core 0.6 or newer")
def test_gradients_by_fla_behind_the_last_sequence():
    inputs = packed([70, 1, 130], spare=9, H=2, HV=2, state=None)
    names = ("q", "k", "v", "g", "beta")
    gradients = []
    for backend in ("fla", "torch"):
        leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
        o, _ = ops.chunk_kda(**inputs | leaves, backend=backend)
        o.float().square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for name, ours, expected in zip(names, *gradients, strict=True):
        assert (ours[:, -9:] == 0).all(), name
        assert error(ours, expected.double()) < 3e-2, name
