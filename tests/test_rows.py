"""What a decode step has beside KDA, by kernels: products of few rows, norms, SwiGLU and attention, against float64."""

import itertools
import os

import pytest
import test_fwd
import torch
import torch.nn.functional as F

from kda_hf.ops import rows
from kda_hf.ops.norm import gated_norm


DEVICE = torch.device("cuda")


pytestmark = test_fwd.pytestmark

DTYPES = [torch.bfloat16, torch.float16]
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # relative L2 of what is rounded two or three times
EPS = 1e-6
OURS, TORCH = rows.KernelRows(), rows.TorchRows()


@pytest.fixture(autouse=True)
def seed():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def randn(*shape, dtype=torch.float32, scale=1.0):
    made = (torch.randn(*shape, device=DEVICE) * scale).to(dtype)
    torch.cuda.synchronize()  # a weight must not be what the kernel right before a product writes
    return made


def within(*shape, dtype):
    """A matrix that is part of a wider one, with NaN around it."""
    whole = torch.full((shape[0], shape[1] + 32), float("nan"), device=DEVICE, dtype=dtype)
    whole[:, 16:-16] = randn(*shape)
    return whole[:, 16:-16]


def exact_norm(x, norm):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + norm[1]).sqrt() * norm[0].double()


# Rows, columns: of small models and large ones, no multiples of tiles, fewer than a warp has, more than fit at once.
WEIGHTS = [
    (2048, 2048),
    (6432, 2048),
    (40, 672),
    (33, 264),
    (2048, 5632),
    (256, 8),
    (128, 128),
    (64, 14336),
    (32768, 640),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16, 17, 32, 33])
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_products(relative_error, dtype, M, shape):
    N, K = shape
    x, weight, norm = within(M, K, dtype=dtype), randn(N, K, dtype=dtype, scale=K**-0.5), (randn(K, dtype=dtype), EPS)
    residual = randn(M, N, dtype=dtype)
    plain, normed = x.double() @ weight.double().T, exact_norm(x, norm) @ weight.double().T
    before = [y.clone() for y in (x, weight, norm[0], residual)]
    assert relative_error(OURS.product(x, weight), plain) < BOUNDS[dtype]
    assert relative_error(OURS.product(x, weight, norm), normed) < BOUNDS[dtype]
    assert torch.equal(OURS.product(x, weight, norm), OURS.product(x, weight, norm))
    for own, old in zip((x, weight, norm[0], residual), before, strict=True):
        assert torch.equal(own, old)
    assert relative_error(OURS.product(x, weight, residual=residual.clone()), plain + residual.double()) < BOUNDS[dtype]
    assert relative_error(OURS.product(x, weight, norm, residual.clone()), normed + residual.double()) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [8, 9, 16, 17, 32, 33])
@pytest.mark.parametrize("shape", [(2048, 5632), (2048, 2048), (4096, 512), (264, 328), (8, 64), (16384, 128)], ids=str)
def test_what_a_product_leaves_for_the_norm(relative_error, dtype, M, shape):
    """The norm of a sum, for a product and for SwiGLU, made of what the kernel of the sum leaves, and without it."""
    N, K = shape
    ours = rows.KernelRows()
    y, weight, residual = within(M, K, dtype=dtype), randn(N, K, dtype=dtype, scale=K**-0.5), randn(M, N, dtype=dtype)
    norm, following = (1 + randn(N, scale=0.3).to(dtype), EPS), randn(192, N, dtype=dtype, scale=N**-0.5)
    other = (norm[0].clone(), EPS)
    x = ours.product(y, weight, residual=residual.clone(), next_norm=norm)
    assert torch.equal(x, OURS.product(y, weight, residual=residual.clone()))
    assert (ours.left is not None) == (8 < M <= 32 and dtype == torch.bfloat16)
    if ours.left is not None:
        squares = ours.left[3].double().sum(1)
        assert relative_error(squares, x.double().pow(2).sum(1)) < 1e-5
        assert torch.equal(ours.left[2], (x.float() * norm[0].float()).to(dtype))
    expected = exact_norm(x, norm) @ following.double().T
    assert relative_error(ours.product(x, following, norm), expected) < BOUNDS[dtype]
    assert ours.left is None
    x = ours.product(y, weight, residual=residual.clone(), next_norm=norm)
    gate, up = expected.chunk(2, 1)
    assert relative_error(ours.swiglu(x, following, norm), F.silu(gate) * up) < 2 * BOUNDS[dtype]
    # Of another norm, or after another sum in the same place, it is not used.
    x = ours.product(y, weight, residual=residual.clone(), next_norm=norm)
    assert relative_error(ours.product(x, following, other), expected) < BOUNDS[dtype]
    x = ours.product(y, weight, residual=residual.clone(), next_norm=norm)
    x = ours.product(y, weight, residual=x)
    assert relative_error(ours.product(x, following, norm), exact_norm(x, norm) @ following.double().T) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("size", [3e-4, 3e4])
def test_norm_of_large_and_small_rows(relative_error, dtype, M, size):
    """As far as the dtype reaches, where a product with the norm's weight may not fit it any more."""
    x, norm = (randn(M, 512).clamp(-2, 2) * size).to(dtype), ((4 + randn(512)).to(dtype), EPS)
    weight = randn(2 * 64, 512, dtype=dtype, scale=512**-0.5 / 8)
    expected = exact_norm(x, norm) @ weight.double().T
    gate, up = expected.chunk(2, 1)
    assert relative_error(OURS.product(x, weight, norm), expected) < BOUNDS[dtype]
    assert relative_error(OURS.swiglu(x, weight, norm), F.silu(gate) * up) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 8, 9, 16, 17, 32])
def test_rows_do_not_meet(dtype, M):
    """A row's result does not depend on the others, NaN as they may be."""
    x, weight, norm = randn(M, 512, dtype=dtype), randn(96, 512, dtype=dtype), (randn(512, dtype=dtype), EPS)
    expected = OURS.product(x, weight, norm)
    for row in range(M):
        others = x.clone()
        others[torch.arange(M, device=DEVICE) != row] = float("nan")
        actual = OURS.product(others, weight, norm)
        assert torch.equal(actual[row], expected[row]) and actual.isnan().sum() == (M - 1) * 96


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 5, 8, 9, 16, 31, 33])
@pytest.mark.parametrize("shape", [(5632, 2048), (672, 256), (40, 264), (96, 4096)], ids=str)
def test_swiglu(relative_error, dtype, M, shape):
    N, K = shape
    x, weight, norm = (
        within(M, K, dtype=dtype),
        randn(2 * N, K, dtype=dtype, scale=K**-0.5),
        (randn(K, dtype=dtype), EPS),
    )
    gate, up = (exact_norm(x, norm) @ weight.double().T).chunk(2, 1)
    assert relative_error(OURS.swiglu(x, weight, norm), F.silu(gate) * up) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 3, 8, 16, 17, 32, 33])
@pytest.mark.parametrize("shape", [(2048, 128), (256, 64), (64, 1024)], ids=str)
def test_groups(relative_error, dtype, M, shape):
    N, K = shape
    x, weight = within(M, 2 * K, dtype=dtype), randn(2 * N, K, dtype=dtype, scale=K**-0.5)
    for own, *pair in zip(OURS.grouped(x, weight, 2), x.chunk(2, 1), weight.chunk(2), strict=True):
        assert relative_error(own, pair[0].double() @ pair[1].double().T) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [8, 264, 2048, 5120, 16384])
def test_norm(relative_error, dtype, N):
    norm = (randn(N, dtype=dtype), EPS)
    for M in (1, 33):
        x = within(M, N, dtype=dtype)
        assert relative_error(OURS.norm(x, norm), exact_norm(x, norm)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [64, 128, 256])
@pytest.mark.parametrize("M", [1, 7, 16, 33, 1000])
def test_gated_norm(relative_error, dtype, N, M):
    weight, eps = randn(N, dtype=dtype), EPS
    x, gate = randn(M, N, dtype=dtype, scale=3.0), randn(M, N, dtype=dtype, scale=4.0)
    expected = exact_norm(x, (weight, eps)) * gate.double().sigmoid()
    out = torch.full((M + 1, N), float("nan"), device=DEVICE, dtype=dtype)
    torch.ops.kda_hf_cuda.gated_rms_norm(x, weight, gate, eps, out[:M])
    assert relative_error(out[:M], expected) < BOUNDS[dtype]
    assert out[M].isnan().all()

    with torch.no_grad():
        heads = gated_norm(x.view(1, M, 1, N), weight, gate.view(1, M, 1, N), eps)
    assert torch.equal(heads.view(M, N), out[:M])


@pytest.mark.parametrize("what", ["width", "gate", "dtype", "device", "strides", "gradients"])
def test_what_the_gated_norm_leaves_to_others(what):
    dtype = DTYPES[0]
    x, weight, gate = randn(5, 128, dtype=dtype), randn(128, dtype=dtype), randn(5, 128, dtype=dtype)
    given = {
        "width": (x[:, :96].contiguous(), weight[:96].contiguous(), gate[:, :96].contiguous()),
        "gate": (x, weight, gate.float()),
        "dtype": (x.float(), weight.float(), gate.float()),
        "device": (x.cpu(), weight.cpu(), gate.cpu()),
        "strides": (x.T.contiguous().T, weight, gate),
        "gradients": (x, weight, gate),
    }[what]
    with torch.set_grad_enabled(what == "gradients"):
        assert gated_norm(*given, EPS) is None
    with pytest.raises(RuntimeError):
        torch.ops.kda_hf_cuda.gated_rms_norm(x, weight, gate[:4], EPS, torch.empty_like(x))


@pytest.mark.parametrize("what", ["rows", "columns", "dtype", "device", "groups", "norm", "outputs", "parts", "next"])
def test_what_the_products_refuse(what):
    x, weight, out = randn(2, 64, dtype=DTYPES[0]), randn(64, 64, dtype=DTYPES[0]), randn(2, 64, dtype=DTYPES[0])
    many, many_out = randn(9, 64, dtype=DTYPES[0]), randn(9, 64, dtype=DTYPES[0])
    arguments = {
        "rows": {"x": randn(33, 64, dtype=DTYPES[0]), "out": randn(33, 64, dtype=DTYPES[0])},
        "columns": {"x": x[:, :60], "weight": weight[:, :60].contiguous()},
        "dtype": {"weight": weight.float()},
        "device": {"weight": weight.cpu()},
        "groups": {"groups": 3},
        "norm": {"x": many, "out": many_out, "norm_weight": weight[0]},
        "outputs": {"x": many, "weight": weight[:60], "out": many_out[:, :60]},
        "parts": {"x": many, "out": many_out, "squares": randn(9, 6)},
        "next": {"next_norm_weight": weight[0], "next_x": torch.empty_like(out), "next_squares": randn(2, 8)},
    }[what]
    given = {"x": x, "weight": weight, "out": out, "norm_weight": None, "norm_eps": 0.0, "squares": None} | {
        "residual": None, "next_norm_weight": None, "next_x": None, "next_squares": None, "groups": 1, "swiglu": False,
    }  # fmt: skip
    given |= arguments
    before = given["out"].clone()
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.kda_hf_cuda.linear(*given.values())
    assert torch.equal(given["out"], before)


# ----------------------------------------------------------------------------------------------------------- attention


def attention_case(B, H, KVH, D, length, capacity, dtype, norm, rotary, padded):
    """The arguments of a step; where there is no key, caches hold NaN."""
    joined = within(B, (H + 2 * KVH) * D, dtype=dtype)
    q, k, v = (x.unflatten(1, (-1, D)) for x in joined.split([H * D, KVH * D, KVH * D], 1))
    starts = torch.zeros(B, dtype=torch.long, device=DEVICE)
    if padded:
        starts = torch.randint(0, length + 1, (B,), device=DEVICE)
    at = torch.arange(capacity, device=DEVICE)
    gone = ~((at >= starts[:, None]) & (at < length))[:, None, :, None]
    keys, values = (randn(B, KVH, capacity, D, dtype=dtype).masked_fill_(gone, float("nan")) for _ in range(2))
    norms = (1 + randn(D, scale=0.2).to(dtype), 1 + randn(D, scale=0.2).to(dtype), EPS) if norm else None
    angles = torch.rand(B, 1, D // 2, device=DEVICE).repeat(1, 1, 2) * 6
    turns = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotary else None
    return q, k, v, keys, values, torch.tensor([length], device=DEVICE), starts, norms, turns, D**-0.5


def attend(by, case):
    q, k, v, keys, *others = case
    workspace = by.attention_workspace(q, len(q), q.shape[1], k.shape[1], keys.shape[2], q.shape[2])
    return by.attention_step(q, k, v, keys, *others, workspace)


def copied(case):
    return tuple(x.clone() if i in (3, 4) else x for i, x in enumerate(case))


def expected_attention(case):
    """In float64, of the rounded keys that torch's step leaves in the caches; these caches, too."""
    q, k, v, keys, values, length, starts, norms, turns, scale = case
    own = copied(case)
    own[3].nan_to_num_(), own[4].nan_to_num_()
    attend(TORCH, own)
    if norms is not None:
        q = F.rms_norm(q, norms[0].shape, norms[0], EPS)
    if turns is not None:
        half = q.shape[-1] // 2
        q = q * turns[0] + torch.cat([-q[..., half:], q[..., :half]], -1) * turns[1]
    at = torch.arange(keys.shape[2], device=DEVICE)
    there = (at <= length) & (at >= starts[:, None])
    scores = q.double().unflatten(1, (k.shape[1], -1)) @ own[3].double().mT * scale
    weights = scores.masked_fill(~there[:, None, None], float("-inf")).softmax(-1)
    return (weights @ own[4].double()).flatten(1, 2), own[3], own[4]


SHAPES = [(16, 4), (2, 1), (4, 4), (32, 1), (7, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_attention_step(relative_error, dtype, D, heads):
    lengths = (0, 1, 127, 128, 129, 1000, 2047, 2048, 5000)
    options = itertools.cycle(itertools.product((1, 3), (False, True), (False, True), (False, True)))
    for length in lengths:
        B, norm, rotary, padded = next(options)
        case = attention_case(B, *heads, D, length, length + 1 + length % 3 * 37, dtype, norm, rotary, padded)
        expected, keys, values = expected_attention(case)
        own = copied(case)
        actual = attend(OURS, own)
        assert relative_error(actual, expected) < (6e-3 if dtype == torch.bfloat16 else 9e-4), length
        # The new key and value, and nothing else, are in the caches.
        assert torch.equal(own[4][:, :, length], values[:, :, length])
        torch.testing.assert_close(own[3][:, :, length], keys[:, :, length], rtol=1e-2, atol=1e-2)
        for cache, before in zip(own[3:5], case[3:5], strict=True):
            rest = torch.arange(cache.shape[2], device=DEVICE) != length
            assert torch.equal(cache[:, :, rest].view(torch.int16), before[:, :, rest].view(torch.int16))


def test_attention_does_not_depend_on_room_and_batch():
    for length in (100, 128, 3000):
        case = attention_case(3, 16, 4, 128, length, length + 5, torch.bfloat16, True, True, True)
        expected = attend(OURS, copied(case))
        wider = tuple(
            torch.cat([x, torch.full_like(x[:, :, :1], float("nan")).expand(-1, -1, 700, -1)], 2) if i in (3, 4) else x
            for i, x in enumerate(case)
        )
        assert torch.equal(attend(OURS, wider), expected)
        q, k, v, keys, values, at, starts, norms, (cos, sin), scale = copied(case)
        one = [x[1:2].clone() for x in (q, k, v, keys, values)]
        alone = attend(OURS, (*one, at, starts[1:2].clone(), norms, (cos[1:2].clone(), sin[1:2].clone()), scale))
        assert torch.equal(alone, expected[1:2])


@pytest.mark.parametrize("length", [200, 10**10, -1])
def test_attention_without_room(length):
    case = attention_case(2, 16, 4, 128, 50, 200, torch.bfloat16, True, True, False)
    case[5].fill_(length)
    own = copied(case)
    assert not attend(OURS, own).any()
    for cache, before in zip(own[3:5], case[3:5], strict=True):
        assert torch.equal(cache.view(torch.int16), before.view(torch.int16))


def test_attention_in_a_graph_that_grows():
    """Over the edge of what one CTA has, with kernels that overlap and one workspace."""
    case, beside = (attention_case(3, 16, 4, 128, 120, 160, torch.bfloat16, True, True, True) for _ in range(2))
    for own, other in zip(beside[:5], case[:5], strict=True):
        own.copy_(other)
    beside = (*beside[:5], case[5].clone(), *case[6:])
    workspace = OURS.attention_workspace(case[0], 3, 16, 4, 160, 128)
    scratch = copied(case)
    OURS.attention_step(*scratch, workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OURS.attention_step(*case, workspace)
        case[5].add_(1)
    for _ in range(20):
        graph.replay()
        assert torch.equal(out, attend(OURS, beside))
        beside[5].add_(1)
    assert torch.equal(case[3].view(torch.int16), beside[3].view(torch.int16))
