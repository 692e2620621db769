"""Times the prefill operators on one GPU beside every peer that is installed, in floors, and measures their errors.

GPU time by CUDA-graph replay with a cold L2: a graph runs one call on each of several sets of inputs, together larger
than the L2 cache, and the median of its replays is divided by the number of calls; before, the GPU rests for a moment.
One floor is the time that reading q, k, v, g, β and the initial state and writing the output and the final state takes
at the copy bandwidth measured in the same run, and 5 µs for launch, first bytes and drain. K = V = 128, bf16, fp32
states.

    python scripts/bench_prefill.py --json prefill.json && python scripts/plot_prefill.py prefill.json prefill.svg
"""

import argparse
import datetime
import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kda_hf import ops


WIDTH = 128  # of K and V
LOWER_BOUND = -5.0
LAUNCH = 5e-6  # seconds that a floor allows for launch, first bytes and drain
PAUSE = 0.3  # seconds before a timing: what ran before at full power must not have the GPU lower its clock in this one
MIXED = [1300, 547, 2048, 963, 271, 3063]


class Case(NamedTuple):
    name: str
    heads: int  # of q and k
    lengths: list[int]
    value_heads: int | None = None  # as many by default
    width: int = WIDTH

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def floor_bytes(self) -> int:
        """q, k, v, g read and the output written, and β, in bf16; initial and final states in fp32."""
        value_heads = self.value_heads or self.heads
        tokens = self.tokens * (self.heads * 4 * self.width + value_heads * (6 * self.width + 2))
        return tokens + 8 * len(self.lengths) * value_heads * self.width**2


def _case(tokens: int, heads: int, sequences: int = 1) -> Case:
    return Case(f"T{tokens}_H{heads}_N{sequences}", heads, [tokens // sequences] * sequences)


CASES = [
    _case(2048, 12), _case(2048, 16), _case(4096, 8), _case(4096, 12), _case(8192, 12, 4), _case(8192, 16),
    _case(1024, 4), _case(3072, 10), _case(8192, 24), _case(16384, 16, 8),
    *(Case(f"T8192_H{heads}_{name}", heads, lengths) for heads in (96, 64)
      for name, lengths in (("fixed", [8192]), ("mixed", MIXED), ("1024x8", [1024] * 8))),
]  # fmt: skip
# Not in the means: long ones of few heads, many short ones, grouped value heads, narrow heads.
EXTRA = [
    _case(131072, 4), _case(131072, 8), Case("512_of_1_to_64_H32", 32, [1 + i % 64 for i in range(512)]),
    Case("T8192_H8_HV16_N1", 8, [8192], value_heads=16), Case("T8192_H16_N1_D64", 16, [8192], width=64),
    Case("T8192_H32_HV96_N1", 32, [8192], value_heads=96), Case("T8192_H96_N1_D64", 96, [8192], width=64),
]  # fmt: skip
QUICK = ("T2048_H12_N1", "T8192_H12_N4", "T8192_H16_N1", "T8192_H96_mixed")

# µs on another H100 SXM, 2026-11, by the same method: FlashKDA at 1ce47ea steep and mild, cuDNN-frontend 1.32.0's
# `kda_hopper_cuda` steep and mild, which was given fp32 g and β for free. Where a peer runs here, its own time counts.
PUBLISHED = {
    "T2048_H12_N1": (258, 251, 53, 1199), "T2048_H16_N1": (266, 259, 70, 1188), "T4096_H8_N1": (452, 439, 68, 2360),
    "T4096_H12_N1": (472, 456, 90, 2491), "T8192_H12_N4": (328, 322, 176, 1447), "T8192_H16_N1": (953, 926, 211, 5990),
    "T1024_H4_N1": (127, 126, 24, 584), "T3072_H10_N1": (356, 350, 67, 1762), "T8192_H24_N1": (1002, 991, 301, 5996),
    "T16384_H16_N8": (480, 479, 407, 1238), "T8192_H96_fixed": (1565, 1533, 1621, 4886),
    "T8192_H96_mixed": (1564, 1546, 1788, 1778), "T8192_H96_1024x8": (1370, 1371, 1249, 1247),
    "T8192_H64_fixed": (1324, 1323, 818, 5604), "T8192_H64_mixed": (1098, 1094, 1386, 1382),
    "T8192_H64_1024x8": (924, 926, 812, 838),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- inputs


def gate(regime: str, heads: int, width: int = WIDTH) -> dict[str, Any]:
    """A_log, dt_bias and lower bound. `steep`: as random initialisation gives; `mild`: under 1 % of decay a token, as
    long-memory channels of a trained model have; `bimodal`: half of a head's channels each; `softplus`: A up to 16 and
    steps between 0.001 and 0.1, as models with that gate start."""
    A_log, lower_bound = torch.zeros(heads, device="cuda"), LOWER_BOUND
    if regime == "steep":
        A_log, dt_bias = torch.rand(heads, device="cuda") * 0.2, torch.zeros(heads, width, device="cuda")
    elif regime == "mild":
        dt_bias = torch.randn(heads, width, device="cuda") * 0.5 - 6.5
    elif regime == "bimodal":
        is_steep = torch.rand(heads, width, device="cuda").argsort(-1) < width // 2
        dt_bias = torch.where(is_steep, 0.0, torch.randn(heads, width, device="cuda") * 0.5 - 6.5)
    else:
        A_log, lower_bound = (1 + 15 * torch.rand(heads, device="cuda")).log(), None
        step = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(heads, width, device="cuda"))
        dt_bias = step + torch.log(-torch.expm1(-step))
    return {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}


def inputs(case: Case, regime: str, zero_state: bool = False) -> dict[str, Any]:
    """Arguments of `fwd` but for its outputs; packed where there is more than one sequence."""
    lengths, width, value_heads = case.lengths, case.width, case.value_heads or case.heads
    x = {
        name: torch.randn(1, case.tokens, heads, width, device="cuda", dtype=torch.bfloat16)
        for name, heads in (("q", case.heads), ("k", case.heads), ("v", value_heads), ("g", value_heads))
    }
    x["beta"] = torch.randn(1, case.tokens, value_heads, device="cuda", dtype=torch.bfloat16)
    x["scale"] = width**-0.5
    make = torch.zeros if zero_state else torch.randn
    x["initial_state"] = make(len(lengths), value_heads, width, width, device="cuda")
    x["cu_seqlens"] = None
    if len(lengths) > 1:
        x["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], device="cuda")
    return x | gate(regime, value_heads, width)


def outputs(x: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"out": torch.empty_like(x["v"]), "final_state": torch.empty_like(x["initial_state"])}


# ----------------------------------------------------------------------------------------------------------- backends
# Each takes the arguments of `fwd` and returns the output and the final state, [N, HV, V, K].


def ours(x: dict[str, Any], y: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ops.fwd(**x, **y)
    return y["out"], y["final_state"]


def flash_kda(x: dict[str, Any], y: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    importlib.import_module("flash_kda").fwd(**x, **y)
    return y["out"], y["final_state"]


def fla(x: dict[str, Any], y: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    os.environ["FLA_FLASH_KDA"] = "0"  # its own kernels, not FlashKDA's
    try:
        return importlib.import_module("fla.ops.kda").chunk_kda(
            **x | {"dt_bias": x["dt_bias"].flatten()},
            safe_gate=x["lower_bound"] is not None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
        )
    finally:
        del os.environ["FLA_FLASH_KDA"]


def cudnn(x: dict[str, Any], y: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN-frontend: packed tensors without a batch dimension."""
    bounds = _dense_bounds(x["q"].shape[1]) if x["cu_seqlens"] is None else x["cu_seqlens"]
    out, final_state = importlib.import_module("cudnn.linear_attention").kimi_delta_attention(
        *(x[name][0] for name in ("q", "k", "v", "g", "beta")),
        bounds,
        scale=x["scale"],
        initial_state=x["initial_state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        safe_gate=True,
        gate_lower_bound=x["lower_bound"],
        a_log=x["A_log"],
        dt_bias=x["dt_bias"],
    )
    return out.unsqueeze(0), final_state


@functools.cache
def _dense_bounds(tokens: int) -> torch.Tensor:
    return torch.tensor([0, tokens], device="cuda")


BACKENDS = {"kda_hf": ours, "FlashKDA": flash_kda, "cuDNN": cudnn, "FLA": fla}
MODULES = {"FlashKDA": "flash_kda", "cuDNN": "cudnn.linear_attention", "FLA": "fla.ops.kda"}


def available(with_peers: bool) -> dict[str, Callable]:
    """Ours, and the peers that can be imported."""
    found: dict[str, Callable] = {"kda_hf": ours}
    for name, module in MODULES.items() if with_peers else ():
        try:
            importlib.import_module(module)
        except Exception as error:
            print(f"{name}: not here ({type(error).__name__}: {error})")
        else:
            found[name] = BACKENDS[name]
    return found


# ------------------------------------------------------------------------------------------------------------- timing


def seconds(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median GPU seconds of one of the calls, replayed in turn."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:1] * 2 + calls:  # compiles, autotunes, fills caches
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    time.sleep(PAUSE)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    graph.reset()
    return statistics.median(times)


def l2_bytes() -> int:
    return torch.cuda.get_device_properties("cuda").L2_cache_size


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written a second. Not by a graph, whose copies may be left to the slower copy engine."""
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * source.numel() * repeats / (start.elapsed_time(end) * 1e-3)


def time_of(run: Callable, case: Case, regime: str, repeats: int) -> float:
    """Seconds of one call with a cold L2: the sets of inputs and outputs take three times its size, two at least."""
    sets = max(2, math.ceil(3 * l2_bytes() / case.floor_bytes))
    arguments = [inputs(case, regime) for _ in range(sets)]
    for x in arguments[1:]:  # one tensor of bounds: FLA keeps what it has worked out for it
        x["cu_seqlens"] = arguments[0]["cu_seqlens"]
    results = [outputs(x) for x in arguments]
    calls = [lambda x=x, y=y: run(x, y) for x, y in zip(arguments, results, strict=True)]
    return seconds(calls * math.ceil(8 / sets), repeats)  # eight at least: launching a graph takes a few µs, too


def host_seconds(call: Callable[[], object], burst: int = 50, bursts: int = 41) -> float:
    """Median host seconds of one eager call, from bursts that the GPU's queue takes without making the host wait."""
    times = []
    for _ in range(bursts):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(burst):
            call()
        times.append((time.perf_counter() - start) / burst)
    torch.cuda.synchronize()
    return statistics.median(times[1:])


def empty_ops() -> dict[str, Callable]:
    """Operators that do nothing, with the arguments of `fwd`: as `torch.library.custom_op` makes them, and the
    barest that Python can register."""
    tensors = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta"
    schema = (
        f"({tensors}, float scale, Tensor(a!) out, Tensor? A_log, Tensor? dt_bias, float? lower_bound, "
        "Tensor? initial_state, Tensor(b!)? final_state, Tensor? cu_seqlens) -> ()"
    )
    library = torch.library.Library("kda_hf_bench", "DEF")
    library.define("bare" + schema)
    library.impl("bare", lambda *_: None, "CUDA")
    torch.library.custom_op(
        "kda_hf_bench::custom", lambda *_: None, mutates_args=("out", "final_state"), schema=schema, device_types="cuda"
    )
    empty_ops.library = library  # type: ignore[attr-defined] # unregistered when it is collected
    return {"custom_op": torch.ops.kda_hf_bench.custom, "bare": torch.ops.kda_hf_bench.bare.default}


def host_cost() -> dict[str, float]:
    """µs of an eager call at T=2048, H=12, of ours and of empty operators with the same arguments."""
    x = inputs(_case(2048, 12), "steep")
    y = outputs(x)
    names = ("q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound", "initial_state",
             "final_state", "cu_seqlens")  # fmt: skip
    arguments = [(x | y)[name] for name in names]
    with torch.no_grad():
        calls = {"fwd": ops.fwd, **{f"empty {name}": op for name, op in empty_ops().items()}}
        return {name: 1e6 * host_seconds(lambda op=op: op(*arguments)) for name, op in calls.items()}


def workspace() -> dict[str, float]:
    """Bytes that a call takes besides its arguments, over those of its inputs, for each case."""
    ratios = {}
    for case in CASES:
        x = inputs(case, "steep")
        y = outputs(x)
        ours(x, y)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours(x, y)
        used = torch.cuda.max_memory_allocated() - before
        ratios[case.name] = used / sum(t.nbytes for t in x.values() if isinstance(t, torch.Tensor))
    return ratios


# -------------------------------------------------------------------------------------------------------------- errors

ACCURACY = {
    "steep T4096": ("steep", 4096), "mild T4096": ("mild", 4096), "softplus T4096": ("softplus", 4096),
    "bimodal T4096": ("bimodal", 4096), "mild T65536": ("mild", 65536),
}  # fmt: skip


def errors(backends: dict[str, Callable], heads: int = 4) -> dict[str, dict[str, tuple[float, float] | str]]:
    """Relative L2 of output and final state against the chunked form in float64, from a state of zeros."""
    found: dict[str, dict[str, tuple[float, float] | str]] = {}
    for name, (regime, tokens) in ACCURACY.items():
        x = inputs(Case(name, heads, [tokens]), regime, zero_state=True)
        exact = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in x.items()}
        flags = dict.fromkeys(
            ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "state_v_first"), True
        )
        expected = ops.chunk_kda(**exact, **flags, output_final_state=True, backend="torch")
        found[name] = {}
        for backend, run in backends.items():
            try:
                actual = run(x, outputs(x))
            except Exception as error:
                found[name][backend] = _why(error)
                continue
            found[name][backend] = tuple(
                float((a.double() - e).norm() / e.norm()) for a, e in zip(actual[:2], expected, strict=True)
            )  # type: ignore[assignment]
    return found


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# -------------------------------------------------------------------------------------------------------------- report


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def commit() -> str:
    """Of this checkout; where the sources came without their history, KDA_HF_COMMIT says it."""
    if given := os.environ.get("KDA_HF_COMMIT"):
        return given
    root = Path(__file__).parents[1]
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def table(result: dict[str, Any]) -> str:
    """One line a case and regime: times in floors, and ours against the fastest peer, measured or published."""
    backends = result["backends"]
    lines = [
        f"{result['device']}, torch {result['torch']}, commit {result['commit']}, {result['date']}: "
        f"copies at {result['bandwidth'] / 1e12:.2f} TB/s",
        f"{'case':18}{'gate':7}{'floor µs':>9}{'ours µs':>9}"
        + "".join(f"{name:>10}" for name in backends)
        + f"{'best peer':>11}{'faster by':>11}",
    ]
    for row in result["cases"]:
        times = row["us"]
        ours_us = times.get("kda_hf")
        peers = {name: us for name, us in times.items() if name != "kda_hf" and isinstance(us, float)}
        for name, us in row["published_us"].items():
            peers.setdefault(name, us)
        best = min(peers.values(), default=math.nan)
        cells = [f"{us / row['floor_us']:.2f}" if isinstance(us := times.get(b), float) else "-" for b in backends]
        ratio = f"{best / ours_us:.2f}x" if isinstance(ours_us, float) else "-"
        lines.append(
            f"{row['case']:18}{row['regime']:7}{row['floor_us']:9.1f}"
            + (f"{ours_us:9.1f}" if isinstance(ours_us, float) else f"{'-':>9}")
            + "".join(f"{cell:>10}" for cell in cells)
            + f"{best / row['floor_us']:11.2f}{ratio:>11}"
        )
    for regime, means in result["geometric_means"].items():
        cells = "".join(f"{means[name]:10.2f}" if name in means else f"{'-':>10}" for name in backends)
        lines.append(f"{'geometric mean':18}{regime:7}{'':18}{cells}")
    lines.append("times in floors; a best peer that is not installed here counts with its published time")
    for name, us in result.get("host_us", {}).items():
        lines.append(f"host: {name:18} {us:7.1f} µs")
    if "host_us" in result:
        host = result["host_us"]
        lines.append("host: fwd takes " + " and ".join(
            f"{host['fwd'] / us:.2f}x the {name}" for name, us in host.items() if name != "fwd"))  # fmt: skip
    for name, ratio in result.get("softplus_over_safe", {}).items():
        lines.append(f"softplus gate over safe gate: {name:18} {ratio:.2f}x")
    if "workspace" in result:
        lines.append(f"workspace: at most {max(result['workspace'].values()):.2f}x the inputs")
    for name, row in result.get("errors", {}).items():
        cells = [f"{b} {e if isinstance(e, str) else f'{e[0]:.2e} / {e[1]:.2e}'}" for b, e in row.items()]
        lines.append(f"error, output / state, {name:15} " + "   ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in (*CASES, *EXTRA)], metavar="CASE")
    parser.add_argument("--extra", action="store_true", help=f"other cases: {', '.join(case.name for case in EXTRA)}")
    parser.add_argument(
        "--regimes", nargs="+", choices=("steep", "mild", "softplus", "bimodal"), default=["steep", "mild"]
    )
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; no errors, no workspace")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--no-host", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=torch.seed() % 2**31)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    print(f"seed {args.seed}")

    reason = next(row["reason"] for row in ops.backend_report("fwd", device="cuda") if row["backend"] == "cuda")
    if reason:
        raise SystemExit(f"the CUDA backend cannot serve: {reason}")
    backends = available(not args.no_peers)
    wanted = args.cases or (QUICK if args.quick else [case.name for case in (EXTRA if args.extra else CASES)])
    cases = [case for case in (*CASES, *EXTRA) if case.name in wanted]
    bandwidth = copy_bandwidth(args.repeats)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": args.seed,
        "bandwidth": bandwidth,
        "backends": list(backends),
        "cases": [],
    }
    with torch.no_grad():
        for case in cases:
            for regime in args.regimes:
                floor = case.floor_bytes / bandwidth + LAUNCH
                row = {"case": case.name, "regime": regime, "floor_us": 1e6 * floor, "us": {}, "published_us": {}}
                for name, run in backends.items():
                    try:
                        row["us"][name] = 1e6 * time_of(run, case, regime, args.repeats)
                    except Exception as error:
                        row["us"][name] = _why(error)
                        print(f"{case.name} {regime}: {name}: {row['us'][name]}")
                    torch.cuda.empty_cache()
                if regime in ("steep", "mild") and case.name in PUBLISHED:
                    published, column = PUBLISHED[case.name], int(regime == "mild")
                    row["published_us"] = {"FlashKDA": published[column], "cuDNN": published[2 + column]}
                result["cases"].append(row)
                print(f"{case.name} {regime}: floor {1e6 * floor:.1f} µs, {row['us']}", flush=True)
        names = {case.name for case in CASES}
        in_the_mean = [row for row in result["cases"] if row["case"] in names]
        result["geometric_means"] = {
            regime: {
                name: geometric_mean(floors)
                for name in backends
                if (floors := [row["us"][name] / row["floor_us"] for row in in_the_mean
                               if row["regime"] == regime and isinstance(row["us"][name], float)])
            }
            for regime in args.regimes
        }  # fmt: skip
        chosen = [case for case in cases if case.name in QUICK]
        result["softplus_over_safe"] = {
            case.name: time_of(ours, case, "softplus", args.repeats) / time_of(ours, case, "mild", args.repeats)
            for case in chosen
        }
        if not args.no_host:
            result["host_us"] = host_cost()
        if not (args.quick or args.extra):
            result["workspace"] = workspace()
        if not (args.quick or args.extra or args.no_errors):
            result["errors"] = errors(backends)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
