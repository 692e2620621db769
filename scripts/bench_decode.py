"""Times the decode operators and the convolution on one GPU, in floors, beside FLA where it is installed.

GPU time by CUDA-graph replay with a cold L2, as `bench_prefill.py` takes it. A floor of a step is reading and writing
the state at the copy bandwidth measured in the same run; of the convolution, reading its input and writing its output.
HV = 32, H = HV but where heads of q and k are shared, K = V = 128, bf16 inputs.

    python scripts/bench_decode.py --json decode.json
"""

import argparse
import datetime
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bench_prefill as bench
import torch

from kda_hf import ops


HEADS, WIDTH, TAPS = 32, 128, 4
ROWS = torch.int32


class Case(NamedTuple):
    name: str
    make: Callable[[], Callable[[], object]]  # a call on inputs of its own
    floor_bytes: int  # that one call moves at least
    cold_bytes: int  # that it touches
    most_us: float | None = None  # targets
    most_floors: float | None = None


# ---------------------------------------------------------------------------------------------------------------- calls


def keeping(call: Callable[[], object]) -> Callable[[], None]:
    """The call, whose last results stay: else the next one in a graph would write where L2 still has them."""
    results: list[object] = [None]

    def run() -> None:
        results[0] = call()

    return run


def token(B: int, T: int = 1, key_heads: int = HEADS) -> dict[str, Any]:
    heads = {"q": key_heads, "k": key_heads, "v": HEADS, "g": HEADS}
    x: dict[str, Any] = {
        name: torch.randn(B, T, H, WIDTH, device="cuda", dtype=torch.bfloat16) for name, H in heads.items()
    }
    x["beta"] = torch.randn(B, T, HEADS, device="cuda", dtype=torch.bfloat16)
    return x | bench.gate("mild", HEADS)


def states(B: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(B, HEADS, WIDTH, WIDTH, device="cuda").to(dtype)


FLAGS = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def recurrent(
    B: int,
    T: int = 1,
    dtype: torch.dtype = torch.float32,
    in_place: bool = False,
    initial: bool = True,
    final: bool = True,
    skipped: bool = False,
    v_first: bool = False,
    key_heads: int = HEADS,
    packed: bool = False,
) -> Any:
    x = token(B, T, key_heads)
    if packed:
        x |= {name: x[name].flatten(0, 1).unsqueeze(0) for name in ("q", "k", "v", "g", "beta")}
        x["cu_seqlens"] = torch.arange(0, B * T + 1, T, device="cuda", dtype=ROWS)
    x |= FLAGS | {"output_final_state": final, "state_v_first": v_first, "backend": "cuda"}
    if initial:
        x["initial_state"] = states(B, dtype)
    if in_place:
        x["state_indices"] = torch.arange(B, device="cuda", dtype=ROWS)
    if skipped:
        x["state_indices"] = torch.full((B,), -1, device="cuda", dtype=ROWS)
    return lambda: ops.recurrent_kda(**x)


def fla(B: int, T: int = 1) -> Any:
    run = importlib.import_module("fla.ops.kda").fused_recurrent_kda
    x = token(B, T) | FLAGS | {"initial_state": states(B, torch.float32), "output_final_state": True}
    x["dt_bias"] = x["dt_bias"].flatten()
    return lambda: run(**x)


def step_arguments(B: int, key_heads: int = HEADS) -> dict[str, Any]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    heads = {"q": key_heads, "k": key_heads, "v": HEADS}
    return token(B, key_heads=key_heads) | {
        "output_gate": randn(B, 1, HEADS, WIDTH),
        "conv_state": randn(B, sum(heads.values()) * WIDTH, TAPS),
        "recurrent_state": states(B, torch.float32),
        **{f"{name}_conv_weight": randn(H * WIDTH, TAPS) for name, H in heads.items()},
        "norm_weight": randn(WIDTH),
    }


def step(B: int, v_first: bool = False, key_heads: int = HEADS) -> Any:
    x = step_arguments(B, key_heads) | {"state_v_first": v_first}
    return lambda: ops.kda_decode_step(**x, backend="cuda")


def conv(T: int, D: int, N: int = 1) -> Any:
    x = torch.randn(1, T, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(D, TAPS, device="cuda", dtype=torch.bfloat16)
    bounds = None if N == 1 else torch.arange(0, T + 1, T // N, device="cuda")
    y = torch.empty_like(x)
    state = torch.zeros(N, D, TAPS, device="cuda", dtype=torch.bfloat16)
    run = torch.ops.kda_hf_cuda.causal_conv1d
    return lambda: run(x, weight, None, state, bounds, y, state, True)


def cases(batches: list[int]) -> list[Case]:
    matrix = HEADS * WIDTH**2
    found = []
    for B in batches:
        most = {1: 4.0, 8: 16.0}.get(B)
        floors = None if most else 1.10
        both = 8 * B * matrix
        found += [
            Case(f"recurrent B={B}", lambda B=B: recurrent(B), both, both, most, floors),
            Case(f"recurrent in place B={B}", lambda B=B: recurrent(B, in_place=True), both, both // 2, most, floors),
            Case(
                f"recurrent bf16 state B={B}",
                lambda B=B: recurrent(B, dtype=torch.bfloat16),
                both // 2,
                both // 2,
                None,
                None if most else 1.15,
            ),
            Case(f"step B={B}", lambda B=B: step(B), both, both // 2, 5.5 if B == 1 else None, None if most else 1.15),
        ]
        found += [
            Case(f"recurrent values first B={B}", lambda B=B: recurrent(B, v_first=True), both, both),
            Case(f"step values first B={B}", lambda B=B: step(B, v_first=True), both, both // 2),
            Case(f"packed B={B}", lambda B=B: recurrent(B, packed=True), both, both),
            Case(f"H=HV/2, recurrent B={B}", lambda B=B: recurrent(B, key_heads=HEADS // 2), both, both),
            Case(f"H=HV/2, step B={B}", lambda B=B: step(B, key_heads=HEADS // 2), both, both // 2),
        ]
    # What a launch, a token and reading the state take: their floor is nothing, nothing and half of it.
    found += [
        Case("B=1, skipped", lambda: recurrent(1, skipped=True), 8 * matrix, 4 * matrix),
        Case("B=1, without states", lambda: recurrent(1, initial=False, final=False), 8 * matrix, 4 * matrix),
        Case("B=1, state only read", lambda: recurrent(1, final=False), 8 * matrix, 4 * matrix),
    ]
    found.append(Case("verify 8 tokens B=8", lambda: recurrent(8, 8, final=False), 32 * matrix, 32 * matrix))
    for T, D, N in ((8192, 6144, 1), (8192, 6144, 8), (2048, 12288, 1)):
        moved = 4 * T * D
        found.append(Case(f"conv T={T} D={D} N={N}", lambda T=T, D=D, N=N: conv(T, D, N), moved, moved, None, 1.25))
    return found


# --------------------------------------------------------------------------------------------------------- measurements


def time_of(case: Case, repeats: int, make: Callable | None = None) -> float:
    sets = max(2, math.ceil(3 * bench.l2_bytes() / case.cold_bytes))
    calls: list[Callable[[], object]] = [keeping((make or case.make)()) for _ in range(sets)]
    return bench.seconds(calls * math.ceil(8 / sets), repeats)


def host_cost() -> dict[str, float]:
    """µs of an eager call at B = 1, of ours and of operators that do nothing with the same arguments."""
    x = token(1)
    state = states(1, torch.float32)
    out, final_state = torch.empty_like(x["v"]), torch.empty_like(state)
    # fmt: off
    raw = (x["q"], x["k"], x["v"], x["g"], x["beta"], WIDTH**-0.5, out, x["A_log"], x["dt_bias"], x["lower_bound"],
           state, final_state, None, None, None, True, True, True, False, False)
    # fmt: on
    schema = str(torch.ops.kda_hf_cuda.recurrent.default._schema).partition("(")[2].rpartition(" -> ")[0]
    torch.library.custom_op(
        "kda_hf_bench::empty_recurrent",
        lambda *_: None,
        mutates_args=("out", "final_state", "states"),
        schema=f"({schema} -> ()",
        device_types="cuda",
    )
    calls = {
        "recurrent_kda": recurrent(1),
        "kda_decode_step": step(1),
        "recurrent, raw": lambda: torch.ops.kda_hf_cuda.recurrent(*raw),
        "empty custom_op": lambda: torch.ops.kda_hf_bench.empty_recurrent(*raw),
    }
    with torch.no_grad():
        return {name: 1e6 * bench.host_seconds(call) for name, call in calls.items()}


def errors() -> dict[str, tuple[float, float]]:
    """Relative L2 of output and state of one call of 16 tokens against float64."""
    found = {}
    for regime in ("mild", "steep", "softplus"):
        x = token(4, 16) | bench.gate(regime, HEADS) | FLAGS | {"initial_state": states(4, torch.float32)}
        doubles = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in x.items()}
        expected = ops.recurrent_kda(**doubles, output_final_state=True, backend="torch")
        actual = ops.recurrent_kda(**x, output_final_state=True, backend="cuda")
        found[regime] = tuple(
            float((a.double() - e).norm() / e.norm())
            for a, e in zip(actual, expected, strict=True)  # type: ignore[union-attr]
        )
    return found  # type: ignore[return-value]


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, torch {result['torch']}, commit {result['commit']}, {result['date']}: "
        f"copies at {result['bandwidth'] / 1e12:.2f} TB/s",
        f"{'case':34}{'floor µs':>9}{'µs':>8}{'floors':>8}{'target':>14}{'FLA µs':>8}",
    ]
    for row in result["cases"]:
        target = f"{row['most_us']} µs" if row["most_us"] else f"{row['most_floors']}" if row["most_floors"] else ""
        missed = (row["most_us"] and row["us"] > row["most_us"]) or (
            row["most_floors"] and row["us"] > row["most_floors"] * row["floor_us"]
        )
        fla_us = row.get("fla_us")
        lines.append(
            f"{row['case']:34}{row['floor_us']:9.1f}{row['us']:8.2f}{row['us'] / row['floor_us']:8.2f}"
            f"{target:>12}{' !' if missed else '  '}" + (f"{fla_us:8.1f}" if fla_us else "")
        )
    by_name = {row["case"]: row["us"] for row in result["cases"]}
    if "recurrent B=8" in by_name:
        ratio = by_name["verify 8 tokens B=8"] / by_name["recurrent B=8"]
        lines.append(f"verify of 8 tokens at B=8 takes {ratio:.2f}x one token (target 2.5)")
    for name, us in result["host_us"].items():
        lines.append(f"host: {name:18} {us:6.1f} µs, {us / result['host_us']['empty custom_op']:.2f}x the empty one")
    for regime, (o, state) in result["errors"].items():
        lines.append(f"error, output / state, {regime:9} {o:.2e} / {state:.2e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    has_fla = True
    try:
        importlib.import_module("fla.ops.kda")
    except Exception as error:
        has_fla = False
        print(f"FLA: not here ({type(error).__name__}: {error})")

    bandwidth = bench.copy_bandwidth(args.repeats)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": bench.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "bandwidth": bandwidth,
        "cases": [],
    }
    with torch.no_grad():
        for case in cases(args.batches):
            row = {"case": case.name, "floor_us": 1e6 * case.floor_bytes / bandwidth}
            row |= {"most_us": case.most_us, "most_floors": case.most_floors}
            row["us"] = 1e6 * time_of(case, args.repeats)
            if has_fla and case.name.startswith("recurrent B="):
                batch = int(case.name.partition("=")[2])
                row["fla_us"] = 1e6 * time_of(case, args.repeats, lambda batch=batch: fla(batch))
            result["cases"].append(row)
            print(row, flush=True)
            torch.cuda.empty_cache()
        result["host_us"] = host_cost()
        result["errors"] = errors()
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
