"""`kda_decode_step` against a KDA layer's convolution, recurrence and norm one after the other."""

import pytest
import torch
import torch.nn.functional as F

from kda_hf import ops


SHAPES = [{"H": 1, "HV": 1, "K": 8, "V": 8}, {"H": 2, "HV": 4, "K": 8, "V": 16}, {"H": 3, "HV": 3, "K": 16, "V": 8}]


@pytest.fixture(autouse=True)
def seed():
    seed = torch.seed() % 2**31
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def arguments(device, B=3, H=2, HV=4, K=8, V=16, W=4, rows=None, dtype=torch.float64, lower_bound=-5.0, v_first=False):
    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    rows = B if rows is None else rows
    return {
        "q": randn(B, 1, H, K),
        "k": randn(B, 1, H, K),
        "v": randn(B, 1, HV, V),
        "g": randn(B, 1, HV, K),
        "beta": randn(B, 1, HV),
        "output_gate": randn(B, 1, HV, V),
        "conv_state": randn(rows, 2 * H * K + HV * V, W),
        "recurrent_state": randn(rows, HV, *((V, K) if v_first else (K, V))),
        "q_conv_weight": randn(H * K, W),
        "k_conv_weight": randn(H * K, W),
        "v_conv_weight": randn(HV * V, W),
        "norm_weight": randn(V),
        "norm_eps": 1e-5,
        "A_log": randn(HV),
        "dt_bias": randn(HV * K),
        "lower_bound": lower_bound,
        "state_v_first": v_first,
    }


def expected(x, row=None):
    """The output and both states after it, for the sequences whose states these rows are."""
    conv_state, state = x["conv_state"], x["recurrent_state"]
    if row is not None:
        conv_state, state = conv_state[row], state[row]
    inputs = [x[name].flatten(2) for name in ("q", "k", "v")]
    weight = torch.cat([x[f"{name}_conv_weight"] for name in ("q", "k", "v")])
    mixed, conv_after = ops.causal_conv1d(
        torch.cat(inputs, -1), weight, initial_state=conv_state, output_final_state=True
    )
    q, k, v = mixed.split([y.shape[-1] for y in inputs], -1)
    o, state_after = ops.chunk_kda(
        q.view(x["q"].shape),
        k.view(x["k"].shape),
        v.view(x["v"].shape),
        x["g"],
        x["beta"],
        scale=x.get("scale"),
        initial_state=state,
        output_final_state=True,
        A_log=x["A_log"],
        dt_bias=x["dt_bias"],
        lower_bound=x["lower_bound"],
        use_gate_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=x.get("allow_neg_eigval", False),
        state_v_first=x["state_v_first"],
        backend="torch",
    )
    normed = F.rms_norm(o, o.shape[-1:], x["norm_weight"], x["norm_eps"])
    return normed * x["output_gate"].sigmoid(), conv_after, state_after


def step(x, **others):
    x = x | {name: x[name].clone() for name in ("conv_state", "recurrent_state")} | others
    return ops.kda_decode_step(**x), x["conv_state"], x["recurrent_state"]


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("lower_bound", [-5.0, None])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("W", [1, 2, 3, 4])
def test_is_what_a_layer_does(W, shape, lower_bound, v_first, device):
    x = arguments(device, W=W, lower_bound=lower_bound, v_first=v_first, **shape)
    for options in ({}, {"scale": 0.3, "allow_neg_eigval": True}):
        for actual, wanted in zip(step(x | options), expected(x | options), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_pool(integer, device):
    x = arguments(device, B=4, rows=6)
    indices = torch.tensor([5, -1, 0, 6], dtype=integer, device=device)
    o, conv_state, state = step(x, state_indices=indices)
    used = {name: x[name][[0, 2]] for name in ("q", "k", "v", "g", "beta", "output_gate")}
    wanted = expected(x | used, row=[5, 0])
    for actual, values in zip((o[[0, 2]], conv_state[[5, 0]], state[[5, 0]]), wanted, strict=True):
        torch.testing.assert_close(actual, values, rtol=1e-10, atol=1e-12)
    assert not o[[1, 3]].any()
    for row in (1, 2, 3, 4):
        assert torch.equal(conv_state[row], x["conv_state"][row])
        assert torch.equal(state[row], x["recurrent_state"][row])
    o, conv_state, state = step(x, state_indices=torch.full_like(indices, -1))
    assert not o.any() and torch.equal(conv_state, x["conv_state"]) and torch.equal(state, x["recurrent_state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, device):
    x = arguments(device, dtype=dtype)
    x["recurrent_state"] = x["recurrent_state"].float()
    results = step(x)
    assert [y.dtype for y in results] == [dtype, dtype, torch.float32]
    exact = {name: y.double() if isinstance(y, torch.Tensor) else y for name, y in x.items()}
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for actual, wanted in zip(results, expected(exact), strict=True):
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


def test_empty_batch(device):
    assert step(arguments(device, B=0))[0].shape == (0, 1, 4, 16)


def test_compiles_without_graph_breaks(device):
    x = arguments(device, dtype=torch.float32)
    compiled = torch.compile(ops.kda_decode_step, fullgraph=True, backend="aot_eager")
    states = {name: x[name].clone() for name in ("conv_state", "recurrent_state")}
    wanted = step(x)
    for actual, values in zip((compiled(**x | states), *states.values()), wanted, strict=True):
        torch.testing.assert_close(actual, values)


def _change(name, make, error, words):
    return pytest.param(name, make, error, words, id=f"{name}-{words}")


@pytest.mark.parametrize(
    ("name", "make", "error", "words"),
    [
        _change("q", lambda x: x.expand(-1, 2, -1, -1), ValueError, "one token"),
        _change("k", lambda x: x[..., :-1], ValueError, "`k`"),
        _change("v", lambda x: x[:, :, :-1], ValueError, "`v`"),
        _change("g", lambda x: x[..., 0], ValueError, "`g`"),
        _change("beta", lambda x: None, TypeError, "`beta`"),
        _change("output_gate", lambda x: x[..., :-1], ValueError, "`output_gate`"),
        _change("conv_state", lambda x: x[..., :-1], ValueError, "`conv_state`"),
        _change("recurrent_state", lambda x: x[:-1], ValueError, "`recurrent_state`"),
        _change("recurrent_state", lambda x: x.mT, ValueError, "`recurrent_state`"),
        _change("q_conv_weight", lambda x: x[0], ValueError, "`q_conv_weight`"),
        _change("k_conv_weight", lambda x: x[:-1], ValueError, "`k_conv_weight`"),
        _change("v_conv_weight", lambda x: x.unsqueeze(1), ValueError, "`v_conv_weight`"),
        _change("norm_weight", lambda x: x[:-1], ValueError, "`norm_weight`"),
        _change("norm_eps", lambda x: "1e-5", TypeError, "`norm_eps`"),
        _change("lower_bound", lambda x: -6.0, ValueError, "`lower_bound`"),
        _change("state_indices", lambda x: torch.tensor([0, 1]), ValueError, "`state_indices`"),
        _change("state_indices", lambda x: torch.zeros(3), ValueError, "`state_indices`"),
        _change("v", lambda x: x.requires_grad_(), ValueError, "no gradients"),
    ],
)
def test_errors_come_before_anything_is_written(name, make, error, words):
    x = arguments("cpu")
    before = {state: x[state].clone() for state in ("conv_state", "recurrent_state")}
    with pytest.raises(error, match=words):
        ops.kda_decode_step(**x | {name: make(x.get(name))})
    assert all(torch.equal(x[state], before[state]) for state in before)
