"""Times the PyTorch backend on the CPU against the PyTorch path of transformers' `kimi_linear`, in one run.

`chunk_kda` over a prompt, `recurrent_kda` over one token, and a whole layer over one token with its cache. Both
sides take turns, so that what else runs on the machine slows both.
"""

import argparse
import datetime
import functools
import inspect
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig

from kda_hf import KDACache, KDAConfig, KimiDeltaAttention, ops


THEIRS, OURS = "transformers", "kda_hf"


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


def use_native_operators() -> None:
    """transformers' layer on its own PyTorch code: where FLA is installed it calls FLA's kernels, on a CPU too."""
    for name, function in inspect.getmembers(modeling_kimi_linear, inspect.isfunction):
        if name.endswith("_kimi_delta_attention") or name.startswith("causal_conv1d"):
            setattr(modeling_kimi_linear, name, inspect.unwrap(function))


def layer_steps(args: argparse.Namespace, max_rollback: int) -> dict[str, Callable[[], object]]:
    """A cached token through transformers' layer and through ours: softplus gate, random weights, hidden size H · K."""
    hidden = args.heads * args.dim
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "layer_types": ["linear_attention"],
        "linear_num_heads": args.heads,
        "linear_head_dim": args.dim,
    }
    config = KDAConfig(**fields, linear_lower_bound=None)
    native_config = KimiLinearConfig(**fields, mlp_layer_types=["dense"])
    native, native_cache = (
        modeling_kimi_linear.KimiLinearDeltaAttention(native_config, 0),
        DynamicCache(config=native_config),
    )
    ours, our_cache = KimiDeltaAttention(config, 0), KDACache(config, max_rollback=max_rollback)
    for parameter in (*native.parameters(), *ours.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    # transformers renamed the argument, so it gets its cache by position.
    steps = {THEIRS: lambda x: native(x, native_cache), OURS: lambda x: ours(x, past_key_values=our_cache)}
    for step in steps.values():
        step(torch.randn(args.batch, 8, hidden))
    token = torch.randn(args.batch, 1, hidden)
    return {name: functools.partial(step, token) for name, step in steps.items()}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    root = Path(__file__).parents[1]
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=root, capture_output=True, text=True
    )
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
    use_native_operators()

    prompt, token = inputs(args, args.tokens), inputs(args, 1)
    state = torch.randn(args.batch, args.heads, args.dim, args.dim)
    load = os.getloadavg()[0]
    seconds = {
        "prefill": medians(
            {
                THEIRS: lambda: modeling_kimi_linear.chunk_kimi_delta_attention(*prompt, output_final_state=True),
                OURS: lambda: ops.chunk_kda(*prompt, output_final_state=True),
            },
            args.repeats,
        ),
        "decode step of the operator": medians(
            {
                THEIRS: lambda: modeling_kimi_linear.recurrent_kimi_delta_attention(*token, state, True),
                OURS: lambda: ops.recurrent_kda(*token, initial_state=state, output_final_state=True),
            },
            100 * args.repeats,
        ),
        # as `generate()` keeps its cache, and as one that can be cropped
        "decode step of a layer": medians(layer_steps(args, max_rollback=0), 100 * args.repeats),
        "decode step of a layer with history": medians(layer_steps(args, max_rollback=64), 100 * args.repeats),
    }
    device = f"{processor()}, {args.threads} threads"
    print(f"{device}; fp32, B={args.batch} T={args.tokens} H={args.heads} K=V={args.dim}, medians; ", end="")
    print(f"load average at the start {load:.1f}")
    for name, times in seconds.items():
        print(f"{name}: transformers {times[THEIRS] * 1e3:.3f} ms, kda_hf {times[OURS] * 1e3:.3f} ms, ", end="")
        print(f"{times[THEIRS] / times[OURS]:.2f} times faster")
    if args.json:
        results = {
            "device": device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "load_average": load,
            "options": {name: value for name, value in vars(args).items() if name != "json"},
            "seconds": seconds,
            "ratios": {name: times[THEIRS] / times[OURS] for name, times in seconds.items()},
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
