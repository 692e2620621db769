"""The CPU extension: a layer's step against float64 and against PyTorch's, what it refuses, and who uses it."""

import contextlib
import itertools
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_ops_decode_step as layer
import torch
import torch.nn.functional as F

from kda_hf import KDACache, decoding, generation, ops
from kda_hf.ops import backends, cpu, cpu_rows, rows


ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
needs_extension = pytest.mark.skipif(cpu._unavailable is not None, reason=cpu.status())

STATES = ("conv_state", "recurrent_state")
PER_TOKEN = ("q", "k", "v", "g", "beta", "output_gate")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative L2 from PyTorch's step, which rounds at the same places. Numbers of 16 bits may fall to the other side; where
# all of them do, they come to these bounds.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
EXACT_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # from float64
GATES = {
    "mild": {"lower_bound": -5.0, "A_log": -2.0, "g": -3.0},
    "steep": {"lower_bound": -5.0, "A_log": 2.0, "g": 3.0},
    "mild softplus": {"lower_bound": None, "A_log": -2.0, "g": -3.0},
    "steep softplus": {"lower_bound": None, "A_log": 4.0, "g": 30.0},
}


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    seed = torch.seed() % 2**31
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    monkeypatch.delenv("KDA_HF_BACKEND", raising=False)


def arguments(dtype=torch.float32, state=None, gate="mild", **shape):
    """Values of `dtype`, rounded once, in an order of magnitude as a model has them.

    The norm of the output adds 0.1: where queries happen to meet nothing it would make much of little, and of rounding.
    """
    kind = GATES[gate]
    x = layer.arguments("cpu", **shape, lower_bound=kind["lower_bound"])
    x["A_log"] = x["A_log"] + kind["A_log"]
    x["g"] = x["g"] + kind["g"]
    x = {name: y.to(dtype) if isinstance(y, torch.Tensor) else y for name, y in x.items()}
    return x | {"recurrent_state": x["recurrent_state"].to(state or dtype), "norm_eps": 0.1}


def uncancelled(x):
    """
    With queries and keys whose convolutions are sums of one sign, which is the channel's.

    The norm of one or few numbers makes all of a sum that nearly cancels, whose digits are mere rounding.
    """
    weights = {name: x[name].abs().copysign(x[name][:, :1]) for name in ("q_conv_weight", "k_conv_weight")}
    before = x["conv_state"].clone()
    before[:, : 2 * x["q"].shape[2:].numel()].abs_()
    return x | weights | {"q": x["q"].abs(), "k": x["k"].abs(), "conv_state": before}


def step(x, backend="cpu", **others):
    x = x | {name: x[name].clone() for name in STATES} | others
    return ops.kda_decode_step(**x, backend=backend), *(x[name] for name in STATES)


def exact(x):
    return layer.expected({name: y.double() if isinstance(y, torch.Tensor) else y for name, y in x.items()})


def assert_close(relative_error, actual, expected, bounds, slack=1):
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) <= slack * bounds[one.dtype], one.dtype


def check(relative_error, x, slack=1):
    """Against PyTorch's path, and against float64."""
    actual, wanted = step(x), step(x, "torch")
    assert [y.dtype for y in actual] == [y.dtype for y in wanted] and actual[0].is_contiguous()
    least = max(BOUNDS[x[name].dtype] for name in ("q", "v"))  # what has been rounded to 16 bits is in the states, too
    assert_close(relative_error, actual, wanted, {dtype: max(bound, least) for dtype, bound in BOUNDS.items()}, slack)
    least = max(EXACT_BOUNDS[x[name].dtype] for name in ("q", "v", *STATES))
    assert_close(relative_error, actual, exact(x), dict.fromkeys(DTYPES, least), slack)
    if x["conv_state"].dtype == x["q"].dtype:
        assert torch.equal(actual[1], wanted[1])


# --------------------------------------------------------------------------------------------------------------- a step


@needs_extension
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(relative_error, dtype, state, v_first, gate):
    for W, options in itertools.product((2, 3, 4), ({}, {"scale": 0.3, "allow_neg_eigval": True})):
        # Where a state is forgotten at once, an output is q·k times a vector: of so many, none that cancels rules.
        x = arguments(dtype, state, gate, W=W, v_first=v_first, B=8, H=2, HV=4, K=128, V=64)
        check(relative_error, x | options)


@needs_extension
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1), (7, 9), (8, 8), (31, 33), (64, 128), (100, 20), (257, 40)])
@pytest.mark.parametrize("heads", [(1, 1), (2, 6), (3, 3), (1, 4)])
def test_odd_sizes(relative_error, heads, sizes, v_first):
    shape = {"H": heads[0], "HV": heads[1], "K": sizes[0], "V": sizes[1], "v_first": v_first}
    small = min(sizes) < 10
    for dtype in (torch.float32, torch.bfloat16):
        x = arguments(dtype, dtype, B=33 if small else 3, **shape)  # of 33, none that cancels rules the norm
        # One number of a hundred that rounds to the other side is half a percent of the norm.
        check(relative_error, uncancelled(x) if small else x, slack=2)


@needs_extension
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.0])
def test_norm_of_the_output(eps):
    x = arguments(B=4, K=32, V=32) | {"norm_eps": eps}
    x["recurrent_state"] *= 10
    torch.testing.assert_close(step(x)[0], step(x, "torch")[0], rtol=1e-3, atol=1e-3)


@needs_extension
@pytest.mark.parametrize("missing", [("A_log",), ("dt_bias",), ("A_log", "dt_bias")], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_without_parameters_of_the_gate(gate, missing):
    x = arguments(gate=gate) | dict.fromkeys(missing)
    for actual, wanted in zip(step(x), step(x, "torch"), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@needs_extension
def test_shapes_of_the_bias():
    x = arguments()
    matrix = x | {"dt_bias": x["dt_bias"].view(4, -1)}
    assert all(torch.equal(*pair) for pair in zip(step(x), step(matrix), strict=True))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(relative_error, dtype):
    x = arguments(dtype)
    for name, other in itertools.product((name for name, y in x.items() if isinstance(y, torch.Tensor)), DTYPES):
        check(relative_error, x | {name: x[name].to(other)})


@needs_extension
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(relative_error, dtype, integer):
    x = arguments(dtype, torch.float32, B=6, rows=8)
    indices = torch.tensor([5, -1, 0, 8, 7, -(2**31)], dtype=integer)
    actual, wanted = (step(x, backend, state_indices=indices) for backend in ("cpu", "torch"))
    assert_close(relative_error, actual, wanted, dict.fromkeys(DTYPES, BOUNDS[dtype]))
    assert not actual[0][[1, 3, 5]].any() and actual[0][[0, 2, 4]].any(-1).all()
    for after, name in zip(actual[1:], STATES, strict=True):
        assert torch.equal(after[[1, 2, 3, 4, 6]], x[name][[1, 2, 3, 4, 6]])


@needs_extension
@pytest.mark.parametrize("shape", [{"B": 0}, {"HV": 0}, {"B": 2, "rows": 0}], ids=str)
def test_nothing_to_do(shape):
    x = arguments(**shape)
    if "rows" in shape:
        x["state_indices"] = torch.tensor([0, 1])
    assert not step(x)[0].any()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v_first", [False, True])
def test_views_with_something_else_around(v_first, dtype):
    """Nothing is read or written beside the tensors; what lies around them is NaN before and after."""
    x = arguments(dtype, B=3, K=20, V=13, v_first=v_first)
    packed = torch.cat([x[name].flatten(1) for name in PER_TOKEN], -1)
    buffer = torch.full((3, packed.shape[1] + 14), math.nan, dtype=dtype)
    buffer[:, 7:-7] = packed
    views, start = {}, 7
    for name in PER_TOKEN:
        views[name] = buffer[:, start : start + x[name][0].numel()].unflatten(-1, x[name].shape[1:])
        start += x[name][0].numel()

    def surrounded(y):
        around = torch.full((y.numel() + 40,), math.nan, dtype=y.dtype)
        around[20:-20] = y.flatten()
        return around, around[20:-20].view(y.shape)

    others = {name: surrounded(y) for name, y in x.items() if isinstance(y, torch.Tensor) and name not in PER_TOKEN}
    outputs = []
    with pytest.MonkeyPatch.context() as patch:

        def empty_like(y, **_):
            outputs.append(surrounded(torch.full(y.shape, math.nan, dtype=y.dtype)))
            return outputs[-1][1]

        patch.setattr(cpu.torch, "empty_like", empty_like)
        o = ops.kda_decode_step(**x | views | {name: y for name, (_, y) in others.items()}, backend="cpu")
    wanted = step(x)
    assert torch.equal(o, wanted[0]) and outputs[0][1].data_ptr() == o.data_ptr()
    for name, after in zip(STATES, wanted[1:], strict=True):
        assert torch.equal(others[name][1], after)
    for around in [*(around for around, _ in others.values()), *(around for around, _ in outputs)]:
        assert around[:20].isnan().all() and around[-20:].isnan().all()
    assert buffer[:, :7].isnan().all() and buffer[:, -7:].isnan().all()


@needs_extension
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gate", ["mild", "steep softplus"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(dtype, gate, value):
    """In each argument: the results are those of PyTorch, and so is where they are not finite."""
    for v_first in (False, True):
        x = arguments(dtype, gate=gate, v_first=v_first, V=20)
        for name, y in x.items():
            if not isinstance(y, torch.Tensor):
                continue
            poisoned = y.clone()
            poisoned.view(-1)[y.numel() // 2] = value
            for actual, wanted in zip(*(step(x | {name: poisoned}, way) for way in ("cpu", "torch")), strict=True):
                torch.testing.assert_close(
                    actual, wanted, rtol=4 * BOUNDS[dtype], atol=8 * BOUNDS[dtype], equal_nan=True, msg=name
                )


@needs_extension
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e4, 1e15, 1e30])
def test_large_and_small_numbers(size):
    x = arguments(B=4, K=32)
    for name in ("q", "k", "v", "g", "beta", "output_gate", "recurrent_state", "conv_state"):
        scaled = x | {name: x[name] * size}
        for actual, wanted in zip(step(scaled), step(scaled, "torch"), strict=True):
            atol = 1e-5 * float(wanted.abs().nan_to_num(0, 0).max())
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=atol, equal_nan=True, msg=name)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_and_rounded_as_torch_does(dtype):
    """As conv state and inputs they come in, as conv state they go out."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = arguments(dtype, torch.float32, B=64, H=1, HV=1, K=128, V=8)
    places = x["conv_state"].numel()
    x["conv_state"] = numbers.repeat(2)[:places].view(x["conv_state"].shape).clone()
    for actual, wanted in zip(step(x), step(x, "torch"), strict=True):
        assert torch.equal(actual.isnan(), wanted.isnan())
    assert torch.equal(step(x)[1].nan_to_num(7), step(x, "torch")[1].nan_to_num(7))
    between = torch.randn(2**16) * torch.logspace(-9, 5, 2**16)  # and around where float16 begins and ends
    between = torch.cat([between, numbers.float(), numbers.float() * (1 + 2**-9), numbers.float() * (1 + 2**-12)])
    for values in between.split(2**12):
        y = x | {"q": values.repeat(2).view(64, 1, 1, 128)}
        y = {name: z.float() if name != "conv_state" and isinstance(z, torch.Tensor) else z for name, z in y.items()}
        assert torch.equal(step(y)[1].nan_to_num(7), step(y, "torch")[1].nan_to_num(7))


@needs_extension
def test_threads_and_batches_change_no_bit():
    x = arguments(torch.bfloat16, torch.float32, B=24, H=2, HV=4, K=128, V=128)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results += [step(x), step(x)]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))
    alone = step(x | {name: x[name][7:8] for name in (*PER_TOKEN, *STATES)})
    assert all(torch.equal(one[0], all_[7]) for one, all_ in zip(alone, results[0], strict=True))


@needs_extension
@pytest.mark.parametrize("gate", GATES)
def test_500_steps(relative_error, gate):
    x = arguments(gate=gate, B=1, H=1, HV=2, K=32, V=32)
    double = {name: y.double() if isinstance(y, torch.Tensor) else y for name, y in x.items()}
    for _ in range(500):
        for name in PER_TOKEN:
            double[name] = torch.randn_like(double[name])
            x[name] = double[name].float()
            double[name] = x[name].double()
        o, wanted = ops.kda_decode_step(**x, backend="cpu"), ops.kda_decode_step(**double)
    assert relative_error(o, wanted) < 1e-5
    assert relative_error(x["recurrent_state"], double["recurrent_state"]) < 1e-5


@needs_extension
@pytest.mark.slow
def test_step_without_avx2():
    """The version for processors without it, where there is more than one."""
    only = "(test_step or odd_sizes or not_finite or 16_bits or rows) and not avx2"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--import-mode=importlib", __file__, "-k", only]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent)
    if result.returncode != 0:
        pytest.fail(result.stdout, pytrace=False)


# ----------------------------------------------------------------------------------------------- who gets the extension


@needs_extension
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x | {name: x[name].double() for name in STATES}, "bfloat16, float16 or float32"),
        (lambda x: x | {"q": x["q"].double()}, "float64"),
        (lambda x: x | {"v": x["v"].mT.contiguous().mT}, "contiguous rows"),
        (lambda x: x | {"recurrent_state": x["recurrent_state"].mT.contiguous().mT}, "must be contiguous"),
        (lambda x: arguments(W=5), "2 to 4 taps"),
        (lambda x: arguments(W=1), "2 to 4 taps"),
    ],
)
def test_what_it_refuses_goes_to_pytorch(change, reason, monkeypatch):
    x = change(arguments())
    for served in (False, True):  # by a call that is checked first, and by one that is not
        monkeypatch.setattr(cpu, "_has_served", served)
        for actual, wanted in zip(step(x, None), step(x, "torch"), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=f"kda_decode_step: backend='cpu' cannot serve .*{reason}"):
            step(x)


@needs_extension
def test_choice_of_the_backend(monkeypatch, caplog):
    x = arguments()
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(cpu, "_has_served", False)
    with caplog.at_level(logging.INFO, "kda_hf"):
        step(x, None), step(x, None)
    assert [record.getMessage() for record in caplog.records] == [
        "kda_decode_step: backend cuda refused: the tensors are on cpu",
        "kda_decode_step: backend cpu serves the calls",
    ]  # fmt: skip
    report = ops.backend_report("kda_decode_step", device="cpu", dtype=torch.float32)
    assert [row["backend"] for row in report if row["usable"]] == ["cpu", "torch"]
    assert [row["backend"] for row in ops.backend_report("chunk_kda")] == ["cuda", "fla", "torch"]
    reasons = [row["reason"] for row in ops.backend_report("kda_decode_step", device="cuda")]
    assert "the tensors are on cuda" in reasons
    with pytest.raises(RuntimeError, match="the CPU extension has no chunk_kda"):
        ops.chunk_kda(*(x[name] for name in ("q", "k", "v", "g", "beta")), backend="cpu")

    calls = []
    monkeypatch.setattr(cpu, "decode_step", lambda *args: calls.append(args) or "not now")
    step(x, "torch")
    for name in ("torch", "cuda", "fla"):
        monkeypatch.setenv("KDA_HF_BACKEND", name)
        with pytest.raises(RuntimeError) if name == "cuda" else contextlib.nullcontext():
            step(x, None)
        assert len(calls) == (name == "fla")  # which has no such operator
    monkeypatch.setenv("KDA_HF_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="KDA_HF_BACKEND=cpu cannot serve this call on cpu: not now"):
        step(x, None)
    ops.chunk_kda(*(x[name] for name in ("q", "k", "v", "g", "beta")))  # which it does not speak for


def test_without_the_extension(monkeypatch, caplog):
    x = arguments()
    wanted = step(x, "torch")
    monkeypatch.setattr(cpu, "_unavailable", "the CPU extension is not built")
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level(logging.INFO, "kda_hf"):
        assert all(torch.equal(*pair) for pair in zip(step(x, None), wanted, strict=True))
    assert "kda_decode_step: backend cpu refused: the CPU extension is not built" in caplog.text
    with pytest.raises(RuntimeError, match="not built"):
        step(x)


def test_a_file_that_is_missing_or_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "EXTENSION", tmp_path / "_cpu.abi3.so")
    assert "not built" in cpu._load()
    cpu.EXTENSION.write_bytes(b"not a library")
    assert "does not load" in cpu._load()


@needs_extension
@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("name", [*PER_TOKEN, *STATES, "q_conv_weight", "norm_weight", "A_log", "dt_bias"])
def test_errors_come_before_anything_is_written(name, served, monkeypatch):
    x = arguments()
    before = {state: x[state].clone() for state in STATES}
    monkeypatch.setattr(cpu, "_has_served", served)
    for wrong, error in ((x[name][..., :-1], ValueError), (x[name].int(), ValueError), ("a string", TypeError)):
        with pytest.raises(error, match="`"):  # names an argument: this, or one that does not go with it
            ops.kda_decode_step(**x | {name: wrong})
    with pytest.raises(ValueError, match="no gradients"):
        ops.kda_decode_step(**x | {name: x[name].clone().requires_grad_()})
    assert all(torch.equal(x[state], before[state]) for state in STATES)


# ------------------------------------------------------------------------------------------------ layers of the program


def within(*shape, dtype):
    """A matrix that is part of a wider one, with NaN around it."""
    whole = torch.full((*shape[:-1], shape[-1] + 20), math.nan, dtype=dtype)
    whole[..., 10:-10] = torch.randn(shape)
    return whole[..., 10:-10]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 256), (3, 7), (5, 33), (40, 1), (2, 3, 128), (0, 8)], ids=str)
def test_norms_of_rows(dtype, shape):
    x, weight = within(*shape, dtype=dtype), torch.randn(shape[-1])
    for own in (weight, weight.to(dtype)):
        wanted = F.rms_norm(x.float(), shape[-1:], own.float(), 1e-6).to(dtype)
        bound = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(cpu.rms_norm(x, own, 1e-6), wanted, rtol=bound, atol=bound)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 256, 672), (3, 20, 13), (4, 8, 1), (40, 64, 200)], ids=str)
def test_mlp_of_rows(dtype, sizes):
    M, D, N = sizes
    x, norm = within(M, D, dtype=dtype), (torch.randn(D, dtype=dtype), 1e-6)
    both, down = torch.randn(2 * N, D).to(dtype), (torch.randn(D, N) / N**0.5).to(dtype)
    plain = rows.TorchRows()
    wanted = plain.product(plain.swiglu(x, both, norm), down, residual=x)
    actual = cpu_rows.MLP(norm, both, down)(x)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, wanted, rtol=bound, atol=bound * float(wanted.abs().max()))
    assert cpu_rows.MLP(norm, both.double(), down)(x) is None  # refused
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_rows.MLP(norm, both, down)(x) is None


def attention_arguments(B, heads, length, D, dtype=torch.float32, hidden=24):
    """x, q, keys and values with NaN around their rows, and the weight of the output."""
    x = within(B, hidden, dtype=dtype)
    q, keys, values = (
        within(B, count, rows, D, dtype=dtype)
        for count, rows in ((heads[0], 1), (heads[1], length), (heads[1], length))
    )
    return x, q, keys, values, (torch.randn(heads[0] * D, hidden) / (heads[0] * D) ** 0.5).to(dtype)


def by_sdpa(x, q, keys, values, scale, weight, dtype=torch.float64):
    """With the roundings of the layer, as x is."""
    o = F.scaled_dot_product_attention(*(y.to(dtype) for y in (q, keys, values)), scale=scale, enable_gqa=True)
    return x + (o.flatten(1).to(x.dtype).to(dtype) @ weight.to(dtype)).to(x.dtype)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, 4095, 4097, 9000])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1)])
def test_attention(relative_error, heads, length, dtype):
    for B, D in ((1, 128), (2, 20), (3, 1)):
        x, q, keys, values, weight = attention_arguments(B, heads, length, D, dtype)
        for scale in (D**-0.5, 3.0):
            actual = cpu.attention_output(x, q, keys, values, scale, weight)
            wanted = by_sdpa(x, q, keys, values, scale, weight)
            assert relative_error(actual, wanted) < max(1e-5, 2 * torch.finfo(dtype).eps)


@needs_extension
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_attention_to_what_is_not_finite(value):
    for length, name in itertools.product((1, 70, 500), ("q", "keys", "values")):
        x, *inputs, weight = attention_arguments(2, (4, 2), length, 16)
        names = dict(zip(("q", "keys", "values"), inputs, strict=True))
        names[name][1, 1, -1, 3] = value
        actual = cpu.attention_output(x, *names.values(), 0.3, weight)
        # In fp32, in plain formulas: float64 has room for more.
        q, keys, values = (y.repeat_interleave(4 // y.shape[1], 1) for y in names.values())
        o = torch.softmax(0.3 * (q @ keys.mT), -1) @ values
        wanted = x + o.flatten(1) @ weight
        # Beside the largest number of its row: huge terms may cancel out.
        size = wanted.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True).clamp_min(1)
        torch.testing.assert_close(actual / size, wanted / size, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
    keys.fill_(-math.inf)
    q.fill_(1)
    assert cpu.attention_output(x, q, keys, values, 0.3, weight).isnan().all()


@needs_extension
def test_attention_of_low_scores():
    """Whole spans of keys that count for nothing, whatever their scores are."""
    x, q, keys, values, weight = attention_arguments(1, (1, 1), 5000, 8)
    q.fill_(1)
    for low, high in ((-1e3, -9e2), (-1e30, 0.0), (-math.inf, -5e2)):
        keys.fill_(low)
        keys[:, :, 1234] = high
        torch.testing.assert_close(
            cpu.attention_output(x, q, keys, values, 0.3, weight), x + values[0, :, 1234] @ weight, rtol=1e-5, atol=1e-5
        )


@needs_extension
def test_threads_and_batches_change_no_bit_of_attention():
    x, q, keys, values, _ = attention_arguments(3, (4, 2), 6000, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            # The product is torch's, and may go by the number of rows and threads.
            results.append(cpu.attention_output(x, q, keys, values, 0.1, torch.eye(256, 24)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_inputs_of_attention(dtype, normed):
    B, D, heads, key_heads, width = 3, 40, 4, 2, 20
    x, norm = within(B, D, dtype=dtype), (torch.randn(D, dtype=dtype), 1e-6)
    weight = torch.randn(heads * width + 2 * key_heads * width + 8, D).to(dtype)
    norms = (torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype), 1e-5) if normed else None
    layer = cpu_rows.Attention(norm, weight, weight, heads, key_heads, width, norms, 1.0)
    plain = rows.TorchRows()
    y = plain.product(x, weight, norm)[:, :-8].view(B, -1, width)
    wanted = list(y.split([heads, key_heads, key_heads], 1))
    if norms is not None:
        wanted[:2] = [plain.norm(z, (w, 1e-5)) for z, w in zip(wanted[:2], norms[:2], strict=True)]
    bound = 4 * torch.finfo(dtype).eps
    for actual, own in zip(layer.inputs(x), wanted, strict=True):
        torch.testing.assert_close(actual.squeeze(2), own, rtol=bound, atol=bound * float(own.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.inputs(x) is None
    assert layer.inputs(x.double()) is None


@needs_extension
def test_what_does_not_go_together_is_refused():
    x, q, keys, values, weight = attention_arguments(2, (4, 2), 70, 16)
    for wrong in (
        (x[:1], q, keys, values, 0.1, weight),
        (x, q[:, :3], keys, values, 0.1, weight),
        (x, q, keys[:, :, :50], values, 0.1, weight),
        (x, q, keys, values[..., :8], 0.1, weight),
        (x, q, keys[:, :, :0], values[:, :, :0], 0.1, weight),
        (x, q, keys, values, 0.1, weight[:-1]),
        (x, q, keys, values, 0.1, weight[:, :-1]),
        (x, q.double(), keys, values, 0.1, weight),
        (x, q, keys.mT.contiguous().mT, values, 0.1, weight),
    ):
        assert isinstance(cpu.attention_output(*wrong), str)


@pytest.fixture
def calls(monkeypatch):
    """The names of the extension's operators that have been called."""
    names = []

    def counting(name, operator):
        return lambda *args: names.append(name) or operator(*args)

    for name, operator in cpu._operators.items():
        monkeypatch.setitem(cpu._operators, name, counting(name, operator))
    return names


def decoded(model, ids, modules=False, **others):
    way = contextlib.nullcontext if modules else decoding.decode_program
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(generation, "decode_program", way)
        output = model.generate(
            ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True, **others
        )
    return output.sequences, torch.stack(output.logits)


@needs_extension
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_program_uses_it(any_model, dtype, batch, calls, monkeypatch):
    model = any_model.cpu().to(dtype)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 97, (batch, 9))
    config = model.config
    kda, count = config.layer_types.count("linear_attention"), len(config.layer_types)
    actual = decoded(model, ids)
    parts = kda if config.linear_output_gate_bias else 0  # the call for a whole layer has no bias
    assert calls.count("kda_layer") == 11 * (kda - parts) and calls.count("decode_step") == 11 * parts
    assert calls.count("mlp") == 11 * count
    assert calls.count("attention_inputs") == calls.count("attention_output") == 11 * (count - kda)
    calls.clear()
    wanted = decoded(model, ids, modules=True)
    assert calls == ["decode_step"] * 11 * kda
    calls.clear()
    monkeypatch.setenv("KDA_HF_BACKEND", "torch")
    plain = decoded(model, ids)
    assert not calls
    if dtype == torch.float32:
        assert torch.equal(actual[0], wanted[0]) and torch.equal(actual[0], plain[0])
        for other in (wanted, plain):
            torch.testing.assert_close(actual[1], other[1], rtol=1e-4, atol=1e-4)
    else:
        bound = 30 * torch.finfo(dtype).eps * float(wanted[1][0].float().abs().max())
        for other in (wanted, plain):  # of the first step: then tokens may differ
            torch.testing.assert_close(actual[1][1], other[1][1], rtol=bound, atol=bound) if torch.equal(
                actual[0][:, : ids.shape[1] + 1], other[0][:, : ids.shape[1] + 1]
            ) else None


@needs_extension
def test_a_cache_with_a_history_has_steps_only(tiny_model, calls):
    model = tiny_model().cpu()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 97, (2, 9))
    results = [decoded(model, ids, past_key_values=KDACache(model.config, max_rollback=n)) for n in (0, 4)]
    assert calls.count("kda_layer") == calls.count("decode_step") == 11 * 3
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[1].linear_attn.A_log.data.copy_(torch.ones(2)),
        lambda model: model.model.layers[1].linear_attn.o_proj.weight.data.mul_(2),
        lambda model: model.model.layers[1].mlp.down_proj.weight.data.mul_(2),
        lambda model: setattr(model.model.layers[1].mlp.up_proj, "weight", torch.nn.Parameter(torch.randn(48, 32))),
        lambda model: model.double().float(),
    ],
)
def test_weights_may_change(tiny_model, change, calls):
    model = tiny_model().cpu()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 97, (2, 9))
    decoded(model, ids)
    change(model)
    calls.clear()
    actual = decoded(model, ids)
    assert "kda_layer" in calls
    wanted = decoded(model, ids, modules=True)
    assert torch.equal(actual[0], wanted[0])
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-4, atol=1e-4)


@needs_extension
def test_autocast_has_its_way(tiny_model, calls):
    model = tiny_model().cpu()
    ids = torch.randint(3, 97, (1, 9))
    cache = KDACache(model.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids, past_key_values=cache)
        with decoding.decode_program(model):
            model(ids[:, :1], past_key_values=cache)
    assert "kda_layer" not in calls and "mlp" not in calls and calls.count("decode_step") == 3


@needs_extension
def test_models_in_float64_have_pytorch(tiny_model, calls):
    model = tiny_model().cpu().double()
    decoded(model, torch.randint(3, 97, (1, 9)))
    assert not calls


@needs_extension
def test_padding(tiny_model):
    """Tokens on the left are none for some rows: attention must not see them."""
    model = tiny_model().cpu()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(3, 97, (3, 9))
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [2]])).long()
    sequences, logits = decoded(model, ids, attention_mask=mask)
    for row, start in enumerate((0, 4, 2)):
        alone = decoded(model, ids[row : row + 1, start:])
        assert torch.equal(sequences[row, 9:], alone[0][0, 9 - start :])
        torch.testing.assert_close(logits[:, row], alone[1][:, 0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- building


@needs_compiler
def test_it_is_there():
    """Where there is a compiler, installing has built it, and it loads."""
    assert cpu.status() == "the CPU extension is loaded"


@needs_compiler
@pytest.mark.slow
def test_it_builds_and_need_not(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/cpu", "third_party", "kda_hf/__init__.py"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)

    def build(compiler):
        environment = {name: value for name, value in os.environ.items() if name != "CUDACXX"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment |= {"CUDA_HOME": str(tmp_path), "CXX": compiler}
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=600)

    library = tmp_path / "kda_hf" / "_cpu.abi3.so"
    for compiler, reason in (("false", "false does not compile it"), ("nowhere", "no C++ compiler is found: nowhere")):
        result = build(compiler)
        assert result.returncode == 0 and not library.exists(), result.stderr
        assert f"the CPU extension is NOT built, and decoding on a CPU is slower without it: {reason}" in result.stderr
    result = build(COMPILER)
    assert result.returncode == 0 and library.exists(), result.stderr
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); "
        "print(torch.ops.kda_hf_cpu.rms_norm(torch.full((2, 3), 2.0), torch.ones(3), 0.0).tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str([[1.0] * 3] * 2), result.stderr
