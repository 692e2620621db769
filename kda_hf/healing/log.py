"""The log of a healing run: CSV files, and a plot of them."""

import csv
from pathlib import Path
from typing import Any


COLUMNS = (
    "stage",
    "step",
    "loss",
    "held_out_loss",
    "lr",
    "grad_norm",
    "skipped",
    "tokens",
    "seconds",
    "tokens_per_second",
)


class Log:
    """
    `log.csv` has a line for each update, of either stage; `layers.csv` one for each update of stage 1, with the error
    of each swapped layer.

    Args:
        folder (`Path`): where the files are.
        layers (`list[int]`): indices of the swapped layers.
        until (`tuple[int, int]`): stage and step of the checkpoint that the run goes on from. Lines of later updates,
            which will be done again, are dropped; (0, 0) begins anew.
    """

    def __init__(self, folder: Path, layers: list[int], until: tuple[int, int]):
        self.files = {
            folder / "log.csv": COLUMNS,
            folder / "layers.csv": ("stage", "step", *(f"layer_{i}" for i in layers)),
        }
        for path, columns in self.files.items():
            rows = [row for row in read_log(path) if (int(row["stage"]), int(row["step"])) <= until]
            scratch = path.with_suffix(".tmp")
            with scratch.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            scratch.replace(path)

    def write(self, row: dict[str, Any], layer_errors: list[float] | None = None) -> None:
        """Appends `row`, and in stage 1 the error of each layer."""
        log, layers = self.files
        lines = {log: [row[column] for column in self.files[log]]}
        if layer_errors is not None:
            lines[layers] = [row["stage"], row["step"], *layer_errors]
        for path, line in lines.items():
            with path.open("a", newline="") as file:
                csv.writer(file).writerow(line)


def read_log(path: Path) -> list[dict[str, str]]:
    """The whole lines of a log; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def require_matplotlib() -> None:
    """Raises ImportError, with what to do, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'kda_hf[plot]'") from error


def plot_log(folder: Path, picture: Path) -> None:
    """
    Draws the losses of a run: a panel for each stage, with the held-out loss, and in stage 1 each layer's.

    Args:
        folder (`Path`): where `log.csv` is, and `layers.csv`.
        picture (`Path`): an .svg, or another format that matplotlib writes.

    Raises:
        ImportError: without matplotlib.
        ValueError: the log has no line.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = read_log(folder / "log.csv")
    if not rows:
        raise ValueError(f"{folder / 'log.csv'} has no line of a run to plot")
    layers = read_log(folder / "layers.csv")
    stages = sorted({row["stage"] for row in rows})
    figure = Figure(figsize=(6 * len(stages), 4))
    for number, stage in enumerate(stages, 1):
        axis = figure.add_subplot(1, len(stages), number)
        if stage == "1" and layers:
            for name in (column for column in layers[0] if column.startswith("layer_")):
                steps, values = _curve(layers, name, "1")
                axis.plot(steps, values, color="0.8", linewidth=0.7)
        for column, name, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o--")):
            steps, values = _curve(rows, column, stage)
            if steps:
                axis.plot(steps, values, style, label=name, markersize=3)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_ylabel("relative squared error of the layers' outputs" if stage == "1" else "KL to the original, nats")
        axis.set_title(f"stage {stage}", fontsize="medium")
        axis.grid(color="0.9")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(picture)


def _curve(rows: list[dict[str, str]], column: str, stage: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"]), float(row[column])) for row in rows if row["stage"] == stage and row[column]]
    return [step for step, _ in points], [value for _, value in points]
