"""Prefill kernels, and the one that chooses tokens, as C++ on a CPU: tests/emulation in the place of instructions."""

import ctypes
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kda_hf.ops.reference import kda_reference


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "third_party"))
resolve = pytest.importorskip("resolve", reason="needs the source tree")
if resolve.nvcc() is None:
    pytest.skip("needs nvcc, which knows where CUDA's headers are", allow_module_level=True)

CHUNK, LOG2E = 64, 1.4426950408889634
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
GATES = {"given": 0, "safe": 1, "softplus": 2}


class Call(ctypes.Structure):
    """As in prefill.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "g", "beta", "out", "A_log", "dt_bias", "cu_seqlens")),
        *((name, ctypes.c_void_p) for name in ("initial_state", "final_state", "states", "workspace", "retention")),
        *((name, ctypes.c_void_p) for name in ("compositions", "flags", "ready", "progress")),
        *((name, ctypes.c_int) for name in ("B", "T", "H", "HV", "K", "V", "N", "dtype", "g_dtype", "gate")),
        *((name, ctypes.c_int) for name in ("halves", "segments", "sharers", "composed_chunks", "group_heads")),
        *((name, ctypes.c_float) for name in ("scale", "lower_bound")),
        *((name, ctypes.c_int) for name in ("use_qk_norm", "use_beta_sigmoid", "allow_neg_eigval", "state_v_first")),
        ("seed", ctypes.c_int),
    ]


def compiled(folder, name):
    library = folder / f"{name}.so"
    include = f"-iquote,{ROOT / 'tests' / 'emulation'},-iquote,{ROOT / 'csrc'}"
    try:
        cutlass = resolve.cutlass()
    except resolve.NotFound as error:
        pytest.skip(str(error))
    command = [
        resolve.nvcc(),
        "-x",
        "c++",
        "-std=c++20",
        "-O2",
        "--shared",
        "-Xcompiler",
        f"-fPIC,-w,-pthread,{include}",
    ]
    command += [f"-I{ROOT / 'tests' / 'emulation'}", f"-I{cutlass}", "-o", library]
    result = subprocess.run([*command, ROOT / "tests" / "emulation" / f"{name}.cpp"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    found = compiled(tmp_path_factory.mktemp("emulation"), "prefill")
    found.emulate_composition_bytes.restype = ctypes.c_int64
    return found


def inputs(dtype, K, V, gate, lengths, g_dtype, size, H=1, HV=2, T=130, **flags):
    """`size` of the gate: how steep it is where it is given, what is added to its bias else."""
    seed = torch.seed() % 2**31
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    B, T = (2, T) if lengths is None else (1, sum(lengths) + 3)
    x = {name: torch.randn(B, T, H, K).to(dtype) for name in ("q", "k")}
    x |= {"v": torch.randn(B, T, HV, V).to(dtype), "beta": torch.randn(B, T, HV).to(dtype)}
    x["g"] = torch.randn(B, T, HV, K).to(g_dtype or dtype)
    if gate == "given":
        x["g"] = (-x["g"].abs() * size).to(g_dtype or dtype)
    else:
        x |= {"A_log": torch.rand(HV) * 0.2, "dt_bias": torch.randn(HV, K) * 0.5 + size}
    if lengths is not None:
        x["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    x["scale"], x["lower_bound"], x["gate"] = K**-0.5, -5.0 if gate == "safe" else 0.0, gate
    return x | {"use_qk_norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": False} | flags


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def prepared(library, x, beside=False, **settings):
    """A call whose records are made, and the tensors that belong to it."""
    B, T, H, K = x["q"].shape
    HV, V, packed = x["v"].shape[2], x["v"].shape[3], "cu_seqlens" in x
    N = len(x["cu_seqlens"]) - 1 if packed else B
    call = Call(B=B, T=T, H=H, HV=HV, K=K, V=V, N=N, dtype=DTYPES[x["q"].dtype], g_dtype=DTYPES[x["g"].dtype])
    call.gate = GATES[x["gate"]]
    names = ("scale", "lower_bound", "use_qk_norm", "use_beta_sigmoid", "allow_neg_eigval")
    for name, value in {
        **{name: x[name] for name in names},
        "segments": 1,
        "sharers": 1,
        "group_heads": HV,
        **settings,
    }.items():
        setattr(call, name, value)
    tensors = {name: y for name, y in x.items() if isinstance(y, torch.Tensor)}
    call.cu_seqlens = tensors["cu_seqlens"].data_ptr() if packed else None
    at = ctypes.byref(call)
    slots = library.emulate_slots(at)

    def room(size):  # of any content
        return torch.full((size + 256,), 0xFF, dtype=torch.uint8)

    tensors |= {"out": torch.full_like(x["v"], float("nan")), "retention": nan(2, HV, slots)}
    tensors |= {"workspace": room(slots * HV * library.emulate_record_bytes(at))}
    tensors |= {"compositions": room(library.emulate_composition_bytes(at))}
    tensors |= {"flags": torch.full((HV * N * call.segments * 2,), -1, dtype=torch.int32)}
    if beside:  # where CTAs of `prepare` take one chunk after the other
        tensors |= {"ready": torch.zeros(slots * HV, dtype=torch.int32), "progress": torch.zeros(3, dtype=torch.int32)}
    for name, tensor in tensors.items():
        aligned = name in ("workspace", "compositions")
        setattr(call, name, tensor.data_ptr() + (-tensor.data_ptr() % 256 if aligned else 0))
    if call.segments == 1:
        call.retention = None
    if call.composed_chunks == 0:
        call.flags = None
    library.emulate_prepare(at)
    assert not beside or (tensors["progress"] == torch.tensor([slots * HV + 3, 0, 3])).all()
    return call, tensors


def emulated(library, x, beside=False, **settings):
    """Records of each sequence, a list of chunks each, and, unless side by side, how much they keep of a state."""
    call, tensors = prepared(library, x, beside, segments=1 if beside else 2, **settings)
    N, T, HV, K, V = call.N, call.T, call.HV, call.K, call.V
    out, retention, packed = tensors["out"], tensors["retention"], "cu_seqlens" in x

    def record(slot, head):
        made = {name: nan(CHUNK, K) for name in ("W", "Kr", "Q")}
        made |= {"U": nan(CHUNK, V), "P": torch.zeros(CHUNK, CHUNK)}
        made |= {"decay": nan(K), "scale": nan(CHUNK)}
        order = (made[name].data_ptr() for name in ("W", "U", "Kr", "Q", "P", "decay", "scale"))
        library.emulate_record(ctypes.byref(call), slot, head, *map(ctypes.c_void_p, order))
        return made | {"retention": retention[: V // 64, head, slot].clone()}

    first = [library.emulate_first_slot(ctypes.byref(call), n) for n in range(N)]
    lengths = x["cu_seqlens"].diff().tolist() if packed else [T] * N
    records = [
        [[record(first[n] + c, head) for head in range(HV)] for c in range((length + CHUNK - 1) // CHUNK)]
        for n, length in enumerate(lengths)
    ]
    return records, out


def exact(x, n, chunk, head):
    """The record of a chunk by the formulas of record.cuh, in float64."""
    packed = "cu_seqlens" in x
    start, end = x["cu_seqlens"][n : n + 2].tolist() if packed else (0, x["q"].shape[1])
    start, batch = start + chunk * CHUNK, 0 if packed else n
    rows, group = slice(start, min(start + CHUNK, end)), x["v"].shape[2] // x["q"].shape[2]

    def of(name, head):
        part = x[name][batch, rows, head].double()
        return torch.cat([part, part.new_zeros(CHUNK - len(part), *part.shape[1:])])

    q, k, v, beta, g = of("q", head // group), of("k", head // group), of("v", head), of("beta", head), of("g", head)
    valid = torch.arange(CHUNK) < rows.stop - rows.start
    if x["gate"] != "given":
        rate, biased = x["A_log"][head].double().exp(), g + x["dt_bias"][head].double()
        if x["gate"] == "safe":
            g = x["lower_bound"] * (rate * biased).sigmoid()
        else:
            g = -rate * torch.nn.functional.softplus(biased)
    g = g * valid[:, None]
    if x["use_beta_sigmoid"]:
        beta = beta.sigmoid() * (2 if x["allow_neg_eigval"] else 1)
    beta = beta * valid
    lengths = [(y.pow(2).sum(-1) + (1e-6 if x["use_qk_norm"] else 1e-300)).sqrt() for y in (q, k)]
    q, k = q / lengths[0][:, None], k / lengths[1][:, None]
    m, length = (torch.ones(CHUNK).double(),) * 2 if x["use_qk_norm"] else lengths
    G = g.cumsum(0)
    between = (G[:, None] - G[None]).clamp(max=0).exp()
    A = torch.einsum("id,jd,ijd->ij", k, k, between).tril(-1) * (beta * length**2)[:, None]
    X = torch.linalg.inv(torch.eye(CHUNK).double() + A)
    longest = torch.maximum(torch.ones(()), (1 - beta * length**2).abs()).log2()
    return {
        "W": X @ ((beta * length**2)[:, None] * k * G.exp()),
        "U": X @ ((beta * length)[:, None] * v),
        "Kr": k * (G[-1] - G).exp(),
        "Q": q * G.exp(),
        "P": torch.einsum("id,jd,ijd->ij", q, k, between).tril(),
        "decay": G[-1].exp(),
        "scale": x["scale"] * m * valid,
        "retention": ((g.max(-1).values * LOG2E + longest) * valid).sum().expand(x["v"].shape[3] // 64),
    }, valid


# A log-decay is rounded to fp16, by 2^-11 of itself at most, which is 4.9e-4.
BOUNDS = {"W": 7e-4, "U": 4e-4, "Kr": 5e-4, "Q": 5e-4, "P": 6e-4, "decay": 5e-4, "scale": 1e-6, "retention": 1e-3}


def errors_of(records, x, relative_error):
    """
    The error of each part of the records, over all of them: one chunk's part may be a few numbers that nearly cancel.

    For decays it is the largest error of a logarithm, in parts of it: what is left of a state after a steep chunk may
    be a few small numbers, whose own relative error is that of the logarithm times the logarithm.
    """
    actual, expected = ({name: [] for name in BOUNDS} for _ in range(2))
    for n, sequence in enumerate(records):
        for chunk, heads in enumerate(sequence):
            for head, record in enumerate(heads):
                exactly, valid = exact(x, n, chunk, head)
                for name in BOUNDS:
                    actual[name].append((record[name] * valid if name == "scale" else record[name]).flatten())
                    expected[name].append(exactly[name].flatten())
    actual, expected = ({name: torch.cat(parts) for name, parts in side.items()} for side in (actual, expected))
    errors = {name: relative_error(actual[name], expected[name]) for name in BOUNDS if name != "decay"}
    logs, exact_logs = (side["decay"].double().clamp_min(2.0**-100).log() for side in (actual, expected))
    of_logs = (logs - exact_logs).abs() / (exact_logs.abs() + 0.004)  # and 2e-6 for fp32
    return errors | {"decay": of_logs.max().item()}


CASES = {
    "safe": (torch.bfloat16, 128, 128, "safe", 0.0, None),
    "safe, mild": (torch.bfloat16, 128, 128, "safe", -6.5, None),
    "safe, fp16, fp32 gate, V = 64": (torch.float16, 128, 64, "safe", 0.0, torch.float32),
    "softplus, K = 64": (torch.bfloat16, 64, 128, "softplus", -2.0, None),
    "given": (torch.float16, 128, 128, "given", 1.0, None),
    "given, steep": (torch.float16, 128, 128, "given", 30.0, None),  # beyond what factors of a block can have
    "given, mild, fp32, 64": (torch.bfloat16, 64, 64, "given", 0.01, torch.float32),
}


@pytest.mark.parametrize("lengths", [None, [70, 0, 65, 1, 5]], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("case", "beside"),
    [(case, beside) for case, (_, K, *_) in CASES.items() for beside in (False, True) if K == 128 or not beside],
)
def test_records(emulation, relative_error, case, beside, lengths):
    dtype, K, V, gate, size, g_dtype = CASES[case]
    x = inputs(dtype, K, V, gate, lengths, g_dtype, size)
    records, out = emulated(emulation, x, beside, **({"group_heads": 1} if beside else {}))
    errors = errors_of(records, x, relative_error)
    for name, bound in BOUNDS.items():
        if name != "retention" or not beside:
            assert errors[name] < bound, name
    if lengths is not None:
        assert (out[0, sum(lengths) :] == 0).all()  # tokens of no sequence
        assert out[0, : sum(lengths)].isnan().all()


@pytest.mark.parametrize("gate", ["safe", "softplus"])
def test_lengths_that_are_not_normed(emulation, relative_error, gate):
    x = inputs(torch.float16, 128, 128, gate, None, None, -3.0, H=2, use_qk_norm=False, use_beta_sigmoid=False)
    x["q"], x["k"], x["beta"] = x["q"] * 3, x["k"] / 16, x["beta"].sigmoid()
    records, _ = emulated(emulation, x)
    errors = errors_of(records, x, relative_error)
    for name, bound in BOUNDS.items():
        assert errors[name] < bound, name


def flat(records):
    return [record for sequence in records for heads in sequence for record in heads]


@pytest.mark.parametrize("beside", [False, True], ids=["", "beside"])
def test_the_order_of_threads_does_not_matter(emulation, beside):
    x = inputs(torch.bfloat16, 128, 128, "safe", [70, 0, 65], None, 0.0)
    names = [name for name in BOUNDS if name != "scale" and not (beside and name == "retention")]
    expected, _ = emulated(emulation, x, seed=1)
    for seed in range(2, 6):
        actual, _ = emulated(emulation, x, beside=beside, seed=seed)
        for record, other in zip(flat(actual), flat(expected), strict=True):
            assert all(torch.equal(record[name], other[name]) for name in names)


# dtype, K, V, gate and its size, lengths or tokens of two sequences, and how the chains are carried.
CHAINS = {
    "both halves": (torch.bfloat16, 128, 128, "safe", -3.0, 200, {"halves": 2}),
    "one half, clusters": (torch.bfloat16, 128, 128, "safe", 0.0, [70, 0, 129], {"halves": 1, "sharers": 2}),
    "K = V = 64": (torch.float16, 64, 64, "softplus", -2.0, [1, 64, 65], {"halves": 1}),
    "shared by two": (torch.bfloat16, 128, 128, "safe", -6.5, [500, 70, 0], {"halves": 1, "segments": 2}),
    "forgotten": (torch.bfloat16, 128, 128, "safe", 1.0, [1100, 64], {"halves": 1, "segments": 3, "sharers": 2}),
    "composed": (
        torch.bfloat16, 128, 128, "safe", -6.5, [960, 70, 3],
        {"halves": 1, "segments": 4, "sharers": 2, "composed_chunks": 4},
    ),
    "composed, V = 64": (
        torch.float16, 128, 64, "given", 0.01, [900], {"halves": 1, "segments": 3, "composed_chunks": 4}
    ),
    "side by side": (torch.bfloat16, 128, 128, "safe", -3.0, [70, 0, 129], {"halves": 2, "beside": True}),
    "side by side, a head at a time": (
        torch.bfloat16, 128, 128, "safe", -3.0, 200,
        {"halves": 1, "sharers": 2, "beside": True, "group_heads": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_prefill(emulation, relative_error, case):
    dtype, K, V, gate, size, tokens, settings = CHAINS[case]
    lengths, T = (tokens, 0) if isinstance(tokens, list) else (None, tokens)
    x = inputs(dtype, K, V, gate, lengths, None, size, T=T)
    N, HV, v_first = len(lengths or (1, 2)), 2, "composed" not in case
    states = nan(
        *((sum(lengths) // CHUNK + N,) if lengths else (N * -(-T // CHUNK),)), HV, *((V, K) if v_first else (K, V))
    )
    y = {"initial_state": torch.randn(N, *states.shape[1:]), "final_state": nan(N, *states.shape[1:])}
    y |= {"states": states} if case in ("both halves", "one half, clusters", "composed") else {}
    call, tensors = prepared(emulation, x | y, state_v_first=v_first, **settings)
    emulation.emulate_recurrence(ctypes.byref(call))
    flags = {name: x[name] for name in ("scale", "use_qk_norm", "use_beta_sigmoid", "allow_neg_eigval")}
    given = {name: x[name] for name in ("A_log", "dt_bias", "cu_seqlens") if name in x}
    o, final, between = kda_reference(
        *(x[name].double() for name in ("q", "k", "v", "g", "beta")), y["initial_state"].double(), **given, **flags,
        lower_bound=x["lower_bound"] if gate == "safe" else None, use_gate=gate != "given", state_v_first=v_first,
    )  # fmt: skip
    last = sum(lengths) if lengths else T
    assert relative_error(tensors["out"][:, :last], o[:, :last]) < (3e-3 if dtype == torch.bfloat16 else 1e-3)
    assert relative_error(y["final_state"], final) < 1.5e-3
    if "states" in y:
        assert (
            relative_error(
                states[: between[0].numel() // states[0].numel() if lengths else None], between.flatten(0, 1)
            )
            < 1.5e-3
        )


# ------------------------------------------------------------------------------------------------- the choice of tokens


class Choice(ctypes.Structure):
    """As in choose.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "noise", "pad", "eos", "unfinished", "tokens")),
        ("top_p", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("inverse_temperature", "min_p")),
        *((name, ctypes.c_int) for name in ("B", "V", "dtype", "top_k", "eos_count", "seed")),
    ]


@pytest.fixture(scope="module")
def choosing(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("choosing"), "choose")


def choose(library, logits, noise=None, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, seed=1, **tensors):
    """Tokens, into a buffer that held none. `tensors`: pad, eos, unfinished."""
    B, V = logits.shape
    tensors = {"unfinished": torch.ones(B, dtype=torch.bool), "logits": logits, "noise": noise} | tensors
    tensors |= {"tokens": torch.full((B,), -7)}
    at = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
    numbers = {"inverse_temperature": 1 / temperature, "top_k": top_k or V, "top_p": top_p, "min_p": min_p}
    eos = len(tensors["eos"]) if "eos" in tensors else 0
    choice = Choice(B=B, V=V, dtype=DTYPES[logits.dtype], eos_count=eos, seed=seed, **at, **numbers)
    library.emulate_choice(ctypes.byref(choice))
    return tensors["tokens"]


def kept(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Which tokens transformers' processors leave of `[V]`, with a sort that leaves equals in their order."""
    scores = logits.double() / temperature
    if top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -float("inf"))
    if top_p < 1:
        ordered, places = scores.sort(stable=True)
        removed = ordered.softmax(0).cumsum(0) <= 1 - top_p
        removed[-1] = False
        scores = scores.masked_fill(torch.zeros_like(removed).scatter(0, places, removed), -float("inf"))
    probabilities = scores.softmax(0)
    return scores.isfinite() & (probabilities >= min_p * probabilities.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 5, 97, 1031])
def test_the_largest_is_chosen(choosing, dtype, V):
    logits = torch.randn(2, V).mul(2).round().add(0.0).to(dtype)
    assert torch.equal(choose(choosing, logits), logits.argmax(1))
    logits[1, V - 1] = float("nan")
    assert choose(choosing, logits)[1] == V - 1


@pytest.mark.parametrize(
    "dtype, filters",
    [
        (torch.float32, {"top_k": 17}),
        (torch.float16, {"top_p": 0.7}),
        (torch.bfloat16, {"min_p": 0.1}),
        (torch.bfloat16, {"temperature": 2.0, "top_k": 60, "top_p": 0.9, "min_p": 0.02}),
    ],
    ids=str,
)
@pytest.mark.parametrize("rounds", [True, False])
def test_filters_cut_where_they_should(choosing, dtype, filters, rounds):
    """Those next to the cut, on both sides, have the smallest noise in turn: each is drawn if it is kept."""
    logits = torch.randn(600).mul(2)
    logits = (logits.mul(2).round().div(2) if rounds else logits).to(dtype)
    logits[5:9] = -float("inf")
    is_kept = kept(logits, **filters)
    order = logits.float().sort(stable=True).indices
    first = int(is_kept[order].nonzero()[0])  # of those that are kept
    targets = order[first - 1 : first + 2]
    noise = torch.full((len(targets), 600), 1e6).scatter(1, targets[:, None], 1e-6)
    tokens = choose(choosing, logits.expand(len(targets), -1).contiguous(), noise, **filters)
    assert torch.equal(tokens == targets, is_kept[targets])


def test_a_draw_does_not_depend_on_the_order_of_threads(choosing):
    logits, noise = torch.randn(2, 3000).mul(2), torch.empty(2, 3000).exponential_()
    filters = {"temperature": 0.8, "top_k": 90, "top_p": 0.9}
    left = torch.stack([kept(row, **filters) for row in logits])
    expected = ((logits / 0.8).masked_fill(~left, -float("inf")).softmax(1) / noise).argmax(1)
    for seed in range(2):
        assert torch.equal(choose(choosing, logits, noise, seed=seed, **filters), expected)


def test_rows_that_have_finished(choosing):
    logits = torch.nn.functional.one_hot(torch.tensor([3, 4, 5]), 40).float()
    unfinished = torch.tensor([True, False, True])
    ends = {"pad": torch.tensor([9]), "eos": torch.tensor([5, 30]), "unfinished": unfinished}
    assert choose(choosing, logits, **ends).tolist() == [3, 9, 5]
    assert unfinished.tolist() == [True, False, False]
