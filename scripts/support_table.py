"""Writes what runs of the tests showed, as `pytest --support-table FILE` records it, as a table into a page of docs."""

import argparse
import json
from pathlib import Path
from typing import Any


WORDS = {"no": "failed", "yes": "passed", "not run": "skipped"}
PAGE = Path(__file__).parents[1] / "docs" / "integrations" / "README.md"
START, END = "<!-- support table: scripts/support_table.py writes it -->", "<!-- end of the support table -->"


def table(runs: list[dict[str, Any]]) -> str:
    """
    Rows are features, columns are models on backends. "yes": tests of it passed in these runs, and none failed; "no":
    one failed; "not run": all of them were skipped; "–": there are none.
    """
    outcomes: dict[tuple[str, str, str], set[str]] = {}
    for run in runs:
        for row in run["results"]:
            found = outcomes.setdefault((row["feature"], row["model"], row["backend"]), set())
            found.update(outcome for outcome in ("passed", "failed", "skipped") if row[outcome])

    features = sorted({feature for feature, _, _ in outcomes}, key=str.casefold)
    columns = sorted({(model, backend) for _, model, backend in outcomes}, key=lambda x: (x[0] != "kda_hf", x))

    def cell(found: set[str]) -> str:
        return next((word for word, outcome in WORDS.items() if outcome in found), "–")

    def line(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line("", *(f"`{model}`, {backend}" for model, backend in columns)), line(*["---"] * (1 + len(columns)))]
    for feature in features:
        lines.append(line(feature, *(cell(outcomes.get((feature, *column), set())) for column in columns)))
    lines.append("")
    for run in runs:
        devices = ", ".join(f"{name} is {device}" for name, device in run["devices"].items())
        versions = f"torch {run['torch']}, transformers {run['transformers']}"
        lines.append(f"- {run['date']}, commit {run['commit']}: {devices}; {versions}")
    return "\n".join(lines)


def updated(page: str, runs: list[dict[str, Any]]) -> str:
    """The text of the page with the table of these runs; raises ValueError where it has no place for it."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page must have the lines {START} and {END}")
    return f"{before}{start}\n\n{table(runs)}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="what pytest --support-table wrote")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in args.runs]
    args.page.write_text(updated(args.page.read_text(), runs))


if __name__ == "__main__":
    main()
