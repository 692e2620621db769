"""Draws the times that `bench_prefill.py --json` wrote: in floors, for each case, on a log scale. Needs matplotlib."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter


STYLES = {
    "kda_hf": ("o", "#c0392b"), "FLA": ("s", "#2471a3"), "FlashKDA": ("^", "#7d8b2f"), "cuDNN": ("D", "#8e6bad"),
}  # fmt: skip


def draw(result: dict, path: Path) -> None:
    regimes = list(dict.fromkeys(row["regime"] for row in result["cases"]))
    cases = list(dict.fromkeys(row["case"] for row in result["cases"]))
    figure, axes = plt.subplots(1, len(regimes), figsize=(5.5 * len(regimes), 0.32 * len(cases) + 1.6), sharey=True)
    for axis, regime in zip([axes] if len(regimes) == 1 else axes, regimes, strict=True):
        rows = [row for row in result["cases"] if row["regime"] == regime]
        for name, (marker, colour) in STYLES.items():
            for times, is_measured in (("us", True), ("published_us", False)):
                points = [
                    (row[times][name] / row["floor_us"], cases.index(row["case"]))
                    for row in rows
                    if isinstance(row[times].get(name), int | float)
                    and (is_measured or not isinstance(row["us"].get(name), float))
                ]
                if points:
                    axis.scatter(
                        *zip(*points, strict=True),
                        marker=marker,
                        edgecolors=colour,
                        facecolors=colour if is_measured else "none",
                        label=name if is_measured else f"{name}, published",
                        zorder=3,
                    )
        axis.axvline(1, color="0.4", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_xticks([1, 2, 3, 5, 10, 20, 50, 100])
        axis.set_yticks(range(len(cases)), cases)
        axis.grid(axis="both", color="0.9")
        axis.set_xlabel(f"time in floors, {regime} gates")
        axis.set_ylim(len(cases) - 0.5, -0.5)  # shared: the first case on top
    names = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(names.values(), names.keys(), fontsize="small", ncols=len(names), loc="lower center")
    figure.suptitle(f"{result['device']}, {result['date'][:10]}, commit {result['commit']}", fontsize="medium")
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="what bench_prefill.py wrote")
    parser.add_argument("picture", type=Path, help="an .svg, or another format that matplotlib writes")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.picture)


if __name__ == "__main__":
    main()
