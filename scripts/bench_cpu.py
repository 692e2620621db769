"""Times the PyTorch operators on the CPU against the PyTorch path of transformers' `kimi_linear`, in one run."""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.models.kimi_linear import modeling_kimi_linear

from kda_hf import ops


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that all meet the same load."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def inputs(args: argparse.Namespace, tokens: int) -> tuple[torch.Tensor, ...]:
    """Normalised q and k, v, log-decay with a mean of `args.decay`, and β."""
    shape = (args.batch, tokens, args.heads, args.dim)
    q, k = (F.normalize(torch.randn(shape), dim=-1) for _ in range(2))
    return q, k, torch.randn(shape), 2 * args.decay * torch.rand(shape), torch.rand(shape[:-1])


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    root = Path(__file__).parents[1]
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128, help="K and V")
    parser.add_argument("--decay", type=float, default=-0.5, help="mean log-decay a token")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)

    prompt, token = inputs(args, args.tokens), inputs(args, 1)
    state = torch.randn(args.batch, args.heads, args.dim, args.dim)
    theirs, ours = "transformers", "kda_hf"
    prefill = medians(
        {
            theirs: lambda: modeling_kimi_linear.chunk_kimi_delta_attention(*prompt, output_final_state=True),
            ours: lambda: ops.chunk_kda(*prompt, output_final_state=True),
        },
        args.repeats,
    )
    decode = medians(
        {
            theirs: lambda: modeling_kimi_linear.recurrent_kimi_delta_attention(*token, state, True),
            ours: lambda: ops.recurrent_kda(*token, initial_state=state, output_final_state=True),
        },
        100 * args.repeats,
    )
    device = f"{processor()}, {args.threads} threads"
    print(f"{device}; fp32, B={args.batch} T={args.tokens} H={args.heads} K=V={args.dim}, medians")
    print(f"prefill: transformers {prefill[theirs] * 1e3:.1f} ms, kda_hf {prefill[ours] * 1e3:.1f} ms, ", end="")
    print(f"{prefill[theirs] / prefill[ours]:.1f} times faster")
    print(f"decode step: transformers {decode[theirs] * 1e6:.0f} µs, kda_hf {decode[ours] * 1e6:.0f} µs, ", end="")
    print(f"{decode[theirs] / decode[ours]:.1f} times faster")
    if args.json:
        results = {
            "device": device,
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "options": {name: value for name, value in vars(args).items() if name != "json"},
            "prefill_seconds": prefill,
            "prefill_ratio": prefill[theirs] / prefill[ours],
            "decode_seconds": decode,
            "decode_ratio": decode[theirs] / decode[ours],
        }
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
