"""Draws what `bench_generate.py --json` wrote: tokens a second by batch, a step by context. Needs matplotlib."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import StrMethodFormatter


def draw(result: dict, path: Path) -> None:
    rows = [row for row in result["rows"] if "error" not in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))

    greedy = sorted((row for row in rows if row["case"] == "greedy"), key=lambda row: row["batch"])
    batches = [row["batch"] for row in greedy]
    left.plot(batches, [row["batch"] / row["step_s"] for row in greedy], "o-", color="#c0392b", label="generate()")
    left.plot(batches, [row["batch"] / row["step_floor_s"] for row in greedy], "--", color="0.5", label="at the floor")
    left.set_yscale("log")
    left.set_xlabel("sequences")
    left.set_ylabel("tokens a second")

    for case, name, colour in (
        ("greedy, longer", "3 KDA layers to 1 of attention", "#c0392b"),
        ("KDA alone", "KDA layers alone", "#2471a3"),
    ):
        longer = sorted((row for row in rows if row["case"] == case), key=lambda row: row["prompt"])
        contexts = [row["prompt"] for row in longer]
        right.plot(contexts, [1e3 * row["step_s"] for row in longer], "o-", color=colour, label=name)
        right.plot(contexts, [1e3 * row["step_floor_s"] for row in longer], "--", color=colour, alpha=0.5)
    right.set_ylim(bottom=0)
    right.set_xlabel("tokens before, floors dashed")
    right.set_ylabel("ms a token, one sequence")

    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axis.grid(color="0.9")
        axis.legend(fontsize="small")
    figure.suptitle(f"{result['device']}, {result['date'][:10]}, commit {result['commit']}", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="what bench_generate.py wrote")
    parser.add_argument("picture", type=Path, help="an .svg, or another format that matplotlib writes")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.picture)


if __name__ == "__main__":
    main()
