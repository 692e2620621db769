"""The KDA operators against the token recurrence in float64."""

import math
import os

import pytest
import torch

from kda_hf import ops
from kda_hf.ops.reference import kda_reference


OPERATORS = {"chunk": ops.chunk_kda, "recurrent": ops.recurrent_kda}
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 1000]
# Lower bound (None: softplus) and, in standard deviations and mean, the gate's logits.
GATES = {
    "safe steep": (-5.0, 3.0, 0.0),
    "safe mild": (-5.0, 1.0, -6.5),
    "softplus mild": (None, 1.0, -6.5),
    "softplus bimodal": (None, 100.0, 0.0),  # decays of e^-100 a token beside decays of 1
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
FLAGS = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


@pytest.fixture(autouse=True)
def seed():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def arguments(device, B=1, T=64, H=1, HV=2, K=16, V=8, gate="safe steep", states=None, dtype=torch.float64):
    """Random arguments of `chunk_kda`, rounded to `dtype`: raw logits, and one initial state for each sequence."""
    lower_bound, deviation, mean = GATES[gate]
    tensors = {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, HV, V),
        "g": torch.randn(B, T, HV, K) * deviation + mean,
        "beta": torch.randn(B, T, HV),
        "initial_state": torch.randn(states or B, HV, K, V),
        "A_log": torch.randn(HV) * 0.3,
        "dt_bias": torch.randn(HV, K),
    }
    exact = ("initial_state", "A_log", "dt_bias")
    rounded = {name: x.to(torch.float64 if name in exact else dtype).double().to(device) for name, x in tensors.items()}
    return {**rounded, "lower_bound": lower_bound, **FLAGS}


def cast(kwargs, dtype):
    """q, k, v, g and β in `dtype`, parameters and states in fp32 or float64."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    of = dict.fromkeys("qkvg", dtype) | {"beta": dtype}
    return {n: x.to(of.get(n, parameters)) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for n, x in kwargs.items()}  # fmt: skip


def reference(kwargs):
    names = {"use_gate_in_kernel": "use_gate", "use_qk_l2norm_in_kernel": "use_qk_norm",
             "use_beta_sigmoid_in_kernel": "use_beta_sigmoid"}  # fmt: skip
    return kda_reference(**{names.get(name, name): x for name, x in kwargs.items()})


def assert_close(actual, expected, dtype=None):
    """Relative to the largest expected entry; NaN is never close."""
    assert actual.shape == expected.shape
    bound = TOLERANCE[dtype or actual.dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"error {error.max().item():.2e} exceeds {bound:.2e}"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", LENGTHS)
def test_matches_reference(operator, gate, T, device):
    kwargs = arguments(device, T=T, gate=gate)
    o, state, _ = reference(kwargs)
    for dtype in (torch.float64, torch.float32):
        actual = OPERATORS[operator](**cast(kwargs, dtype), output_final_state=True)
        assert actual[0].dtype == actual[1].dtype == dtype
        assert_close(actual[0], o)
        assert_close(actual[1], state)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "shape", [(3, 70, 2, 2, 16, 16), (2, 40, 2, 6, 5, 3), (1, 100, 1, 3, 7, 33), (2, 80, 1, 1, 128, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(operator, shape, dtype, device):
    B, T, H, HV, K, V = shape
    kwargs = arguments(device, B, T, H, HV, K, V, dtype=dtype)
    o, state, _ = reference(kwargs)
    actual = OPERATORS[operator](**cast(kwargs, dtype), output_final_state=True, backend="torch")
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert_close(actual[0], o)
    assert_close(actual[1], state, torch.float32)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("flags", [{}, *({name: True} for name in FLAGS), {**FLAGS, "allow_neg_eigval": True}])
def test_each_activation(operator, flags, device):
    kwargs = {name: x for name, x in arguments(device, T=50).items() if name not in FLAGS} | flags
    if "use_gate_in_kernel" not in flags:
        kwargs["g"] = -kwargs["g"].abs()
    if "use_beta_sigmoid_in_kernel" not in flags:
        kwargs["beta"] = kwargs["beta"].sigmoid()
    if "use_qk_l2norm_in_kernel" not in flags:
        kwargs["q"], kwargs["k"] = (torch.nn.functional.normalize(kwargs[name], dim=-1) for name in "qk")
    o, state, _ = reference(kwargs)
    actual = OPERATORS[operator](**kwargs, output_final_state=True)
    assert_close(actual[0], o)
    assert_close(actual[1], state)


@pytest.mark.parametrize("operator", OPERATORS)
def test_optional_arguments(operator, device):
    kwargs = arguments(device, T=20)
    for name in ("initial_state", "A_log", "dt_bias"):
        del kwargs[name]
    o, state, _ = reference(kwargs | {"scale": 0.7})
    actual = OPERATORS[operator](**kwargs, scale=0.7)
    assert actual[1] is None
    assert_close(actual[0], o)
    flat = arguments(device, T=20)
    expected = reference(flat)[0]
    assert_close(OPERATORS[operator](**flat | {"dt_bias": flat["dt_bias"].flatten()})[0], expected)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("g", [-math.inf, -1e4, 0.0])
def test_extreme_decays(operator, g, device):
    """A decay of exactly 0 or 1 in some places, with its gradients."""
    kwargs = arguments(device, T=70) | {"use_gate_in_kernel": False}
    kwargs["g"] = torch.where(torch.rand_like(kwargs["g"]) < 0.3, g, -kwargs["g"].abs() * 1e-3)
    o, state, _ = reference(kwargs)
    leaf = cast(kwargs, torch.float32)
    leaf["g"].requires_grad_()
    actual = OPERATORS[operator](**leaf, output_final_state=True)
    assert_close(actual[0].detach(), o)
    assert_close(actual[1].detach(), state)
    actual[0].sum().backward()
    assert leaf["g"].grad.isfinite().all()


PACKED = [[0, 5, 5, 70, 71, 71, 199], [0, 0, 64], [0, 128, 130], [0, 0, 0], [0, 63]]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("bounds", PACKED)
@pytest.mark.parametrize("state_v_first", [False, True])
def test_packed_sequences(operator, bounds, state_v_first, device):
    """With empty sequences, and tokens past the last one: these give zeros and touch no state."""
    kwargs = arguments(device, T=bounds[-1] + 3, states=len(bounds) - 1)
    if state_v_first:
        kwargs["initial_state"] = kwargs["initial_state"].mT.contiguous()
    for index_dtype in (torch.int32, torch.int64):
        kwargs |= {"cu_seqlens": torch.tensor(bounds, dtype=index_dtype, device=device), "state_v_first": state_v_first}
        o, state, _ = reference(kwargs)
        actual = OPERATORS[operator](**kwargs, output_final_state=True)
        assert_close(actual[0], o)
        assert_close(actual[1], state)
        assert not actual[0][:, bounds[-1] :].any()
        for n in range(len(bounds) - 1):
            if bounds[n] == bounds[n + 1]:
                assert torch.equal(actual[1][n], kwargs["initial_state"][n])


@pytest.mark.parametrize("operator", OPERATORS)
def test_state_layouts(operator, device):
    kwargs = arguments(device, B=2, T=30)
    o, state = OPERATORS[operator](**kwargs, output_final_state=True)
    kwargs["initial_state"] = kwargs["initial_state"].mT.contiguous()
    for name in ("state_v_first", "transpose_state_layout"):
        actual = OPERATORS[operator](**kwargs, output_final_state=True, **{name: True})
        assert_close(actual[0], o)
        assert_close(actual[1], state.mT)
        assert actual[1].is_contiguous()


@pytest.mark.parametrize("operator", OPERATORS)
def test_strided_inputs(operator, device):
    kwargs = arguments(device, B=2, T=30, H=2, HV=2, K=8, V=8)
    expected = reference(kwargs)
    fused = torch.cat([kwargs[name] for name in "qkvg"], -1)
    kwargs |= dict(zip("qkvg", fused.split(8, -1), strict=True))
    kwargs["initial_state"] = kwargs["initial_state"].mT.contiguous().mT
    actual = OPERATORS[operator](**kwargs, output_final_state=True)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dtype_follows_the_initial_state(state_dtype, device):
    kwargs = cast(arguments(device, T=5), torch.bfloat16)
    kwargs["initial_state"] = kwargs["initial_state"].to(state_dtype)
    for operator in OPERATORS.values():
        assert operator(**kwargs, output_final_state=True)[1].dtype == state_dtype


@pytest.mark.parametrize("cuts", [[1], [64], [17, 64, 130], [1, 2, 3, 66]])
def test_calls_carried_by_the_state_equal_one_call(cuts, device):
    kwargs = arguments(device, T=200)
    o, state = ops.chunk_kda(**kwargs, output_final_state=True)
    outputs, carried = [], kwargs["initial_state"]
    for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, 200], strict=True)):
        piece = {name: kwargs[name][:, start:end] for name in ("q", "k", "v", "g", "beta")}
        operator = ops.recurrent_kda if i % 2 else ops.chunk_kda
        output, carried = operator(**kwargs | piece | {"initial_state": carried}, output_final_state=True)
        outputs.append(output)
    assert_close(torch.cat(outputs, 1), o)
    assert_close(carried, state)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 200])
def test_intermediate_states(operator, T, device):
    kwargs = arguments(device, B=2, T=T)
    expected = reference(kwargs)[2]
    assert expected.shape[1] == math.ceil(T / 64)
    o, state, h = OPERATORS[operator](**kwargs, return_intermediate_states=True)
    assert state is None
    assert_close(h, expected)


def test_intermediate_states_of_packed_sequences(device):
    bounds = torch.tensor([0, 5, 5, 70, 71, 71, 199])
    kwargs = arguments(device, T=200, states=6) | {"cu_seqlens": bounds.to(device)}
    expected = reference(kwargs)[2]
    h = ops.chunk_kda(**kwargs, cu_seqlens_cpu=bounds, return_intermediate_states=True)[2]
    assert_close(h, expected)


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("indices", [[4, -1, 0], [-1, -1, -1], [2, 0, -1], [1, 3, 2]])
def test_state_pool(indices, state_v_first, device):
    """A skipped row changes nothing, whatever its inputs hold."""
    kwargs = arguments(device, B=3, T=2, states=5)
    pool = kwargs["initial_state"] = (
        kwargs["initial_state"].mT.contiguous() if state_v_first else kwargs["initial_state"]
    )
    kwargs["state_v_first"] = state_v_first
    before = pool.clone()
    used = [n for n, index in enumerate(indices) if index >= 0]
    gathered = {name: kwargs[name][used] for name in ("q", "k", "v", "g", "beta")}
    gathered["initial_state"] = before[[indices[n] for n in used]]
    o, state, _ = reference(kwargs | gathered)
    for name in ("q", "v", "g"):
        kwargs[name][[n for n in range(3) if n not in used]] = math.nan
    for index_dtype in (torch.int32, torch.int64):
        pool.copy_(before)
        state_indices = torch.tensor(indices, dtype=index_dtype, device=device)
        actual, returned = ops.recurrent_kda(**kwargs, state_indices=state_indices, output_final_state=True)
        assert returned is pool
        assert_close(actual[used], o)
        assert not actual[[n for n in range(3) if n not in used]].any()
        assert_close(pool[[indices[n] for n in used]], state)
        untouched = [row for row in range(5) if row not in indices]
        assert torch.equal(pool[untouched], before[untouched])


def test_state_pool_of_packed_sequences(device):
    bounds = torch.tensor([0, 1, 3, 3, 4], device=device)
    kwargs = arguments(device, T=5, states=6)
    pool = kwargs["initial_state"]
    before = pool.clone()
    o, state, _ = reference(kwargs | {"cu_seqlens": bounds, "initial_state": before[[5, 0, 2, 1]]})
    indices = torch.tensor([5, -1, 2, 1], device=device)
    actual, _ = ops.recurrent_kda(**kwargs, cu_seqlens=bounds, state_indices=indices)
    o[:, 1:3] = 0
    assert_close(actual, o)
    assert_close(pool[[5, 2, 1]], state[[0, 2, 3]])
    assert torch.equal(pool[[0, 3, 4]], before[[0, 3, 4]])


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("lengths", [None, [2, 0, 3]], ids=["dense", "packed"])
def test_states_after_every_token(lengths, state_v_first, pool, device):
    spans = [(b, 0, 4) for b in range(3)]
    kwargs = arguments(device, B=3, T=4, states=3) if lengths is None else arguments(device, T=6, states=3)
    if lengths is not None:
        kwargs["cu_seqlens"] = torch.tensor([0, 2, 2, 5], device=device)
        spans = [(0, 0, 2), (0, 2, 2), (0, 2, 5)]
    if state_v_first:
        kwargs |= {"state_v_first": True, "initial_state": kwargs["initial_state"].mT.contiguous()}
    before, skipped = kwargs["initial_state"].clone(), []
    others = {"return_token_states": True, "output_final_state": True}
    if pool:
        others["state_indices"], skipped = torch.tensor([2, -1, 0], device=device), [1]
        kwargs["initial_state"] = before[[2, 1, 0]].contiguous()
    o, state, states = ops.recurrent_kda(**kwargs, **others)
    assert states.shape == (*kwargs["q"].shape[:2], *state.shape[1:]) and states.dtype == state.dtype
    for n, (b, start, end) in enumerate(spans):
        for t in range(start, end) if n not in skipped else ():
            prefix = {name: kwargs[name][b : b + 1, start : t + 1] for name in ("q", "k", "v", "g", "beta")}
            prefix |= {"cu_seqlens": None, "initial_state": before[n : n + 1], "output_final_state": True}
            expected_o, expected = ops.chunk_kda(**kwargs | prefix)
            assert_close(o[b, t], expected_o[0, -1])
            assert_close(states[b, t], expected[0])
        if n in skipped:
            assert not o[b, start:end].any()
    if lengths is not None:
        assert not o[:, 5:].any()
    if not pool:
        expected = ops.recurrent_kda(**kwargs, output_final_state=True)
        assert_close(o, expected[0])
        assert_close(state, expected[1])


def test_states_after_every_token_are_rounded_once(device):
    kwargs = arguments(device, B=2, T=5)
    rounded = cast(kwargs, torch.float32) | {"initial_state": kwargs["initial_state"].bfloat16()}
    exact = ops.recurrent_kda(**kwargs | {"initial_state": rounded["initial_state"].double()}, return_token_states=True)
    actual = ops.recurrent_kda(**rounded, return_token_states=True)
    assert actual[1] is None and actual[2].dtype == torch.bfloat16
    assert ((actual[2].double() - exact[2]).norm() / exact[2].norm()) < 2.5e-3


def test_states_after_every_token_of_none(device):
    for kwargs in (arguments(device, B=2, T=0), arguments(device, B=0, T=3, states=0)):
        o, state, states = ops.recurrent_kda(**kwargs, return_token_states=True, output_final_state=True)
        assert states.shape == (*kwargs["q"].shape[:2], *kwargs["initial_state"].shape[1:])
        assert torch.equal(state, kwargs["initial_state"]) and o.shape == kwargs["v"].shape


def test_states_after_every_token_have_no_gradients(device):
    kwargs = arguments(device)
    kwargs["v"].requires_grad_()
    with pytest.raises(ValueError, match="`return_token_states` has no gradients"):
        ops.recurrent_kda(**kwargs, return_token_states=True)
    with torch.no_grad():
        assert len(ops.recurrent_kda(**kwargs, return_token_states=True)) == 3
    with pytest.raises(ValueError, match="`return_token_states` and `return_intermediate_states`"):
        ops.recurrent_kda(**kwargs, return_token_states=True, return_intermediate_states=True)


def weighted(outputs):
    """A scalar that depends on every entry of the outputs differently."""
    return sum(
        (x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).cos().view_as(x)).sum() for x in outputs
    )


def gradients(function, kwargs):
    leaves = {
        n: x.clone().requires_grad_()
        for n, x in kwargs.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    outputs = function(**kwargs | leaves)
    return dict(zip(leaves, torch.autograd.grad(weighted(outputs[:2]), list(leaves.values())), strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("gate", GATES)
def test_gradients(operator, gate, device):
    kwargs = arguments(device, B=2, T=70, H=1, HV=2, gate=gate) | {"allow_neg_eigval": True}
    expected = gradients(lambda **kw: reference(kw), kwargs)
    function = lambda **kw: OPERATORS[operator](**kw, output_final_state=True)  # noqa: E731
    for dtype in (torch.float64, torch.float32):
        actual = gradients(function, cast(kwargs, dtype))
        for name, gradient in expected.items():
            assert actual[name].dtype == dtype
            bound = {torch.float64: 1e-10, torch.float32: 2e-4}[dtype] * max(1.0, gradient.abs().max().item())
            assert (actual[name] - gradient).abs().max() <= bound, name


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_packed_sequences(operator, device):
    bounds = torch.tensor([0, 3, 3, 70, 71], device=device)
    kwargs = arguments(device, T=73, states=4) | {"cu_seqlens": bounds, "state_v_first": True}
    kwargs["initial_state"] = kwargs["initial_state"].mT.contiguous()
    expected = gradients(lambda **kw: reference(kw), kwargs)
    actual = gradients(lambda **kw: OPERATORS[operator](**kw, output_final_state=True), kwargs)
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


def test_gradcheck():
    kwargs = arguments("cpu", T=3, K=2, V=2)
    names = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")

    def function(*tensors):
        o, state, h = ops.chunk_kda(
            **kwargs | dict(zip(names, tensors, strict=True)), output_final_state=True, return_intermediate_states=True
        )
        return o, state, h

    assert torch.autograd.gradcheck(function, [kwargs[name].requires_grad_() for name in names])


def test_gradient_of_one_input_only(device):
    kwargs = arguments(device, T=5)
    kwargs["dt_bias"].requires_grad_()
    ops.chunk_kda(**kwargs)[0].sum().backward()
    assert kwargs["dt_bias"].grad.any() and kwargs["q"].grad is None


def raw_arguments(kwargs, state_v_first=False, cu_seqlens=None):
    """Arguments of the custom ops, as the public operators hand them over."""
    tensors = [kwargs[name] for name in ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")]
    return [*tensors, cu_seqlens, state_v_first, 0.25, kwargs["lower_bound"], True, True, True, False]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [0, 1, 70])
def test_opcheck(packed, T, device):
    kwargs = cast(arguments(device, B=1 if packed else 2, T=T, states=3 if packed else 2), torch.float32)
    bounds = torch.tensor([0, 0, T, T], device=device) if packed else None
    state_indices = torch.arange(3 if packed else 2, device=device)
    common = raw_arguments(kwargs, cu_seqlens=bounds)
    for output_states in (False, True):
        torch.library.opcheck(torch.ops.kda_hf.recurrent_kda_pool.default, (*common, state_indices, output_states))
        torch.library.opcheck(torch.ops.kda_hf.recurrent_kda.default, (*common, True, output_states))
    out, final_state = torch.empty_like(kwargs["v"]), kwargs["initial_state"].mT.contiguous()
    inputs = [kwargs[name] for name in ("q", "k", "v", "g", "beta")]
    torch.library.opcheck(
        torch.ops.kda_hf.fwd.default,
        (*inputs, 0.25, out, kwargs["A_log"], kwargs["dt_bias"], -5.0, final_state.clone(), final_state, bounds),
    )
    for x in kwargs.values():
        if isinstance(x, torch.Tensor):
            x.requires_grad_()
    for state_v_first in (False, True):
        if state_v_first:
            kwargs["initial_state"] = kwargs["initial_state"].detach().mT.contiguous().requires_grad_()
        common = raw_arguments(kwargs, state_v_first, bounds)
        torch.library.opcheck(torch.ops.kda_hf.chunk_kda.default, (*common, True, state_v_first))
        torch.library.opcheck(torch.ops.kda_hf.recurrent_kda.default, (*common, not state_v_first, False))
    o, state, states = torch.ops.kda_hf.chunk_kda(*common, True, True)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in common]
    torch.library.opcheck(
        torch.ops.kda_hf.kda_backward.default,
        (*detached, o.detach(), state.detach(), states.detach(), [True, False] * 4),
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_breaks(operator, packed, device):
    kwargs = cast(arguments(device, T=70, states=2 if packed else 1), torch.float32)
    if packed:
        kwargs["cu_seqlens"] = torch.tensor([0, 30, 70], device=device)
    function = lambda **kw: OPERATORS[operator](**kw, output_final_state=True)  # noqa: E731
    torch.compiler.reset()  # all cases compile this one lambda, and there is a limit to how often
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for actual, expected in zip(compiled(**kwargs), function(**kwargs), strict=True):
        assert torch.equal(actual, expected)
    for name, gradient in gradients(function, kwargs).items():
        assert torch.equal(gradients(compiled, kwargs)[name], gradient), name


def test_in_place_operators_compile(device):
    kwargs = cast(arguments(device, B=2, T=1, states=4), torch.float32)
    indices = torch.tensor([3, -1], device=device)

    def decode(pool):
        return ops.recurrent_kda(**kwargs | {"initial_state": pool}, state_indices=indices)[0]

    eager, compiled = kwargs["initial_state"].clone(), kwargs["initial_state"].clone()
    expected = decode(eager)
    assert torch.equal(torch.compile(decode, fullgraph=True, backend="aot_eager")(compiled), expected)
    assert torch.equal(compiled, eager)

    call = {name: kwargs[name] for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")}

    def forward(out, final_state):
        ops.fwd(**call, scale=0.3, out=out, initial_state=final_state, final_state=final_state)

    results = []
    for function in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        out, state = torch.empty_like(kwargs["v"]), kwargs["initial_state"][:2].mT.contiguous()
        function(out, state)
        results.append((out, state))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_stays_in_its_sequence_and_head(operator, device):
    kwargs = arguments(device, T=200, H=2, HV=2, states=3) | {
        "cu_seqlens": torch.tensor([0, 70, 140, 200], device=device)
    }
    o, state = OPERATORS[operator](**kwargs, output_final_state=True)
    for name in ("q", "k", "v", "g", "beta"):
        poisoned = {name: kwargs[name].clone()}
        poisoned[name][:, 80, 1] = math.nan
        actual = OPERATORS[operator](**kwargs | poisoned, output_final_state=True)
        clean, clean_state = torch.ones_like(o, dtype=torch.bool), torch.ones_like(state, dtype=torch.bool)
        clean[:, 70:140, 1], clean_state[1, 1] = False, False
        assert torch.equal(actual[0][clean], o[clean]) and torch.equal(actual[1][clean_state], state[clean_state])
        assert actual[0][:, 80:140, 1].isnan().any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_leaves_the_operator_alone(operator, device):
    kwargs = cast(arguments(device, T=70), torch.float32)
    kwargs["q"].requires_grad_()
    o = OPERATORS[operator](**kwargs)[0]
    with torch.autocast(device.type, torch.bfloat16):
        under_autocast = OPERATORS[operator](**kwargs)[0]
        assert torch.equal(under_autocast, o)
        assert torch.equal(*(torch.autograd.grad(x.sum(), kwargs["q"])[0] for x in (o, under_autocast)))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("T", [0, 1, 5])
def test_empty_batch(operator, T, device):
    kwargs = arguments(device, B=0, T=T)
    o, state, h = OPERATORS[operator](**kwargs, output_final_state=True, return_intermediate_states=True)
    assert o.shape == (0, T, 2, 8) and state.shape == (0, 2, 16, 8) and h.shape == (0, min(T, 1), 2, 16, 8)
    assert OPERATORS[operator](**kwargs)[0].shape == o.shape


@torch.inference_mode()
def test_inference_mode(device):
    kwargs = arguments(device, T=5)
    assert_close(ops.recurrent_kda(**kwargs)[0], ops.chunk_kda(**kwargs)[0])


def test_alias():
    assert ops.fused_recurrent_kda is ops.recurrent_kda


class TestFwd:
    """FlashKDA's call."""

    @staticmethod
    def call(kwargs, dtype, **others):
        """Runs `fwd` on buffers full of NaN; returns out and the final state, None where none was asked for."""
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")
        call = cast({name: kwargs[name] for name in names}, dtype)
        out = torch.full_like(call["v"], math.nan)
        assert ops.fwd(**call, scale=kwargs["q"].shape[-1] ** -0.5, out=out, **others) is None
        return out

    @pytest.mark.parametrize("gate", GATES)
    @pytest.mark.parametrize("T", [0, 1, 65, 127])
    def test_matches_reference(self, gate, T, device):
        kwargs = arguments(device, B=2, T=T, H=2, HV=4, gate=gate)
        o, state, _ = reference(kwargs)
        for dtype in (torch.float64, torch.float32):
            initial_state = kwargs["initial_state"].mT.contiguous().to(dtype)
            final_state = torch.full_like(initial_state, math.nan)
            assert_close(self.call(kwargs, dtype, initial_state=initial_state, final_state=final_state), o)
            assert_close(final_state, state.mT)
            assert_close(self.call(kwargs, dtype, initial_state=initial_state), o)

    @pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_without_initial_state(self, state_dtype, device):
        kwargs = arguments(device, T=30, dtype=torch.bfloat16)
        del kwargs["initial_state"]
        o, state, _ = reference(kwargs)
        final_state = torch.full(state.mT.shape, math.nan, dtype=state_dtype, device=device)
        assert_close(self.call(kwargs, torch.bfloat16, final_state=final_state), o)
        assert_close(final_state, state.mT)

    def test_state_updated_in_place(self, device):
        kwargs = arguments(device, T=30)
        o, state, _ = reference(kwargs)
        buffer = kwargs["initial_state"].mT.contiguous()
        assert_close(self.call(kwargs, torch.float64, initial_state=buffer, final_state=buffer), o)
        assert_close(buffer, state.mT)

    def test_packed_sequences(self, device):
        bounds = torch.tensor([0, 0, 66, 66, 70], device=device)
        kwargs = arguments(device, T=75, states=4)
        o, state, _ = reference(kwargs | {"cu_seqlens": bounds})
        initial_state = kwargs["initial_state"].mT.contiguous()
        final_state = torch.full_like(initial_state, math.nan)
        states = {"initial_state": initial_state, "final_state": final_state}
        assert_close(self.call(kwargs, torch.float64, **states, cu_seqlens=bounds), o)
        assert_close(final_state, state.mT)

    def test_strided_buffers(self, device):
        kwargs = arguments(device, T=30)
        o, state, _ = reference(kwargs)
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")
        out = kwargs["v"].new_full((1, 30, 2, 16), math.nan)[..., ::2]
        final_state = torch.full_like(kwargs["initial_state"], math.nan).mT
        initial_state = kwargs["initial_state"].mT
        call = {name: kwargs[name] for name in names}
        ops.fwd(**call, scale=0.25, out=out, initial_state=initial_state, final_state=final_state)
        assert_close(out, o)
        assert_close(final_state, state.mT)

    def test_module_of_flash_kda(self):
        import kda_hf.flash_kda as flash_kda

        assert flash_kda.fwd is ops.fwd
