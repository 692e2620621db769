"""What the tests share: devices, tiny models, the error measure, and the table of what is supported where."""

import importlib
import inspect
import json
import os
import platform
import subprocess
from collections import defaultdict
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers

from kda_hf import KDAConfig, KDAForCausalLM


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def plain_native_operators(monkeypatch):
    """transformers' KDA layers on their own PyTorch code: where FLA is installed they call its kernels, on a CPU too,
    and those multiply fp32 in TF32."""
    for name in ("kimi_linear", "glm5_next", "bailing_hybrid"):
        if name in transformers.CONFIG_MAPPING:
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            for operator, function in inspect.getmembers(module, inspect.isfunction):
                if operator.endswith("_kimi_delta_attention") or operator.startswith("causal_conv1d"):
                    monkeypatch.setattr(module, operator, inspect.unwrap(function))


@pytest.fixture
def tiny_config():
    """Makes configurations of a model small enough for hundreds of forward passes a second."""

    def make(**overrides) -> KDAConfig:
        fields = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "linear_num_heads": 2,
            "linear_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
        }
        return KDAConfig(**(fields | overrides))

    return make


@pytest.fixture
def tiny_model(tiny_config, device):
    """Makes small models with random weights: a new seed for each test, which a failing test shows."""

    def make(**overrides) -> KDAForCausalLM:
        seed = torch.seed() % 2**31
        print(f"torch.manual_seed({seed})")
        torch.manual_seed(seed)
        model = KDAForCausalLM(tiny_config(**overrides)).to(device).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.ndim == 1 and "dt_bias" not in name:
                torch.nn.init.normal_(parameter)  # they start as zeros, which would show nothing
        return model

    return make


# What a decode step has to get right of a model, as changes of `tiny_model`.
KINDS_OF_MODELS: dict[str, dict] = {
    "hybrid": {},
    "pure": {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "softplus": {"linear_lower_bound": None},
    "grouped": {"linear_num_value_heads": 4, "linear_value_head_dim": 8, "allow_neg_eigval": True},
    "tied": {"tie_word_embeddings": True},
    "biased gate": {"linear_output_gate_bias": True, "linear_decay_low_rank_dim": 8},
}


@pytest.fixture(params=KINDS_OF_MODELS)
def any_model(request, tiny_model):
    return tiny_model(**KINDS_OF_MODELS[request.param])


@pytest.fixture
def relative_error():
    """‖actual − expected‖ / ‖expected‖; not finite where either side isn't."""

    def measure(actual: torch.Tensor, expected: torch.Tensor) -> float:
        actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
        assert actual.shape == expected.shape
        return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))

    return measure


class SupportTable:
    """
    What the tests marked `supports` show: `pytest --support-table FILE` writes it, `scripts/support_table.py` makes a
    table for people of it.

    `@pytest.mark.supports(*features, model=..., backend=...)` says that this test, where it passes, shows that the
    model does these features on the backend. Any of the three may name parameters of the test in braces; `backend` is
    by default the `device` parameter, or "cpu" for a test without one. A marker may also stand on one parameter set.

        @pytest.mark.supports("greedy", model="kda_hf")
        def test_greedy(device): ...

        @pytest.mark.supports("{mode}", model="{model_type}")
        @pytest.mark.parametrize("mode", ["greedy", "beams"])
        @pytest.mark.parametrize("model_type", ["kimi_linear", "glm5_next"])
        def test_mode(model_type, mode, device): ...

        @pytest.mark.parametrize("length", [pytest.param(9, marks=pytest.mark.supports("padding", model="kda_hf")), 1])
        def test_lengths(length): ...

        @pytest.mark.supports("offloaded cache", model="kda_hf", backend="cuda")
        @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        def test_offloading(): ...

    A test that fails in any of its phases counts as failed, one that is skipped as skipped, one that is deselected not
    at all.
    """

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[str, str] = {}
        self.claimed: dict[str, list[tuple[str, str, str]]] = {}

    @staticmethod
    def claims(item: pytest.Item) -> list[tuple[str, str, str]]:
        """(model, feature, backend) of each claim of a test's markers; raises UsageError for a wrong marker."""
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        claims = []
        for marker in item.iter_markers("supports"):
            try:
                names = {"backend": str(parameters.get("device", "cpu"))} | marker.kwargs
                model, backend = names.pop("model").format(**parameters), names.pop("backend").format(**parameters)
                claims += [(model, feature.format(**parameters), backend) for feature in marker.args]
            except KeyError as error:
                raise pytest.UsageError(f"{item.nodeid}: `supports` lacks, or names no parameter, {error}") from None
            if names or not marker.args:
                raise pytest.UsageError(f"{item.nodeid}: `supports` takes features, `model` and `backend`")
        return claims

    def pytest_runtest_logreport(self, report):
        outcome, test = "failed" if hasattr(report, "wasxfail") else report.outcome, report.nodeid
        if self.outcomes.get(test) != "failed" and (outcome != "passed" or report.when == "call"):
            self.outcomes[test], self.claimed[test] = outcome, report.supports

    def pytest_sessionfinish(self):
        counts: dict = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
        for test, outcome in self.outcomes.items():
            for claim in self.claimed[test]:
                counts[tuple(claim)][outcome] += 1
        run = {
            "date": date.today().isoformat(),
            "commit": _commit(),
            "devices": {device: _device_name(device) for device in DEVICES},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "results": [
                dict(zip(("model", "feature", "backend"), claim, strict=True)) | counts[claim]
                for claim in sorted(counts)
            ],
        }
        self.path.write_text(json.dumps(run, indent=1) + "\n")


def pytest_addoption(parser):
    parser.addoption("--support-table", metavar="FILE", help="write what the tests marked `supports` show, as JSON")


def pytest_configure(config):
    path = config.getoption("--support-table", None)
    if path and not hasattr(config, "workerinput"):  # of several processes, the one that hears of all tests
        config.pluginmanager.register(SupportTable(config.invocation_params.dir / path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    report.supports = SupportTable.claims(item)
    return report


def pytest_collection_modifyitems(items):
    for item in items:
        SupportTable.claims(item)


def _commit() -> str:
    """Of this checkout; where the sources came without their history, KDA_HF_COMMIT says it."""
    if given := os.environ.get("KDA_HF_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
