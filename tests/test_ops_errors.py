"""Wrong arguments raise before anything is written, and the message names the argument."""

import math

import pytest
import torch

from kda_hf import ops


B, T, H, HV, K, V, POOL = 2, 5, 2, 4, 8, 6, 7


def tensors():
    return {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, HV, V),
        "g": -torch.rand(B, T, HV, K),
        "beta": torch.rand(B, T, HV),
        "A_log": torch.zeros(HV),
        "dt_bias": torch.zeros(HV, K),
        "initial_state": torch.zeros(B, HV, K, V),
    }


def packed(bounds, dtype=torch.int32):
    return {name: x[:1] for name, x in tensors().items() if name in ("q", "k", "v", "g", "beta")} | {
        "initial_state": torch.zeros(max(len(bounds) - 1, 0), HV, K, V),
        "cu_seqlens": torch.tensor(bounds, dtype=dtype),
    }


# What is changed in a correct call, the error, and words of its message besides the argument's name.
WRONG_SHAPES = {
    "q": (torch.randn(B, T, K), "[B, T, H, K]"),
    "k": (torch.randn(B, T, H, K + 1), "[B, T, H, K] = [2, 5, 2, 8], got [2, 5, 2, 9]"),
    "v": (torch.randn(B, T + 1, HV, V), "[B, T, HV, V]"),
    "g": (torch.randn(B, T, H, K), "[B, T, HV, K] = [2, 5, 4, 8], got [2, 5, 2, 8]"),
    "beta": (torch.randn(B, T, HV, 1), "[B, T, HV]"),
    "A_log": (torch.zeros(H), "[HV] = [4], got [2]"),
    "dt_bias": (torch.zeros(HV, 1), "[HV, K] = [4, 8], got [4, 1]"),
    "initial_state": (torch.zeros(B, HV, V, K), "[N, HV, K, V] = [2, 4, 8, 6], got [2, 4, 6, 8]"),
}
BAD_CALLS = [
    *((ValueError, {name: x}, name, words) for name, (x, words) in WRONG_SHAPES.items()),
    *((TypeError, {name: [1.0]}, name, "got list") for name in WRONG_SHAPES),
    *((ValueError, {name: x.to(torch.int32)}, name, "got int32") for name, x in tensors().items()),
    *((RuntimeError, {name: x.to("meta")}, name, "cpu") for name, x in tensors().items() if name != "q"),
    (ValueError, {"v": torch.randn(B, T, 3, V)}, "v", "multiple of the 2 heads"),
    (ValueError, {"lower_bound": -5.1}, "lower_bound", "[-5, 0]"),
    (ValueError, {"lower_bound": 0.1}, "lower_bound", "got 0.1"),
    (ValueError, {"lower_bound": math.nan}, "lower_bound", "got nan"),
    (TypeError, {"lower_bound": "-5"}, "lower_bound", "got str"),
    (TypeError, {"scale": "1"}, "scale", "got str"),
    (ValueError, {"q": torch.zeros(B, T, H, 0)}, "q", "K ≥ 1"),
    (ValueError, {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens", "B = 2"),
    (ValueError, {"cu_seqlens": torch.tensor([[0, 5]])}, "cu_seqlens", "[N + 1]"),
    (ValueError, {"cu_seqlens": torch.tensor([0])}, "cu_seqlens", "[N + 1]"),
    (ValueError, {"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens", "int32 or int64"),
    (TypeError, {"cu_seqlens": [0, 5]}, "cu_seqlens", "got list"),
    (ValueError, {"cu_seqlens_cpu": torch.tensor([0, 5])}, "cu_seqlens_cpu", "needs `cu_seqlens`"),
    (ValueError, packed([1, 5]), "cu_seqlens", "start at 0, got 1"),
    (ValueError, packed([0, 4, 3]), "cu_seqlens", "got 4 and then 3 at index 2"),
    (ValueError, packed([0, 6], torch.int64), "cu_seqlens", "T = 5, got 6"),
    (ValueError, packed([0, 5]) | {"cu_seqlens_cpu": torch.tensor([0, 6])}, "cu_seqlens_cpu", "T = 5, got 6"),
    (ValueError, packed([0, 5]) | {"cu_seqlens_cpu": torch.tensor([0, 3, 5])}, "cu_seqlens_cpu", "[2], got [3]"),
    (ValueError, packed([0, 5]) | {"initial_state": torch.zeros(2, HV, K, V)}, "initial_state", "[1, 4, 8, 6]"),
    (ValueError, {"safe_gate": True, "use_gate_in_kernel": True}, "lower_bound", "safe_gate"),
    (ValueError, {"allow_neg_eigval": True}, "allow_neg_eigval", "use_beta_sigmoid_in_kernel"),
    (ValueError, {"state_v_first": True}, "initial_state", "[N, HV, V, K]"),
    (ValueError, {"transpose_state_layout": True}, "initial_state", "[N, HV, V, K]"),
    (ValueError, {"backend": "triton"}, "backend", "got 'triton'"),
    (RuntimeError, {"backend": "cuda"}, "backend='cuda'", "cpu"),
    (RuntimeError, {"backend": "fla"}, "backend='fla'", "cpu"),
]


@pytest.mark.parametrize("operator", [ops.chunk_kda, ops.recurrent_kda])
@pytest.mark.parametrize(("error", "change", "name", "words"), BAD_CALLS)
def test_kda(operator, error, change, name, words):
    with pytest.raises(error) as caught:
        operator(**tensors() | change)
    assert name in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize(
    ("error", "change", "name"),
    [
        (ValueError, {"state_indices": torch.zeros(B + 1, dtype=torch.int32)}, "state_indices"),
        (ValueError, {"state_indices": torch.zeros(B)}, "state_indices"),
        (TypeError, {"state_indices": [0, 1]}, "state_indices"),
        (TypeError, {"initial_state": None}, "initial_state"),
        (ValueError, {"initial_state": torch.zeros(POOL, HV, V, K)}, "initial_state"),
        (ValueError, {"return_intermediate_states": True}, "state_indices"),
        (ValueError, {"v": torch.zeros(B, T, HV, V, requires_grad=True)}, "state_indices"),
    ],
)
def test_state_pool(error, change, name):
    pool = torch.zeros(POOL, HV, K, V)
    call = tensors() | {"initial_state": pool, "state_indices": torch.tensor([0, 1])}
    with pytest.raises(error, match=f"`{name}`"):
        ops.recurrent_kda(**call | change)
    assert not pool.any()


FWD_CHANGES = [
    (ValueError, {"out": torch.zeros(B, T, HV, V + 1)}, "out"),
    (ValueError, {"out": torch.zeros(B, T, HV, V, dtype=torch.bfloat16)}, "out"),
    (TypeError, {"out": None}, "out"),
    (RuntimeError, {"out": torch.zeros(B, T, HV, V, device="meta")}, "out"),
    (ValueError, {"initial_state": torch.zeros(B, HV, K, V)}, "initial_state"),
    (ValueError, {"final_state": torch.zeros(B, HV, K, V)}, "final_state"),
    (ValueError, {"final_state": torch.zeros(B + 1, HV, V, K)}, "final_state"),
    (ValueError, {"final_state": torch.zeros(B, HV, V, K, dtype=torch.bfloat16)}, "final_state"),
    (TypeError, {"final_state": 1}, "final_state"),
    (TypeError, {"scale": None}, "scale"),
    (ValueError, {"lower_bound": -6.0}, "lower_bound"),
    (ValueError, {"cu_seqlens": torch.tensor([0, T])}, "cu_seqlens"),
    (ValueError, {"dt_bias": torch.zeros(HV)}, "dt_bias"),
    *((ValueError, {name: x}, name) for name, (x, _) in WRONG_SHAPES.items()),
]


@pytest.mark.parametrize(("error", "change", "name"), FWD_CHANGES)
def test_fwd_writes_nothing(error, change, name):
    call = tensors() | {"initial_state": torch.zeros(B, HV, V, K), "final_state": torch.zeros(B, HV, V, K)}
    call |= {"out": torch.zeros(B, T, HV, V), "scale": 1.0, "lower_bound": None} | change
    if name == "initial_state":
        call["initial_state"] = torch.zeros(B, HV, K, V)
    with pytest.raises(error, match=f"`{name}`"):
        ops.fwd(**call)
    assert not any(call[buffer].any() for buffer in ("out", "final_state") if buffer != name)


@pytest.mark.parametrize(
    ("error", "change", "name"),
    [
        (ValueError, {"x": torch.zeros(5, 6)}, "x"),
        (ValueError, {"x": torch.zeros(2, 5, 6, dtype=torch.int64)}, "x"),
        (TypeError, {"x": None}, "x"),
        (ValueError, {"weight": torch.zeros(5, 4)}, "weight"),
        (ValueError, {"weight": torch.zeros(6, 1, 4)}, "weight"),
        (ValueError, {"weight": torch.zeros(6, 0)}, "weight"),
        (RuntimeError, {"weight": torch.zeros(6, 4, device="meta")}, "weight"),
        (ValueError, {"bias": torch.zeros(4)}, "bias"),
        (TypeError, {"bias": True}, "bias"),
        (ValueError, {"activation": "relu"}, "activation"),
        (ValueError, {"initial_state": torch.zeros(2, 6, 3)}, "initial_state"),
        (ValueError, {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
        (ValueError, {"x": torch.zeros(1, 5, 6), "cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens"),
    ],
)
def test_causal_conv1d(error, change, name):
    with pytest.raises(error, match=f"`{name}`"):
        ops.causal_conv1d(**{"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4)} | change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bounds", [[0, 9], [0, 4, 2], [3, 5]])
def test_bounds_on_the_gpu(bounds, monkeypatch):
    """Checked only on demand; unchecked they read and write nothing out of bounds."""
    call = {name: x.cuda() for name, x in packed(bounds).items()}
    ops.chunk_kda(**call, output_final_state=True)
    torch.cuda.synchronize()
    monkeypatch.setenv("KDA_HF_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens"):
        ops.chunk_kda(**call)
