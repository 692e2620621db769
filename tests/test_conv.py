"""The CUDA convolution, through `causal_conv1d`, against the PyTorch form in float64. Needs a GPU that can run it."""

import itertools
import math
import os

import pytest
import torch

from kda_hf import ops
from kda_hf.ops import fla


DEVICE = torch.device("cuda")


def _refusal() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    return next(row["reason"] or None for row in ops.backend_report("fwd") if row["backend"] == "cuda")


pytestmark = pytest.mark.skipif(_refusal() is not None, reason=f"no CUDA backend: {_refusal()}")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Relative L2 of the outputs; states are copies of inputs.
BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4, torch.float32: 1e-6}
PACKINGS = {"odd": [5, 0, 1, 2, 3, 300, 0, 64], "ones": [1] * 40, "one": [129], "empty": [0, 0, 0]}


@pytest.fixture(autouse=True)
def seed_and_backend(monkeypatch):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    monkeypatch.setenv("KDA_HF_BACKEND", "cuda")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def arguments(B=2, T=100, D=264, W=4, N=None, dtype=torch.bfloat16, weight=None, state=None):
    return {
        "x": randn(B, T, D, dtype=dtype),
        "weight": randn(D, W, dtype=weight or dtype),
        "bias": randn(D, dtype=weight or dtype),
        "initial_state": randn(B if N is None else N, D, W, dtype=state or dtype),
    }


def packed(lengths, spare=0, integer=torch.int32, **others):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE, dtype=integer)
    return arguments(1, sum(lengths) + spare, N=len(lengths), **others) | {"cu_seqlens": bounds}


def exact(call):
    """By the PyTorch operator in float64, on the CPU, which no kernel of ours serves."""
    doubles = {
        name: (x.double() if x.is_floating_point() else x).cpu() if isinstance(x, torch.Tensor) else x
        for name, x in call.items()
    }
    activation, bounds = doubles.get("activation", "silu"), doubles.get("cu_seqlens")
    tensors = [doubles.get(name) for name in ("x", "weight", "bias", "initial_state")]
    return torch.ops.kda_hf.causal_conv1d(*tensors, activation, bounds, True)


def check(call):
    y, state = ops.causal_conv1d(**call, output_final_state=True)
    expected = exact(call)
    assert y.dtype == call["x"].dtype and y.is_contiguous()
    error = (y.cpu().double() - expected[0]).norm()
    assert error <= BOUNDS[y.dtype] * expected[0].norm()
    assert torch.equal(state.cpu(), expected[1].to(state.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 8, 31, 33, 100, 1000])
def test_lengths_widths_dtypes(T, W, dtype):
    for omitted in ((), ("bias",), ("initial_state",)):
        check({name: x for name, x in arguments(T=T, W=W, dtype=dtype).items() if name not in omitted})
    check(arguments(T=T, W=W, dtype=dtype) | {"activation": None})


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("spare", [0, 3, 70])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_packed(lengths, spare, integer):
    for W in (2, 3, 4):
        check(packed(lengths, spare, integer, W=W))


@pytest.mark.parametrize("N", [256, 4096])
def test_many_sequences(N):
    check(packed(torch.randint(0, 4, (N,)).tolist(), D=64))


@pytest.mark.parametrize("weight", [None, torch.float32])
@pytest.mark.parametrize("state", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, state, weight):
    check(arguments(T=9, D=40, dtype=dtype, weight=weight, state=state))


@pytest.mark.parametrize("D", [8, 16, 136, 256, 264, 6144])
def test_channels(D):
    check(arguments(T=50, D=D))


def test_strided_rows():
    call = arguments()
    wide = randn(2, 100, 264 + 80, dtype=torch.bfloat16)
    check(call | {"x": wide[..., 40:-40]})
    check(call | {"x": wide[..., 3:-77]})  # not at multiples of 16 bytes: copied


def test_state_in_place_and_nothing_beside_the_outputs():
    for call in (arguments(T=3), packed(PACKINGS["odd"], 5)):
        expected = exact(call)
        buffers = {}
        for name, x in (("y", call["x"]), ("final_state", call["initial_state"])):
            flat = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype, device=DEVICE)
            buffers[name] = flat
        y = buffers["y"][32:-32].view_as(call["x"])
        state = buffers["final_state"][32:-32].view_as(call["initial_state"]).copy_(call["initial_state"])
        torch.ops.kda_hf_cuda.causal_conv1d(
            call["x"], call["weight"], call["bias"], state, call.get("cu_seqlens"), y, state, True
        )
        for buffer in buffers.values():
            assert buffer[:32].isnan().all() and buffer[-32:].isnan().all()
        assert (y.cpu().double() - expected[0]).norm() <= BOUNDS[y.dtype] * expected[0].norm()
        assert torch.equal(state.cpu(), expected[1].to(state.dtype))


@pytest.mark.parametrize("bounds", [[0, 500, 20], [5, 3, 1], [-7, 4, 1000], [0, 0, 0]])
def test_bad_bounds_on_the_gpu(bounds):
    call = packed([60, 40]) | {"cu_seqlens": torch.tensor(bounds, device=DEVICE)}
    y, state = ops.causal_conv1d(**call, output_final_state=True)
    assert y.shape == call["x"].shape and state.shape == call["initial_state"].shape
    torch.cuda.synchronize()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_poison_stays_in_its_sequence_and_in_reach(value):
    call = packed([6, 9, 4])
    clean = ops.causal_conv1d(**call, output_final_state=True)
    call["x"][0, 8:10] = value
    call["initial_state"][:, :, 0] = value  # out of the reach of the first token
    y, _ = ops.causal_conv1d(**call, output_final_state=True)
    assert torch.equal(y[:, :8], clean[0][:, :8]) and torch.equal(y[:, 15:], clean[0][:, 15:])
    assert torch.equal(y[:, 13:15], clean[0][:, 13:15]) and not y[:, 8:13].isfinite().any()


def test_graph_replay_equals_eager_and_runs_are_the_same():
    call = packed(PACKINGS["odd"], 5)
    expected = ops.causal_conv1d(**call, output_final_state=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.causal_conv1d(**call, output_final_state=True)
    for _ in range(3):
        for x in results:
            x.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_what_the_kernel_lacks_another_backend_serves(monkeypatch):
    monkeypatch.setenv("KDA_HF_BACKEND", "auto")
    for call in (arguments(W=5), arguments(D=12), arguments(dtype=torch.float32) | {"x": randn(2, 100, 264).double()}):
        y, _ = ops.causal_conv1d(**call)
        assert y.isfinite().all()
    monkeypatch.setenv("KDA_HF_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="`weight`"):
        ops.causal_conv1d(**arguments(W=5))


@pytest.mark.skipif(fla.VERSION is None or fla.VERSION < (0, 6), reason="needs FLA 0.6")
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("lengths", [None, *PACKINGS.values()], ids=["dense", *PACKINGS])
def test_gradients_by_fla_cuda(monkeypatch, relative_error, lengths, has_bias, activation):
    monkeypatch.delenv("KDA_HF_BACKEND")
    report = ops.backend_report("causal_conv1d", requires_grad=True)
    assert next(row["backend"] for row in report if row["usable"]) == "fla"
    call = arguments(weight=torch.float32) if lengths is None else packed(lengths, spare=7, weight=torch.float32)
    call |= {"initial_state": None, "activation": activation}
    if not has_bias:
        call["bias"] = None
    names = [name for name in ("x", "weight", "bias") if call[name] is not None]
    leaves = {name: call[name].requires_grad_() for name in names}
    doubles = {name: x.detach().cpu().double().requires_grad_() for name, x in leaves.items()}
    others = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in call.items() if name not in leaves}
    grad = randn(*call["x"].shape, dtype=torch.bfloat16)

    y, state = ops.causal_conv1d(**call)
    expected, _ = ops.causal_conv1d(**doubles, **others)
    y.backward(grad)
    expected.backward(grad.cpu().double())
    assert state is None and y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 5e-3
    for name, leaf in leaves.items():
        bound = 1e-2 if name == "x" or activation else 5e-3  # FLA rounds what SiLU gets
        assert relative_error(leaf.grad, doubles[name].grad) < bound, name
    if lengths is not None:
        assert (y[:, -7:] == 0).all() and (leaves["x"].grad[:, -7:] == 0).all()
