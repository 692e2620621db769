"""Times builds of the CUDA extension in turn, each in a process of its own: µs a case, as `bench_prefill.py` does it.

    python scripts/compare_builds.py before.so after.so --cases T1024_H4_N1 T4096_H8_N1 --rounds 2

The least of all rounds counts. Only times of one run compare: GPUs differ.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


CHILD = "--child"


def measure(build: Path, cases: list[str], regimes: list[str], repeats: int) -> dict[str, tuple[float, float]]:
    """µs and floor of each case, with `build` in the place of the package's own extension."""
    os.environ["KDA_HF_BACKEND"] = "cuda"
    load: Any = torch.ops.load_library
    torch.ops.load_library = lambda path: load(build if Path(path).name == "_C.abi3.so" else path)  # type: ignore[method-assign]
    import bench_prefill as bench  # loads the extension

    bandwidth = bench.copy_bandwidth(repeats)
    results = {}
    with torch.no_grad():
        for case in bench.CASES + (bench.EXTRA if cases else []):
            for regime in regimes if not cases or case.name in cases else []:
                torch.manual_seed(0)
                time = bench.time_of(bench.ours, case, regime, repeats)
                results[f"{case.name} {regime}"] = (1e6 * time, 1e6 * (case.floor_bytes / bandwidth + bench.LAUNCH))
                torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", type=Path, metavar="BUILD.so")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="of `bench_prefill.py`, --extra too")
    parser.add_argument(
        "--regimes", nargs="+", choices=("steep", "mild", "softplus", "bimodal"), default=["steep", "mild"]
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.builds[0].resolve(), args.cases, args.regimes, args.repeats)))
        return

    times: dict[Path, dict[str, list[float]]] = {build: {} for build in args.builds}
    floors: dict[str, float] = {}
    options = [
        *(["--cases", *args.cases] if args.cases else []),
        "--regimes",
        *args.regimes,
        "--repeats",
        str(args.repeats),
    ]
    for _ in range(args.rounds):
        for build in args.builds:
            command = [sys.executable, __file__, str(build), CHILD, *options]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for name, (time, floor) in json.loads(run.stdout.splitlines()[-1]).items():
                times[build].setdefault(name, []).append(time)
                floors[name] = floor
    print(f"{'':26}{'floor':>8}" + "".join(f"{build.stem:>14}" for build in args.builds))
    for name, floor in floors.items():
        print(f"{name:26}{floor:8.1f}" + "".join(f"{min(times[build][name]):14.1f}" for build in args.builds))
    import bench_prefill as bench

    for regime in args.regimes:
        names = [name for name in floors if name.endswith(f" {regime}")]
        means = [
            bench.geometric_mean([min(times[build][name]) / floors[name] for name in names]) for build in args.builds
        ]
        print(f"{'geometric mean ' + regime:34}" + "".join(f"{mean:14.3f}" for mean in means))


if __name__ == "__main__":
    main()
