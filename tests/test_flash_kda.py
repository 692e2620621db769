"""The calls that FlashKDA's users make, through the module that takes its place."""

import inspect
import itertools
import subprocess
import sys

import pytest
import torch

import kda_hf.flash_kda as flash_kda
from kda_hf.ops.reference import kda_reference


WIDTH = 128  # FlashKDA has kernels for this one
LOWER_BOUND = -5.0
# Relative L2 against float64, nearly all of which is the rounding to bf16.
OUTPUT_BOUND, STATE_BOUNDS = 4e-3, {torch.float32: 3e-3, torch.bfloat16: 3.5e-3}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for variable in ("KDA_HF_BACKEND", "FLA_FLASH_KDA", "KDA_HF_CHECK"):
        monkeypatch.delenv(variable, raising=False)
    torch.manual_seed(0)


def inputs(device, B=1, T=40, H=2):
    def randn(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    return {
        "q": randn(B, T, H, WIDTH),
        "k": randn(B, T, H, WIDTH),
        "v": randn(B, T, H, WIDTH),
        "g": randn(B, T, H, WIDTH),
        "beta": randn(B, T, H),
        "A_log": torch.rand(H, device=device),
        "dt_bias": torch.rand(H, WIDTH, device=device),
    }


def packed(device, lengths, H=2):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return inputs(device, T=sum(lengths), H=H) | {"cu_seqlens": bounds}


def state(device, dtype, N, H=2):
    return torch.randn(N, H, WIDTH, WIDTH, device=device).to(dtype)


def exact(x, initial_state=None):
    """o and the final state in float64."""
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    initial_state = None if initial_state is None else initial_state.double()
    flags = {"use_gate": True, "use_qk_norm": True, "use_beta_sigmoid": True, "state_v_first": True}
    return kda_reference(**doubles, initial_state=initial_state, lower_bound=LOWER_BOUND, **flags)[:2]


def run(x, initial_state=None, final_state=None):
    """The call as the README writes it: tensors and scale by position, the rest by name."""
    out = torch.full_like(x["v"], torch.nan)
    q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
    others = {"cu_seqlens": x["cu_seqlens"]} if "cu_seqlens" in x else {}
    result = flash_kda.fwd(
        q,
        k,
        v,
        g,
        beta,
        WIDTH**-0.5,
        out,
        A_log=x["A_log"],
        dt_bias=x["dt_bias"],
        lower_bound=LOWER_BOUND,
        initial_state=initial_state,
        final_state=final_state,
        **others,
    )
    assert result is None
    return out


STATES = [None, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", STATES, ids=["no states", "fp32", "bf16"])
@pytest.mark.parametrize("has_initial", [True, False], ids=["in", "no in"])
@pytest.mark.parametrize("has_final", [True, False], ids=["out", "no out"])
@pytest.mark.parametrize("case", ["one", "batch", "packed", "tails"])
def test_fwd(case, has_initial, has_final, dtype, device, relative_error):
    if dtype is None and (has_initial or has_final):
        pytest.skip("there are no states")
    if case in ("packed", "tails"):
        x = packed(device, [17, 1, 33, 16] if case == "packed" else range(1, 10))
        N = len(x["cu_seqlens"]) - 1
    else:
        N = 1 if case == "one" else 3
        x = inputs(device, B=N)
    initial = state(device, dtype, N) if has_initial else None
    final = torch.full((N, 2, WIDTH, WIDTH), torch.nan, device=device, dtype=dtype) if has_final else None
    before = None if initial is None else initial.clone()
    out = run(x, initial, final)
    expected = exact(x, initial)
    assert relative_error(out, expected[0]) <= OUTPUT_BOUND
    if has_final:
        assert relative_error(final, expected[1]) <= STATE_BOUNDS[dtype]
    if has_initial:
        assert torch.equal(initial, before)


@pytest.mark.parametrize("dtype", STATES[1:], ids=["fp32", "bf16"])
def test_chunks_of_a_stream(dtype, device, relative_error):
    """One call's final state is the next one's initial state, in another buffer or in the same."""
    x = inputs(device, B=2, T=90)
    whole = exact(x)
    in_place = torch.zeros(2, 2, WIDTH, WIDTH, device=device, dtype=dtype)
    last, outs, outs_in_place = torch.zeros_like(in_place), [], []
    for start, end in itertools.pairwise((0, 32, 37, 90)):
        piece = {name: t if name in ("A_log", "dt_bias") else t[:, start:end].contiguous() for name, t in x.items()}
        final = torch.empty_like(in_place)
        outs.append(run(piece, last, final))
        outs_in_place.append(run(piece, in_place, in_place))
        last = final
    assert relative_error(torch.cat(outs, 1), whole[0]) <= OUTPUT_BOUND * 1.5
    assert relative_error(last, whole[1]) <= STATE_BOUNDS[dtype] * 1.5
    assert torch.equal(torch.cat(outs, 1), torch.cat(outs_in_place, 1)) and torch.equal(last, in_place)


def test_parameters():
    names = "q k v g beta scale out A_log dt_bias lower_bound initial_state final_state cu_seqlens"
    parameters = inspect.signature(flash_kda.fwd).parameters.values()
    assert " ".join(parameter.name for parameter in parameters) == names
    assert [parameter.default for parameter in parameters][-4:] == [inspect.Parameter.empty, None, None, None]


def test_workspace():
    assert flash_kda.get_workspace_size(8192, 96) == flash_kda.get_workspace_size(T_total=8192, H=96, N=4) == 0


def test_errors_come_before_anything_is_written(device):
    x = inputs(device, B=2)
    for change in (
        {"cu_seqlens": torch.tensor([0, 40], device=device)},
        {"k": x["k"][..., :64]},
        {"beta": x["beta"][..., None]},
    ):
        final = torch.full((2, 2, WIDTH, WIDTH), 7.0, device=device)
        with pytest.raises(ValueError):
            run(x | change, None, final)
        assert (final == 7).all()
    with pytest.raises(ValueError, match="`final_state`"):
        run(x, state(device, torch.float32, 2), state(device, torch.bfloat16, 2))


def test_in_the_place_of_the_package():
    """For a library that imports `flash_kda` by its name, and one that looks for it without importing it."""
    code = """
import sys
import kda_hf.flash_kda
sys.modules["flash_kda"] = kda_hf.flash_kda
import flash_kda
from flash_kda import fwd, get_workspace_size
from importlib.util import find_spec
assert fwd is kda_hf.ops.fwd and find_spec("flash_kda") is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
