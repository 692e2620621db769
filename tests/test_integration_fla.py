"""kda_hf as a backend of FLA's dispatch. What needs FLA is skipped without it, what needs kernels without a GPU."""

import inspect
import logging
import subprocess
import sys
import types
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kda_hf import ops
from kda_hf.integrations import fla as integration
from kda_hf.ops import backends
from kda_hf.ops import fla as own_calls
from kda_hf.ops.reference import kda_reference


try:
    from fla.ops import kda as fla_kda
except ImportError:
    fla_kda = None

VERSION = (0, 0) if fla_kda is None else integration._version()
HAS_KERNELS = torch.cuda.is_available() and any(
    row["backend"] == "cuda" and row["usable"] for row in ops.backend_report()
)
needs_fla = pytest.mark.skipif(fla_kda is None, reason="needs flash-linear-attention")
needs_fla_06 = pytest.mark.skipif(VERSION < (0, 6), reason="needs flash-linear-attention 0.6, which runs on a CPU")
needs_kernels = pytest.mark.skipif(fla_kda is None or not HAS_KERNELS, reason="needs FLA, and a GPU with our kernels")


# fmt: off
class FLA06:
    """The parameters of FLA 0.6, which `test_parameters_are_those_of_fla` compares with it."""

    @staticmethod
    def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                  use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
                  allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False,
                  return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
                  cp_context=None, use_graph=False, max_num_seqs=None, **kwargs): ...

    @staticmethod
    def fused_recurrent_kda_fwd(q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, scale=None,
                                output_final_state=False, inplace_final_state=True, state_v_first=False,
                                cu_seqlens=None, ssm_state_indices=None, num_accepted_tokens=None,
                                use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,
                                use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None, out=None,
                                **kwargs): ...


class FLA05:
    """Those of FLA 0.5.0, in another order."""

    @staticmethod
    def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                  use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None,
                  safe_gate=False, lower_bound=None, disable_recompute=False, return_intermediate_states=False,
                  cp_context=None, transpose_state_layout=False, **kwargs): ...
# fmt: on


BY_KEYWORD = ("A_log", "dt_bias", "chunk_size", "transpose_state_layout")
FUNCTIONS = {
    "chunk": integration._function(FLA06.chunk_kda, (0, 6), BY_KEYWORD),
    "chunk 0.5": integration._function(FLA05.chunk_kda, (0, 5), BY_KEYWORD),
    "recurrent": integration._function(FLA06.fused_recurrent_kda_fwd, (0, 6)),
}
ALL_IN_KERNEL = {
    "use_gate_in_kernel": True,
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No variable set, nothing said, and nothing registered before and after."""
    for variable in ("KDA_HF_BACKEND", "FLA_FLASH_KDA", "FLA_KDA_HF", "KDA_HF_CHECK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backends, "_logged", set())
    torch.manual_seed(0)
    yield
    integration.unregister()


def arguments(B=1, T=6, H=2, HV=2, K=8, V=8, N=None, device="cpu", dtype=torch.float32, **others):
    """Arguments of FLA's functions: logits and parameters where FLA is asked to apply the activations, and what they
    would be after it where not."""

    def randn(*shape):
        return torch.randn(shape, device=device).to(dtype)

    x = {"q": randn(B, T, H, K), "k": randn(B, T, H, K), "v": randn(B, T, HV, V), "beta": randn(B, T, HV)}
    x["g"] = torch.randn(B, T, HV, K, device=device)
    if not others.get("use_qk_l2norm_in_kernel"):
        x |= {name: F.normalize(x[name].float(), dim=-1).to(dtype) for name in ("q", "k")}
    if others.get("use_gate_in_kernel"):
        x |= {"A_log": torch.randn(HV, device=device), "dt_bias": torch.randn(HV * K, device=device)}
        x["g"] = x["g"].to(dtype)
    else:
        x["g"] = F.logsigmoid(x["g"])
    if not others.get("use_beta_sigmoid_in_kernel"):
        x["beta"] = x["beta"].sigmoid()
    if N is not None:
        v_first = others.get("state_v_first") or others.get("transpose_state_layout")
        x["initial_state"] = torch.randn(N, HV, *((V, K) if v_first else (K, V)), device=device)
    return x | others


def expected(x):
    """o and the final state by the specification, in float64, of the arguments of an FLA function."""
    names = ("initial_state", "A_log", "dt_bias", "scale", "lower_bound", "cu_seqlens")
    options = {name: x.get(name) for name in names}
    flags = {
        "use_gate": x.get("use_gate_in_kernel", False),
        "use_qk_norm": x.get("use_qk_l2norm_in_kernel", False),
        "use_beta_sigmoid": x.get("use_beta_sigmoid_in_kernel", False),
        "allow_neg_eigval": x.get("allow_neg_eigval", False),
        "state_v_first": bool(x.get("state_v_first") or x.get("transpose_state_layout")),
    }
    if options["A_log"] is not None:
        options["A_log"] = options["A_log"].flatten()
    if options["scale"] is None:
        options["scale"] = x["q"].shape[-1] ** -0.5
    inputs = {name: x[name] for name in ("q", "k", "v", "g", "beta")} | options
    doubles = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    return kda_reference(**doubles, **flags)[:2]


# ------------------------------------------------------------------------------------ what is served: no FLA is needed


def bounds(*values):
    return torch.tensor(values)


SERVED = {
    "as they are": {},
    "activated": ALL_IN_KERNEL,
    "lower bound": ALL_IN_KERNEL | {"lower_bound": -5.0},
    "safe gate": ALL_IN_KERNEL | {"lower_bound": -5.0, "safe_gate": True},
    "safe gate outside": {"safe_gate": True},
    "A_log of another shape": ALL_IN_KERNEL | {"A_log": torch.zeros(1, 1, 4, 1)},
    "no A_log": ALL_IN_KERNEL | {"A_log": None, "lower_bound": -2.0},
    "no bias": ALL_IN_KERNEL | {"dt_bias": None},
    "negative eigenvalues": ALL_IN_KERNEL | {"allow_neg_eigval": True},
    "unused parameters": {"A_log": torch.zeros(3), "dt_bias": torch.zeros(2), "lower_bound": -7},
    "states": {"N": 1, "output_final_state": True},
    "V first": {"N": 1, "output_final_state": True, "state_v_first": True},
    "older name": {"N": 1, "output_final_state": True, "transpose_state_layout": True},
    "packed": {"N": 3, "cu_seqlens": bounds(0, 2, 2, 5), "cu_seqlens_cpu": bounds(0, 2, 2, 5)},
    "graph": {"N": 2, "cu_seqlens": bounds(0, 2, 6), "use_graph": True, "max_num_seqs": 2},
    "of no consequence": {"disable_recompute": True, "chunk_size": 32, "scale": 0.3, "max_num_seqs": 7},
}
ONLY_CHUNK = ("safe gate", "safe gate outside", "older name", "packed", "graph", "of no consequence")


@pytest.mark.parametrize("case", SERVED)
@pytest.mark.parametrize("function", ["chunk", "recurrent"])
def test_served(function, case):
    if function == "recurrent" and case in ONLY_CHUNK:
        pytest.skip("FLA's recurrence has no such argument")
    x = arguments(HV=4, V=16, **SERVED[case])
    if function == "recurrent":
        x["inplace_final_state"] = False
    assert integration.refusal(FUNCTIONS[function], "torch", (), x) is None
    ours = integration.Operators()
    ours.backend, ours.functions = "torch", {f.name: f for f in (FUNCTIONS[function],)}
    with pytest.warns(DeprecationWarning) if case == "older name" else nullcontext():
        o, state = getattr(ours, FUNCTIONS[function].name)(**x)
    for actual, exact in zip((o, state), expected(x), strict=True):
        if actual is not None:
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)
    assert (state is None) is not x.get("output_final_state", False)


REFUSED = {
    "a context of parallelism": ({"cp_context": object()}, "`cp_context` is not served"),
    "intermediate states": ({"return_intermediate_states": True}, "`return_intermediate_states` is not served"),
    "unknown": ({"head_first": True}, "`head_first` is no argument of chunk_kda"),
    "two names": ({"state_v_first": True, "transpose_state_layout": False}, "two names"),
    "chunk size": ({"chunk_size": 16}, "`chunk_size` is 16"),
    "no A_log": (ALL_IN_KERNEL | {"A_log": None}, "`A_log` is None"),
    "no number": (ALL_IN_KERNEL | {"A_log": 0.0}, "`A_log` must be a torch.Tensor"),
    "lower bound": (ALL_IN_KERNEL | {"lower_bound": -8.0}, "`lower_bound` must be in [-5, 0]"),
    "no lower bound": (ALL_IN_KERNEL | {"safe_gate": True}, "`lower_bound` must be in [-5, 0]"),
    "lower bound 0": (ALL_IN_KERNEL | {"safe_gate": True, "lower_bound": 0.0}, "`lower_bound` is 0"),
    "eigenvalues": ({"allow_neg_eigval": True}, "`allow_neg_eigval` needs"),
    "scale": ({"scale": "1"}, "`scale` must be a number"),
    "bf16 state": ({"initial_state": torch.zeros(1, 2, 8, 8).bfloat16()}, "torch.bfloat16, and FLA's"),
    "fp64": ({"dtype": torch.float64, "g": torch.zeros(1, 6, 2, 8).double()}, "torch.float64, and FLA's"),
    "several dtypes": ({"v": torch.zeros(1, 6, 2, 8).bfloat16()}, "several dtypes"),
    "state": ({"initial_state": torch.zeros(2, 2, 8, 8)}, "`initial_state` must have shape"),
    "heads": ({"HV": 3}, "multiple of the 2 heads"),
    "key": ({"k": torch.zeros(1, 6, 2, 7)}, "`k` must have shape"),
    "batch": ({"B": 2, "cu_seqlens": bounds(0, 6)}, "B = 1"),
    "copy of no bounds": ({"cu_seqlens_cpu": bounds(0, 6)}, "`cu_seqlens_cpu` needs `cu_seqlens`"),
    "sequences": ({"cu_seqlens": bounds(0, 6), "use_graph": True, "max_num_seqs": 3}, "`max_num_seqs` is 3"),
    "no tokens": ({"T": 0}, "no tokens"),
    "wide keys": ({"K": 512}, "512 channels"),
    "missing": ({"q": None}, "`q` must be a torch.Tensor"),
}
REFUSED_BY_RECURRENT = {
    "in place": ({"inplace_final_state": True}, "`inplace_final_state` is not served"),
    "in place by default": ({"inplace_final_state": ...}, "`inplace_final_state` is not served"),
    "pool": ({"ssm_state_indices": bounds(0)}, "`ssm_state_indices` is not served"),
    "accepted": ({"num_accepted_tokens": bounds(1)}, "`num_accepted_tokens` is not served"),
    "output": ({"out": torch.zeros(1, 6, 2, 8)}, "`out` is not served"),
    "beta of each channel": ({"beta": torch.zeros(1, 6, 2, 8)}, "`beta` must have shape"),
    "safe gate": ({"safe_gate": True}, "`safe_gate` is no argument"),
    "older name": ({"transpose_state_layout": True}, "`transpose_state_layout` is no argument"),
    "bf16 state": ({"initial_state": torch.zeros(1, 2, 8, 8).bfloat16()}, "torch.bfloat16, and FLA's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, words = REFUSED[case]
    assert words in integration.refusal(FUNCTIONS["chunk"], "torch", (), arguments(**change))


@pytest.mark.parametrize("case", REFUSED_BY_RECURRENT)
def test_refused_by_the_recurrence(case):
    change, words = REFUSED_BY_RECURRENT[case]
    x = arguments(**{"inplace_final_state": False} | change)
    x = {name: value for name, value in x.items() if value is not ...}
    assert words in integration.refusal(FUNCTIONS["recurrent"], "torch", (), x)


def test_older_fla_ignores_some_arguments():
    """FLA 0.5.0 computes as if they were not there: it has to be asked without them."""
    refusal = partial(integration.refusal, FUNCTIONS["chunk 0.5"], "torch", ())
    for name in ("use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first", "use_graph"):
        assert f"`{name}` is no argument" in refusal(arguments(**{name: True}))
        assert refusal(arguments(**{name: False})) is None
    assert "`A_log` is None" in refusal(arguments(use_gate_in_kernel=True, lower_bound=-1.0, A_log=None))


@pytest.mark.parametrize("names", ["chunk", "chunk 0.5"])
def test_positions(names):
    """The order of the parameters is that of the installed FLA."""
    function = FUNCTIONS[names]
    x = arguments(N=2, cu_seqlens=bounds(0, 4, 6), output_final_state=True, scale=0.7)
    count = 2 + list(function.parameters).index("cu_seqlens")
    given = function.parameters | x
    call = integration.translate(function, tuple(given[name] for name in list(function.parameters)[:count]), {})
    assert call.inputs.cu_seqlens is x["cu_seqlens"] and call.inputs.scale == 0.7 and call.output_final_state
    q, k = x.pop("q"), x.pop("k")
    assert "positional" in integration.refusal(function, "torch", (q, k) + (None,) * 30, x)
    assert "twice" in integration.refusal(function, "torch", (q, k, x["v"]), x)


def test_gradients_are_fla_s():
    for name in ("q", "initial_state", "A_log"):
        x = arguments(N=1, **ALL_IN_KERNEL)
        x[name].requires_grad_()
        assert "require grad" in integration.refusal(FUNCTIONS["chunk"], "torch", (), x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert integration.refusal(FUNCTIONS["chunk"], "torch", (), x) is None


@pytest.mark.parametrize(
    ("variable", "value", "is_refused"),
    [
        ("FLA_FLASH_KDA", "0", True),
        ("FLA_KDA_HF", "0", True),
        ("FLA_KDA_HF", "1", False),
        ("KDA_HF_BACKEND", "cuda", True),
        ("KDA_HF_BACKEND", "fla", True),
        ("KDA_HF_BACKEND", "torch", False),
    ],
)
def test_variables(variable, value, is_refused, monkeypatch):
    monkeypatch.setenv(variable, value)
    reason = integration.refusal(FUNCTIONS["chunk"], "torch", (), arguments())
    assert reason == (f"{variable}={value}" if is_refused else None)


def test_our_kernels_refuse_a_cpu():
    assert integration.refusal(FUNCTIONS["chunk"], "cuda", (), arguments()) == "the tensors are on cpu"


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("op", ["chunk_kda", "recurrent_kda"])
def test_calls_of_our_own_stay_with_fla(op, raises, monkeypatch):
    """kda_hf calls FLA for gradients: FLA's dispatch must not come back, which could go on for ever."""
    seen = []

    def theirs(q, k, v, *_, **__):
        seen.append(integration.refusal(FUNCTIONS["chunk"], "torch", (), arguments()))
        if raises:
            raise ValueError("theirs")
        return v, None

    module = types.ModuleType("fla.ops.kda")
    module.chunk_kda = module.fused_recurrent_kda = theirs
    for name, stand_in in (
        ("fla", types.ModuleType("fla")),
        ("fla.ops", types.ModuleType("ops")),
        (module.__name__, module),
    ):
        monkeypatch.setitem(sys.modules, name, stand_in)
    inputs = integration.translate(FUNCTIONS["chunk"], (), arguments()).inputs
    with pytest.raises(ValueError, match="theirs") if raises else nullcontext():
        own_calls.kda(op, inputs, None, False, False, False)
    assert seen == ["kda_hf itself asks for FLA's kernels"]
    assert integration.refusal(FUNCTIONS["chunk"], "torch", (), arguments()) is None


# ------------------------------------------------------------------------------------------------ no FLA, or an old one


def test_absent_fla(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ImportError, match="flash-linear-attention 0.5 or newer"):
        integration.register()


@pytest.mark.parametrize("version", ["0.4.2", "0.3", None])
def test_old_fla(version, monkeypatch):
    module = types.ModuleType("fla")
    if version is not None:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, "fla", module)
    with pytest.raises(ImportError, match="flash-linear-attention 0.5 or newer") as caught:
        integration.register()
    assert version is None or version in str(caught.value)


def test_unknown_backend():
    with pytest.raises(ValueError, match="cuda or torch; got 'fla'"):
        integration.register("fla")


def test_nothing_to_unregister():
    integration.unregister()
    integration.unregister()


def test_fla_is_imported_when_asked_to():
    code = "import sys, kda_hf, kda_hf.integrations.fla, kda_hf.flash_kda; assert 'fla' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------- FLA, without its kernels


def registries():
    if VERSION >= (0, 6):
        from fla import backends as dispatch

        return [
            dispatch._function_registries[inspect.unwrap(fla_kda.chunk_kda)],
            dispatch._operation_registries["kda"],
        ]
    from fla.ops.backends import BackendRegistry

    BackendRegistry.ensure_initialized("kda")
    return [BackendRegistry._registries["kda"]]


def recurrent_module():
    return sys.modules["fla.ops.kda.fused_recurrent"]


@needs_fla
def test_register_and_unregister():
    before = [(dict(r._backends), set(r._logged), getattr(r, "_active", None)) for r in registries()]
    function = recurrent_module().fused_recurrent_kda_fwd
    for backend in ("cuda", "cuda", "torch"):
        assert integration.register(backend) == ("chunk_kda", "fused_recurrent_kda")
        for registry in registries():
            assert [b.backend_type for b in registry._get_sorted_backends()].count("kda_hf") == 1
            assert registry._backends["kda_hf"].backend == backend
    x = arguments()
    fla_kda.chunk_kda(**x)
    integration.unregister()
    assert before == [(dict(r._backends), set(r._logged), getattr(r, "_active", None)) for r in registries()]
    assert recurrent_module().fused_recurrent_kda_fwd is function


@needs_fla
def test_ours_is_asked_before_flash_kda():
    integration.register()
    order = [backend.backend_type for backend in registries()[0]._get_sorted_backends()]
    flash_kda = next(name for name in order if name.replace("_", "") == "flashkda")
    assert order.index("kda_hf") < order.index(flash_kda)


@needs_fla_06
def test_parameters_are_those_of_fla():
    integration.register()
    functions = registries()[0]._backends["kda_hf"].functions
    assert functions == {FUNCTIONS[name].name: FUNCTIONS[name] for name in ("chunk", "recurrent")}


@needs_fla
def test_where_dispatch_is_off(monkeypatch, caplog):
    monkeypatch.setattr(
        sys.modules["fla.backends" if VERSION >= (0, 6) else "fla.ops.backends"], "_DISPATCH_DISABLED", True
    )
    assert integration.register() == ()
    assert "FLA_DISABLE_BACKEND_DISPATCH" in caplog.text
    assert all("kda_hf" not in registry._backends for registry in registries())


@needs_fla
def test_an_unknown_fla(monkeypatch):
    monkeypatch.setattr(integration, "_version", lambda: (0, 5) if VERSION >= (0, 6) else (0, 6))
    with pytest.raises(ImportError):
        integration.register()


@needs_fla
def test_log(caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        integration.register()
        for _ in range(2):
            with pytest.raises(Exception, match="."):  # FLA's own kernels need a GPU
                fla_kda.chunk_kda(**arguments())
        monkeypatch.setenv("FLA_KDA_HF", "0")
        with pytest.raises(Exception, match="."):
            fla_kda.chunk_kda(**arguments())
        monkeypatch.delenv("FLA_KDA_HF")
        integration.register("torch")
        for _ in range(2):
            fla_kda.chunk_kda(**arguments())
    lines = [record.getMessage() for record in caplog.records]
    of_fla = [line for line in lines if line.startswith("[FLA Backend]") and "kda_hf" in line]
    assert [line.split("chunk_kda ")[1] for line in of_fla] == [
        "-> kda_hf rejected: the tensors are on cpu",
        "-> kda_hf",
    ]
    of_ours = [line for line in lines if line.startswith("fla.ops.kda.")]
    assert of_ours == [
        "fla.ops.kda.chunk_kda: backend cuda refused: the tensors are on cpu",
        "fla.ops.kda.chunk_kda: backend cuda refused: FLA_KDA_HF=0",
        "fla.ops.kda.chunk_kda: backend torch serves the calls",
    ]


GATES = {
    "log-decay": {},
    "softplus": {"use_gate_in_kernel": True},
    "bounded": {"use_gate_in_kernel": True, "lower_bound": -4.0},
}


def by_fla_s_reference(x):
    """o and the final state [N, HV, K, V] of one batch by FLA's plain recurrence and FLA's plain gates."""
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
    if x.get("use_qk_l2norm_in_kernel"):
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if x.get("use_gate_in_kernel"):
        if x.get("lower_bound") is None:
            g = naive_kda_gate(g, x["A_log"], x["dt_bias"])
        else:
            g = naive_kda_lowerbound_gate(g, x["A_log"], x["dt_bias"], x["lower_bound"])
    if x.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid() * (2 if x.get("allow_neg_eigval") else 1)
    state = x.get("initial_state")
    state = state.mT if state is not None and x.get("state_v_first") else state
    heads = v.shape[2] // q.shape[2]  # older versions of the reference know no groups
    q, k = (t.repeat_interleave(heads, 2) for t in (q, k))
    return naive_recurrent_kda(q, k, v, g, beta, x.get("scale"), state, output_final_state=True)


@needs_fla
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"T": 130, "N": 2, "B": 2},
        {"HV": 4, "V": 24, "N": 1, "use_qk_l2norm_in_kernel": True},
        {"scale": 0.4, "use_qk_l2norm_in_kernel": True},
        {"N": 1, "state_v_first": True, "use_beta_sigmoid_in_kernel": True},
        {"HV": 6, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
        {"N": 3, "cu_seqlens": bounds(0, 1, 1, 6), "HV": 4},
    ],
    ids=["plain", "batch", "grouped", "scale", "V first", "eigenvalues", "packed"],
)
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_results_are_those_of_fla_s_reference(name, change, gate):
    if VERSION < (0, 6) and (name == "fused_recurrent_kda" or change.keys() & {"use_beta_sigmoid_in_kernel"}):
        pytest.skip("FLA 0.5 has no such arguments in each release, and its recurrence looks for a GPU")
    integration.register("torch")
    x = arguments(**change, **GATES[gate])
    with torch.no_grad():
        o, state = getattr(fla_kda, name)(**x, output_final_state=True)
    if "cu_seqlens" in x:
        starts = x["cu_seqlens"].tolist()
        pieces = [
            by_fla_s_reference(
                x
                | {n: x[n][:, a:b] for n in ("q", "k", "v", "g", "beta")}
                | {"initial_state": x["initial_state"][i : i + 1]}
            )
            for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))
        ]
        exact = torch.cat([piece[0] for piece in pieces], 1), torch.cat([piece[1] for piece in pieces])
    else:
        exact = by_fla_s_reference(x)
    torch.testing.assert_close(o, exact[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.mT if x.get("state_v_first") else state, exact[1], rtol=1e-3, atol=1e-4)


ERRORS = {
    "batch": {"B": 2, "cu_seqlens": bounds(0, 6)},
    "states": {"cu_seqlens": bounds(0, 2, 6), "initial_state": torch.zeros(3, 2, 8, 8)},
    "bf16 state": {"initial_state": torch.zeros(1, 2, 8, 8).bfloat16()},
    "no lower bound": ALL_IN_KERNEL | {"safe_gate": True},
    "lower bound": {"use_gate_in_kernel": True, "safe_gate": True, "lower_bound": -8.0},
    "lower bound 0": {"use_gate_in_kernel": True, "safe_gate": True, "lower_bound": 0.0},
    "no A_log": {"use_gate_in_kernel": True, "A_log": None},
    "key": {"k": torch.zeros(1, 6, 2, 7)},
    "widths": {"K": 512},
    "heads": {"HV": 3},
    "gate": {"g": torch.zeros(1, 6, 2, 7)},
    "beta": {"beta": torch.zeros(1, 6, 2, 8)},
    "context": {"cp_context": types.SimpleNamespace(cu_seqlens=None)},
    "no queries": {"q": None},
}
ERRORS_06 = {
    "two names": {"state_v_first": True, "transpose_state_layout": True},
    "eigenvalues": {"allow_neg_eigval": True},
    "chunk size": {"chunk_size": 16},
}


@needs_fla
@pytest.mark.parametrize("case", [*ERRORS, *ERRORS_06])
def test_errors_are_fla_s(case, device):
    if case in ERRORS_06 and VERSION < (0, 6):
        pytest.skip("FLA 0.5.0 has no such argument")
    x = {
        n: t.to(device) if isinstance(t, torch.Tensor) else t
        for n, t in arguments(**(ERRORS | ERRORS_06)[case]).items()
    }
    if x.get("A_log", 0) is None:  # FLA 0.5 tells a missing one from one that is None
        del x["A_log"]
    caught = []
    for backend in (None, "torch", "cuda"):
        if backend is not None:
            integration.register(backend)
        with pytest.raises(Exception, match=".") as error:
            fla_kda.chunk_kda(**x)
        caught.append((error.type, str(error.value)))
    assert caught[1:] == caught[:1] * 2


@needs_fla_06
def test_our_own_calls_of_fla_do_not_come_back(caplog):
    integration.register("torch")
    inputs = integration.translate(FUNCTIONS["chunk"], (), arguments()).inputs
    for op in ("chunk_kda", "recurrent_kda"):
        with caplog.at_level(logging.INFO, "kda_hf"), pytest.raises(Exception, match="."):  # Triton has no CPU
            own_calls.kda(op, inputs, None, False, False, False)
    assert caplog.text.count("refused: kda_hf itself asks for FLA's kernels") == 2


class PlainNorm(torch.nn.Module):
    """In the place of FLA's gated norm, which has a Triton kernel alone."""

    def forward(self, o, gate):
        return F.rms_norm(o, o.shape[-1:]) * gate.sigmoid()


@needs_fla_06
@pytest.mark.parametrize("options", [{}, {"num_v_heads": 4, "allow_neg_eigval": True}, {"lower_bound": -5.0}])
def test_layer_of_fla_on_a_cpu(options):
    """Whole sequences and token by token, through the layer as it is."""
    from fla.layers.kda import KimiDeltaAttention
    from fla.models.cache_utils import Cache

    integration.register("torch")
    layer = KimiDeltaAttention(32, head_dim=16, num_heads=2, use_short_conv=False, layer_idx=0, **options).eval()
    layer.o_norm = PlainNorm()
    x = torch.randn(2, 80, 32)
    with torch.no_grad():
        whole, _, _ = layer(x)
        cache, pieces = Cache(), []
        for piece in x.split([70, 1, 1, 8], dim=1):
            y, _, cache = layer(piece, past_key_values=cache, use_cache=True)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- kernels

# Relative L2 against float64 of the output, nearly all of which is its rounding, and of the final state.
OUTPUT_BOUND, STATE_BOUND, STATE_BOUND_BY_TOKEN = 4e-3, 3e-3, 3e-6
WIDE = {"K": 128, "V": 128, "H": 2, "device": "cuda", "dtype": torch.bfloat16}


@pytest.fixture
def served(monkeypatch):
    """The names of FLA's functions that we served, one for each call."""
    calls, serve = [], integration.Operators._serve

    def count(self, name, args, kwargs):
        calls.append(name)
        return serve(self, name, args, kwargs)

    monkeypatch.setattr(integration.Operators, "_serve", count)
    return calls


def error(actual, exact):
    assert actual.shape == exact.shape
    return float((actual.double() - exact).norm() / exact.norm())


CALLS = {
    "steep": ALL_IN_KERNEL | {"lower_bound": -5.0, "safe_gate": True},
    "bounded": ALL_IN_KERNEL | {"lower_bound": -5.0},
    "softplus": ALL_IN_KERNEL,
    "activated before": {},
    "V first": ALL_IN_KERNEL | {"lower_bound": -5.0, "state_v_first": True},
    "grouped": ALL_IN_KERNEL | {"HV": 6},
    "64": ALL_IN_KERNEL | {"K": 64, "V": 64},
    "64 and 128": ALL_IN_KERNEL | {"K": 64},
    "fp16": ALL_IN_KERNEL | {"dtype": torch.float16},
    "eigenvalues": ALL_IN_KERNEL | {"allow_neg_eigval": True},
    "batch": ALL_IN_KERNEL | {"B": 3, "N": 3},
    "no state": ALL_IN_KERNEL | {"N": None},
    "scale": {"scale": 0.3},
    "packed": ALL_IN_KERNEL | {"N": 4, "T": 150, "cu_seqlens": bounds(0, 1, 1, 90, 150)},
    "one token": ALL_IN_KERNEL | {"T": 1, "B": 5, "N": 5},
}


def on_gpu(**change):
    x = arguments(**WIDE | {"T": 200, "N": 1} | change)
    return {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in x.items()}


@needs_kernels
@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kernels_serve(name, case, served):
    change = CALLS[case]
    if name == "fused_recurrent_kda":
        change = {n: value for n, value in change.items() if n != "safe_gate"}
    if VERSION < (0, 6) and change.keys() & {"use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first"}:
        pytest.skip("not each release of FLA 0.5 has these arguments")
    x = on_gpu(**change)
    theirs = getattr(fla_kda, name)(**x, output_final_state=True)
    integration.register()
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            ours = getattr(fla_kda, name)(**x, output_final_state=True)
    assert len(served) == 3
    exact = expected(x)
    for actual, of_fla in zip(ours, theirs, strict=True):
        assert (actual.shape, actual.dtype, actual.device) == (of_fla.shape, of_fla.dtype, of_fla.device)
        assert actual.is_contiguous()
    assert error(ours[0], exact[0]) <= OUTPUT_BOUND
    assert error(ours[1], exact[1]) <= (STATE_BOUND if name == "chunk_kda" else STATE_BOUND_BY_TOKEN)
    without_state = getattr(fla_kda, name)(**x)
    assert without_state[1] is None and torch.equal(without_state[0], ours[0])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrence_is_as_exact_as_fla_s(dtype, served):
    """However many tokens there are, and in float32, too."""
    x = on_gpu(T=300, dtype=dtype)
    integration.register()
    o, state = fla_kda.fused_recurrent_kda(**x, output_final_state=True)
    exact = expected(x)
    assert served == ["fused_recurrent_kda_fwd"]
    assert error(o, exact[0]) <= (OUTPUT_BOUND if dtype == torch.bfloat16 else STATE_BOUND_BY_TOKEN)
    assert error(state, exact[1]) <= STATE_BOUND_BY_TOKEN


@needs_kernels
@pytest.mark.skipif(VERSION < (0, 6), reason="FLA 0.5.0 does not apply the sigmoid of beta")
def test_call_that_flash_kda_users_make(served):
    x = on_gpu(**ALL_IN_KERNEL, lower_bound=-5.0, safe_gate=True, transpose_state_layout=True)
    integration.register()
    with torch.inference_mode(), pytest.warns(DeprecationWarning, match="transpose_state_layout"):
        o, state = fla_kda.chunk_kda(**x, output_final_state=True)
    exact = expected(x)
    assert served == ["chunk_kda"]
    assert error(o, exact[0]) <= OUTPUT_BOUND and error(state, exact[1]) <= STATE_BOUND


@needs_kernels
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"K": 100}, "head dimensions are 100 and 128"),
        ({"V": 256}, "head dimensions are 128 and 256"),
        ({"dtype": torch.float32}, "`q` is float32"),
        ({"use_gate_in_kernel": True, "lower_bound": -9.0}, "`lower_bound` must be in [-5, 0]"),
        ({"return_intermediate_states": True}, "`return_intermediate_states` is not served"),
    ],
)
def test_what_the_kernels_refuse_fla_serves(change, reason, served, caplog):
    x = on_gpu(**change)
    with torch.inference_mode():
        theirs = fla_kda.chunk_kda(**x, output_final_state=True)
        integration.register()
        with caplog.at_level(logging.INFO):
            results = fla_kda.chunk_kda(**x, output_final_state=True)
    assert served == [] and reason in caplog.text and len(results) == len(theirs)
    for actual, of_fla in zip(results, theirs, strict=True):
        assert error(actual, of_fla.double()) < 1e-2


@needs_kernels
@pytest.mark.parametrize("through", ["fla", "kda_hf"])
def test_gradients_on_a_gpu(through, served):
    """They are FLA's, and kda_hf's own calls that go to FLA for them do not come back."""
    x = on_gpu(use_gate_in_kernel=True, N=None)
    x["v"].requires_grad_()
    integration.register()
    if through == "fla":
        o, _ = fla_kda.chunk_kda(**x)
    else:
        o, _ = ops.chunk_kda(**x)
    o.sum().backward()
    reference = {n: t.detach().double() for n, t in x.items() if isinstance(t, torch.Tensor)}
    reference["v"].requires_grad_()
    kda_reference(**reference, use_gate=True)[0].sum().backward()
    assert served == [] and error(x["v"].grad, reference["v"].grad) < 2e-2


@needs_kernels
@pytest.mark.skipif(VERSION < (0, 6), reason="kda_hf calls FLA 0.6")
def test_backend_fla_is_fla(served):
    x = on_gpu(**ALL_IN_KERNEL)
    integration.register()
    for op in (ops.chunk_kda, ops.recurrent_kda):
        o, _ = op(**x, backend="fla")
        assert error(o, expected(x)[0]) < 1e-2
    assert served == []


@needs_kernels
@pytest.mark.skipif(VERSION < (0, 6), reason="FLA 0.5 has no use_graph")
def test_graph(served):
    """A captured call serves other bounds."""
    x = on_gpu(**ALL_IN_KERNEL, T=200, N=3, cu_seqlens=bounds(0, 60, 130, 200))
    integration.register()
    call = partial(fla_kda.chunk_kda, **x, output_final_state=True, use_graph=True, max_num_seqs=3)
    with torch.no_grad():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, state = call()
    for values in ((0, 60, 130, 200), (0, 1, 200, 200), (0, 100, 150, 150)):
        x["cu_seqlens"].copy_(bounds(*values))
        graph.replay()
        exact = expected(x)
        assert error(o[:, : values[-1]], exact[0][:, : values[-1]]) <= OUTPUT_BOUND
        assert error(state, exact[1]) <= STATE_BOUND
    assert served == ["chunk_kda"] * 2


@needs_kernels
@pytest.mark.skipif(VERSION < (0, 6), reason="the model of FLA 0.5 is for an older transformers")
@pytest.mark.parametrize("options", [{}, {"num_v_heads": 4}, {"safe_gate": True, "lower_bound": -5.0, "head_dim": 64}])
def test_model_of_fla(options, served):
    """FLA's language model, unchanged: a prompt, with padding and without, and tokens after it."""
    from fla.models import KDAConfig, KDAForCausalLM

    sizes = {"hidden_size": 256, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 97, "head_dim": 128}
    model = KDAForCausalLM(KDAConfig(**sizes | options)).to("cuda", torch.bfloat16).eval()
    tokens = torch.randint(97, (2, 150), device="cuda")
    mask = torch.ones_like(tokens)
    mask[0, :70] = 0

    @torch.no_grad()
    def logits():
        results = [model(tokens, attention_mask=mask).logits[:, 70:]]
        prompt = model(tokens[:, :100], use_cache=True)
        cache = prompt.past_key_values
        results.append(prompt.logits)
        for t in range(100, 104):
            results.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
        return results

    theirs = logits()
    integration.register()
    ours = logits()
    assert served == ["chunk_kda"] * 4 + ["fused_recurrent_kda_fwd"] * 8
    for actual, of_fla in zip(ours, theirs, strict=True):
        assert error(actual, of_fla.double()) < 3e-2
    model.train()
    model(tokens, labels=tokens).loss.backward()
    assert len(served) == 12 and all(p.grad is not None for p in model.parameters())


@needs_kernels
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_what_the_extension_finds_too_large(name, monkeypatch):
    """Nothing that was accepted fails: another backend serves it, without a loop."""
    x = on_gpu(**ALL_IN_KERNEL, T=70)
    integration.register()
    for operator in ("chunk_kda", "recurrent_kda"):
        monkeypatch.setattr(integration.cuda, operator, lambda *_, **__: "`q` is too large")
    o, _ = getattr(fla_kda, name)(**x)
    assert error(o, expected(x)[0]) < 1e-2
