"""The kernel that chooses tokens, against transformers' processors and torch's draw."""

import os
import subprocess
import sys

import pytest
import test_fwd
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kda_hf import decode_loop
from kda_hf.ops import sampling


DEVICE = torch.device("cuda")


pytestmark = test_fwd.pytestmark

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 100_000},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 3.0, "top_k": 300, "top_p": 0.99},
    {"temperature": 0.01, "top_p": 0.5},
]


@pytest.fixture(autouse=True)
def seed():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def call(logits, noise=None, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, pad=None, eos=None, unfinished=None):
    """Tokens, into a buffer that held none."""
    tokens = torch.full((len(logits),), -7, dtype=torch.long, device=logits.device)
    if unfinished is None:
        unfinished = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    top_k = top_k or logits.shape[-1]
    torch.ops.kda_hf_cuda.choose_tokens(logits, noise, temperature, top_k, top_p, min_p, pad, eos, unfinished, tokens)
    return tokens


def processors(temperature=None, top_k=None, top_p=None, min_p=None):
    made = LogitsProcessorList()
    if temperature is not None:
        made.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        made.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        made.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        made.append(MinPLogitsWarper(min_p))
    return made


def draw(scores, noise):
    """What `torch.multinomial` makes of it."""
    return (torch.softmax(scores, dim=-1) / noise).argmax(dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, V", [(1, 1), (3, 5), (2, 97), (1, 4096), (33, 4097), (1, 32768), (5, 163840), (2, 2**18)])
def test_the_largest(dtype, B, V):
    whole = torch.full((B, V + 3), float("inf"), device=DEVICE, dtype=dtype)
    logits = whole[:, 1 : V + 1]
    logits.copy_(torch.randn(B, V, device=DEVICE).mul(4).round().div(2).add(0.0))  # many equals, and no -0.0
    assert torch.equal(call(logits), torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits]))
    logits[:, V // 2 :] = -float("inf")
    logits[:, : V // 2] = -3e4
    assert call(logits).tolist() == [0] * B
    logits[:] = -float("inf")
    assert call(logits).tolist() == [0] * B
    logits[:, V - 1] = float("nan")
    assert call(logits).tolist() == [V - 1] * B  # as torch's argmax


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("V", [97, 32768, 163840])
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws(dtype, V, filters):
    """The same as by processors and torch, with the same random numbers."""
    logits = torch.randn(16, V, device=DEVICE).mul(2).to(dtype)
    noise = torch.empty(16, V, device=DEVICE).exponential_()
    expected = processors(**filters)(None, logits.float())
    tokens = call(logits, noise, **filters)
    quotients = torch.softmax(expected, dim=-1) / noise
    rounding = 1e-5
    assert (quotients.gather(1, tokens[:, None])[:, 0] >= quotients.amax(1) * (1 - rounding)).all()
    assert torch.equal(tokens, call(logits, noise, **filters))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("V", [1500, 6000])
@pytest.mark.parametrize("rounds", [True, False])
def test_what_filters_keep(filters, V, rounds):
    """Each token in turn has the smallest noise: it is drawn if it is kept. With few values, many are equal."""
    logits = torch.randn(V, device=DEVICE).mul(3)
    logits = logits.mul(2).round().div(2) if rounds else logits
    logits[7:19] = -float("inf")
    noise = torch.full((V, V), 1e6, device=DEVICE).fill_diagonal_(1e-6)
    kept = call(logits.expand(V, V).contiguous(), noise, **filters) == torch.arange(V, device=DEVICE)
    expected = processors(**filters)(None, logits[None])[0]
    # The sum of probabilities at which `top_p` cuts may be within rounding of it.
    is_near = torch.zeros(V, dtype=torch.bool, device=DEVICE)
    if "top_p" in filters:
        before = {name: value for name, value in filters.items() if name in ("temperature", "top_k")}
        scores, places = processors(**before)(None, logits[None])[0].double().sort(stable=True)
        is_near[places[(scores.softmax(0).cumsum(0) - (1 - filters["top_p"])).abs() < 2e-6]] = True
        assert is_near.sum() < 4
    # Of others than the most likely, none is drawn with these numbers.
    is_likely = (logits - logits.max()) / filters.get("temperature", 1.0) > -27
    checked = ~is_near & is_likely
    assert checked.any() and torch.equal(kept[checked], expected.isfinite()[checked])
    assert not kept[7:19].any() and kept[expected.argmax()]


def test_one_that_is_not_random():
    """Frequencies of a draw are the probabilities."""
    logits = torch.tensor([0.0, 1.0, -1.0, 3.0, -float("inf"), 2.0], device=DEVICE)
    rows_ = logits.expand(200_000, 6).contiguous()
    tokens = call(rows_, torch.empty_like(rows_).exponential_(), top_k=4)
    scores = TopKLogitsWarper(4)(None, logits[None])[0]
    frequencies = torch.bincount(tokens, minlength=6) / len(tokens)
    torch.testing.assert_close(frequencies, scores.softmax(0), rtol=0, atol=5e-3)


def test_rows_that_finish():
    logits = torch.zeros(5, 40, device=DEVICE)
    logits[torch.arange(5), torch.tensor([3, 4, 5, 6, 7])] = 1.0
    unfinished = torch.tensor([True, False, True, True, False], device=DEVICE)
    pad, eos = torch.tensor(9, device=DEVICE), torch.tensor([5, 30, 6], device=DEVICE)
    assert call(logits, pad=pad, eos=eos, unfinished=unfinished).tolist() == [3, 9, 5, 6, 9]
    assert unfinished.tolist() == [True, False, False, False, False]
    assert call(logits, pad=pad, eos=eos, unfinished=unfinished).tolist() == [3, 9, 9, 9, 9]
    eos[0] = 9  # padding may be an end, too
    assert call(logits, torch.ones_like(logits), pad=pad, eos=eos, unfinished=unfinished, top_k=1).tolist()[0] == 3
    assert unfinished.tolist() == [True, False, False, False, False]


def test_a_graph_can_capture_it():
    logits = torch.randn(2, 1000, device=DEVICE)
    noise = torch.ones_like(logits)
    tokens, unfinished = torch.zeros(2, dtype=torch.long, device=DEVICE), torch.ones(2, dtype=torch.bool, device=DEVICE)
    arguments = (logits, noise, 1.0, 10, 0.5, 0.0, None, None, unfinished, tokens)
    torch.ops.kda_hf_cuda.choose_tokens(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.kda_hf_cuda.choose_tokens(*arguments)
    logits.neg_()
    graph.replay()
    assert torch.equal(tokens, logits.argmax(1))


def test_the_generator():
    """`KernelChoice` draws what `Choice` draws, and leaves the generator where that leaves it."""
    choice = decode_loop.Choice(list(processors(temperature=0.9, top_k=40, top_p=0.9)), True, None, None)
    logits, results = torch.randn(4, 5000, device=DEVICE), []
    own = decode_loop.KernelChoice.of(choice, logits)
    for in_kernel in (True, False):
        torch.manual_seed(5)
        unfinished = torch.ones(4, dtype=torch.bool, device=DEVICE)
        scores = None if in_kernel else choice.scores(None, logits)
        tokens = own(None, logits, unfinished) if in_kernel else choice.tokens(scores, unfinished)[0]
        results.append((tokens, torch.cuda.get_rng_state()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_to_draw_from_are_finite(value):
    """As with `torch.multinomial`, an assertion on the GPU. In a process of its own, which it ends."""
    script = (
        "import torch, kda_hf\n"
        f"logits = torch.full((2, 3000), float('{value}'), device='cuda')\n"
        "logits[0] = 0\n"
        "logits[1, 17:] = -1.0 if not logits[1, 0] < 0 else logits[1, 17:]\n"
        "tokens = torch.zeros(2, dtype=torch.long, device='cuda')\n"
        "rows = torch.ones(2, dtype=torch.bool, device='cuda')\n"
        "args = (torch.ones_like(logits), 1.0, 5, 1.0, 0.0, None, None, rows, tokens)\n"
        "torch.ops.kda_hf_cuda.choose_tokens(logits, *args)\n"
        "torch.cuda.synchronize()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0 and "scores are finite" in result.stderr + result.stdout, result.stderr[-2000:]
    assert "device-side assert" in result.stderr


@pytest.mark.parametrize(
    "change, name",
    [
        ({"logits": lambda: torch.zeros(3, device=DEVICE)}, "logits"),
        ({"logits": lambda: torch.zeros(2, 40, device=DEVICE, dtype=torch.float64)}, "logits"),
        ({"logits": lambda: torch.zeros(40, 2, device=DEVICE).t()}, "logits"),
        ({"logits": lambda: torch.zeros(2, sampling.MOST_TOKENS + 1, device=DEVICE)}, "logits"),
        ({"noise": lambda: torch.ones(2, 41, device=DEVICE)}, "noise"),
        ({"noise": lambda: torch.ones(2, 40, device=DEVICE, dtype=torch.bfloat16)}, "noise"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"pad": lambda: torch.zeros(2, dtype=torch.long, device=DEVICE)}, "pad"),
        ({"eos": lambda: torch.zeros(2, dtype=torch.int, device=DEVICE)}, "eos"),
        ({"unfinished": lambda: torch.ones(3, dtype=torch.bool, device=DEVICE)}, "unfinished"),
        ({"unfinished": lambda: torch.ones(2, dtype=torch.bool)}, "device"),
    ],
)
def test_refusals(change, name):
    arguments = {"logits": torch.zeros(2, 40, device=DEVICE)} | {
        key: value() if callable(value) else value for key, value in change.items()
    }
    with pytest.raises(RuntimeError, match=f"kda_hf refuses: .*{name}"):
        call(**arguments)
