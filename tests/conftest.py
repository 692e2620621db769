"""What the tests share: devices, tiny models, and the error measure."""

import pytest
import torch

from kda_hf import KDAConfig, KDAForCausalLM


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


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
        return KDAForCausalLM(tiny_config(**overrides)).to(device).eval()

    return make


# What a decode step has to get right of a model, as changes of `tiny_model`.
KINDS_OF_MODELS: dict[str, dict] = {
    "hybrid": {},
    "pure": {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "softplus": {"linear_lower_bound": None},
    "grouped": {"linear_num_value_heads": 4, "linear_value_head_dim": 8, "allow_neg_eigval": True},
    "tied": {"tie_word_embeddings": True},
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
