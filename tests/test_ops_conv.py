"""The causal convolution against sums written out token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from kda_hf import ops


@pytest.fixture(autouse=True)
def seed():
    seed = torch.seed() % 2**31
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def reference(x, weight, bias=None, activation="silu", initial_state=None, cu_seqlens=None):
    """In float64: y and the last W inputs of each sequence."""
    (B, T, D), W = x.shape, weight.shape[1]
    x, weight = x.double(), weight.double()
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(b, 0, T) for b in range(B)] if bounds is None else [(0, *pair) for pair in zip(bounds, bounds[1:])]  # noqa: B905
    y, final_state = torch.zeros_like(x), x.new_zeros(len(spans), D, W)
    for n, (b, start, end) in enumerate(spans):
        history = x.new_zeros(D, W) if initial_state is None else initial_state[n].double()
        inputs = torch.cat((history.T, x[b, start:end]))
        for t in range(start, end):
            window = inputs[t - start + 1 : t - start + 1 + W]
            total = (window * weight.T).sum(0) + (0 if bias is None else bias.double())
            y[b, t] = F.silu(total) if activation else total
        final_state[n] = inputs[-W:].T
    return y, final_state


def arguments(device, B=2, T=9, D=6, W=4, states=None, dtype=torch.float64):
    shapes = {"x": (B, T, D), "weight": (D, W), "bias": (D,), "initial_state": (states or B, D, W)}
    return {name: torch.randn(shape, dtype=dtype).to(device) for name, shape in shapes.items()}


def assert_close(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    assert bool(((actual.double() - expected).abs() <= tolerance * (1 + expected.abs())).all())


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 65])
@pytest.mark.parametrize("W", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("activation", ["silu", "swish", None])
def test_matches_reference(T, W, activation, device):
    kwargs = arguments(device, T=T, W=W) | {"activation": activation}
    for omitted in ((), ("bias",), ("initial_state",)):
        given = {name: x for name, x in kwargs.items() if name not in omitted}
        y, final_state = ops.causal_conv1d(**given, output_final_state=True)
        expected = reference(**given)
        assert_close(y, expected[0])
        assert_close(final_state, expected[1])
    assert ops.causal_conv1d(**kwargs)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, device):
    kwargs = arguments(device, dtype=dtype)
    kwargs["initial_state"] = kwargs["initial_state"].float()
    y, final_state = ops.causal_conv1d(**kwargs, output_final_state=True)
    assert y.dtype == dtype and final_state.dtype == torch.float32
    assert_close(y, reference(**kwargs)[0], {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype])
    del kwargs["initial_state"]
    assert ops.causal_conv1d(**kwargs, output_final_state=True)[1].dtype == dtype


@pytest.mark.parametrize("bounds", [[0, 5, 5, 6, 9], [0, 0, 0], [0, 0, 1, 2, 2], [0, 30]])
@pytest.mark.parametrize("W", [1, 3, 4])
def test_packed_sequences(bounds, W, device):
    kwargs = arguments(device, B=1, T=bounds[-1] + 2, W=W, states=len(bounds) - 1)
    for dtype in (torch.int32, torch.int64):
        kwargs["cu_seqlens"] = torch.tensor(bounds, dtype=dtype, device=device)
        for given in (kwargs, {name: x for name, x in kwargs.items() if name != "initial_state"}):
            y, final_state = ops.causal_conv1d(**given, output_final_state=True)
            expected = reference(**given)
            assert_close(y, expected[0])
            assert_close(final_state, expected[1])
            assert not y[:, bounds[-1] :].any()


def test_calls_carried_by_the_state_equal_one_call(device):
    kwargs = arguments(device, T=12)
    y, final_state = ops.causal_conv1d(**kwargs, output_final_state=True)
    pieces, state = [], kwargs["initial_state"]
    for piece in kwargs["x"].split([1, 1, 3, 7], 1):
        output, state = ops.causal_conv1d(**kwargs | {"x": piece, "initial_state": state}, output_final_state=True)
        pieces.append(output)
    assert_close(torch.cat(pieces, 1), y)
    assert_close(state, final_state)


def test_nan_stays_in_its_sequence(device):
    kwargs = arguments(device, B=1, T=9, states=3) | {"cu_seqlens": torch.tensor([0, 3, 6, 8], device=device)}
    y, final_state = ops.causal_conv1d(**kwargs, output_final_state=True)
    kwargs["x"][:, 4], kwargs["x"][:, 8] = math.nan, math.nan
    poisoned, poisoned_state = ops.causal_conv1d(**kwargs, output_final_state=True)
    clean = [0, 1, 2, 3, 6, 7, 8]
    assert torch.equal(poisoned[:, clean], y[:, clean]) and torch.equal(poisoned_state[[0, 2]], final_state[[0, 2]])
    assert poisoned[:, 4:6].isnan().all()


@pytest.mark.parametrize("bounds", [None, [0, 2, 2, 7]])
@pytest.mark.parametrize("T", [1, 8])
def test_gradients(bounds, T):
    packed = bounds is not None and T > 1
    kwargs = arguments("cpu", B=1 if packed else 2, T=T, D=2, W=3, states=3 if packed else 2)
    cu_seqlens = torch.tensor(bounds) if packed else None

    def function(*tensors):
        return ops.causal_conv1d(
            **dict(zip(kwargs, tensors, strict=True)), cu_seqlens=cu_seqlens, output_final_state=True
        )

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in kwargs.values()])


@pytest.mark.parametrize("packed", [False, True])
def test_traces(packed, device):
    kwargs = arguments(device, B=1, T=7, states=2 if packed else 1, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 3, 7], device=device) if packed else None
    tensors = [x.requires_grad_() for x in kwargs.values()]
    torch.library.opcheck(torch.ops.kda_hf.causal_conv1d.default, (*tensors, "silu", cu_seqlens, True))
    torch.library.opcheck(torch.ops.kda_hf.causal_conv1d.default, (*tensors, None, cu_seqlens, False))

    def function():
        return ops.causal_conv1d(**kwargs, cu_seqlens=cu_seqlens, output_final_state=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for outputs in (function(), compiled()):
        results.append((*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), tensors)))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(actual, expected)


def test_autocast_leaves_the_operator_alone(device):
    kwargs = arguments(device, dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        under_autocast = ops.causal_conv1d(**kwargs)[0]
    assert torch.equal(under_autocast, ops.causal_conv1d(**kwargs)[0])
