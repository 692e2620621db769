"""The table of what is supported: tests that are marked make it, and nobody types it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "integrations"
CONFTEST = ROOT / "tests" / "conftest.py"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support_table = load(ROOT / "scripts" / "support_table.py")

MARKED = """
import pytest

@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return request.param

@pytest.fixture
def falls_over_at_the_end():
    yield
    raise RuntimeError

@pytest.mark.supports("{mode}", "generation", model="{model_type}")
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("model_type", ["a", "b"])
def test_mode(model_type, mode, device):
    if device == "cuda":
        pytest.skip()
    assert (model_type, mode) != ("b", "beams")

@pytest.mark.supports("undo", model="a")
def test_undo(falls_over_at_the_end): ...

@pytest.mark.supports("crop", model="a")
@pytest.mark.xfail
def test_crop():
    assert False

@pytest.mark.parametrize("length", [1, pytest.param(2, marks=pytest.mark.supports("padding", model="a"))])
def test_padding(length):
    assert length == 2

@pytest.mark.supports("graphs", model="a", backend="cuda")
@pytest.mark.skipif(True, reason="needs a GPU")
def test_graphs(): ...

def test_unmarked(): ...
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_what_marked_tests_record(processes, tmp_path, monkeypatch):
    if processes:
        pytest.importorskip("xdist")
    monkeypatch.setenv("KDA_HF_COMMIT", "0123abc")
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_marked.py").write_text(MARKED)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--support-table", "run.json"]
    command += ["-n", str(processes)] if processes else []
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["commit"] == "0123abc" and run["date"] and run["torch"] and run["transformers"] and run["devices"]["cpu"]
    counts = {
        (row["model"], row["feature"], row["backend"]): (row["passed"], row["failed"], row["skipped"])
        for row in run["results"]
    }
    assert counts == {
        ("a", "greedy", "cpu"): (1, 0, 0),
        ("a", "greedy", "cuda"): (0, 0, 1),
        ("a", "beams", "cpu"): (1, 0, 0),
        ("a", "beams", "cuda"): (0, 0, 1),
        ("a", "generation", "cpu"): (2, 0, 0),
        ("a", "generation", "cuda"): (0, 0, 2),
        ("b", "greedy", "cpu"): (1, 0, 0),
        ("b", "greedy", "cuda"): (0, 0, 1),
        ("b", "beams", "cpu"): (0, 1, 0),
        ("b", "beams", "cuda"): (0, 0, 1),
        ("b", "generation", "cpu"): (1, 1, 0),
        ("b", "generation", "cuda"): (0, 0, 2),
        ("a", "undo", "cpu"): (0, 1, 0),
        ("a", "crop", "cpu"): (0, 1, 0),
        ("a", "padding", "cpu"): (1, 0, 0),
        ("a", "graphs", "cuda"): (0, 0, 1),
    }


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        (pytest.mark.supports("greedy"), "'model'"),
        (pytest.mark.supports("{mode}", model="a"), "'mode'"),
        (pytest.mark.supports(model="a"), "takes features"),
        (pytest.mark.supports("greedy", model="a", device="cpu"), "takes features"),
    ],
)
def test_wrong_markers(marker, words):
    item = SimpleNamespace(nodeid="test_x.py::test_y", iter_markers=lambda name: [marker.mark])
    with pytest.raises(pytest.UsageError, match=f"test_x.py::test_y.*{words}"):
        load(CONFTEST).SupportTable.claims(item)


def run_of(backend, **outcomes):
    """A run in which model "m" did these features: passed, failed and skipped tests of each."""
    results = [
        {"model": "m", "feature": feature, "backend": backend}
        | dict(zip(("passed", "failed", "skipped"), n, strict=True))
        for feature, n in outcomes.items()
    ]
    about = {"date": "2026-01-02", "commit": "abc", "torch": "2.11", "transformers": "5.17"}
    return about | {"devices": {backend: "Device X"}, "results": results}


def test_table():
    runs = [
        run_of("cpu", greedy=(3, 0, 0), beams=(3, 1, 0), crop=(0, 0, 2), padding=(1, 0, 4)),
        run_of("cuda", greedy=(0, 0, 1), beams=(1, 0, 0)),
        run_of("cuda", greedy=(2, 0, 0)),
    ]
    about = "- 2026-01-02, commit abc: {} is Device X; torch 2.11, transformers 5.17"
    assert support_table.table(runs).split("\n") == [
        "|  | `m`, cpu | `m`, cuda |",
        "| --- | --- | --- |",
        "| beams | no | yes |",
        "| crop | not run | – |",
        "| greedy | yes | yes |",
        "| padding | yes | – |",
        "",
        *(about.format(backend) for backend in ("cpu", "cuda", "cuda")),
    ]
    assert "| greedy | no |" in support_table.table([*runs, run_of("cpu", greedy=(0, 1, 0))])


def test_only_the_place_of_the_table_changes():
    page = f"Above\n\n{support_table.START}\n\nold\n\n{support_table.END}\n\nBelow\n"
    runs = [run_of("cpu", greedy=(1, 0, 0))]
    once = support_table.updated(page, runs)
    assert once.startswith("Above\n\n") and once.endswith("\n\nBelow\n") and "old" not in once
    assert support_table.table(runs) in once and support_table.updated(once, runs) == once
    with pytest.raises(ValueError, match="end of the support table"):
        support_table.updated("A page", runs)


def test_the_committed_table_is_that_of_the_committed_runs():
    runs = [json.loads(path.read_text()) for path in sorted(PAGES.glob("support_*.json"))]
    page = (PAGES / "README.md").read_text()
    assert runs and support_table.updated(page, runs) == page, "run scripts/support_table.py"
