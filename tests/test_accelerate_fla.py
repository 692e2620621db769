"""`kda_hf.accelerate` of FLA's `KDAForCausalLM`: what its parameters mean, without its kernels.

FLA's modules run on a GPU alone and compute nothing here, so where FLA is not installed a model that only has its
parameters, names and configuration does as well.
"""

import copy

import pytest
import torch
from test_convert import BASE, CASES, fla_logits, fla_shapes
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

import kda_hf
from kda_hf import KDACache
from kda_hf.generation import CACHE_NAME
from kda_hf.integrations.accelerated import AcceleratedModel


class StandInConfig(PreTrainedConfig):
    model_type = "kda"
    tie_word_embeddings = False


class StandIn(PreTrainedModel):
    """Parameters alone. `_tied_weights_keys` is FLA's."""

    config_class = StandInConfig
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        fields = config.to_dict()
        for name, shape in fla_shapes(fields).items():
            self._place(name, nn.Parameter(torch.empty(shape)))
        if config.tie_word_embeddings:
            self._place("lm_head.weight", self.model.embeddings.weight)

    def _place(self, name, parameter):
        *path, key = name.split(".")
        module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(key, parameter)


StandIn.__module__, StandIn.__name__ = "fla.models.kda.modeling_kda", "KDAForCausalLM"


@pytest.fixture(params=["names alone", "FLA"])
def make(request, device):
    """Makes FLA's model of some fields, and all of its tensors by name."""

    def with_fields(**fields):
        seed = torch.seed() % 2**31
        print(f"torch.manual_seed({seed})")
        torch.manual_seed(seed)
        fields = {name: value for name, value in (BASE | fields).items() if name not in ("architectures", "dtype")}
        if request.param == "FLA":
            fla = pytest.importorskip("fla.models.kda", reason="needs flash-linear-attention")
            if "attn" in fields:
                pytest.importorskip("flash_attn", reason="FLA's attention needs it")
            model = fla.KDAForCausalLM(fla.KDAConfig(**fields))
        else:
            model = StandIn(StandInConfig(**fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.3)
                if "norm" in name:
                    parameter.add_(1)
        model = model.to(device).eval()
        model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
        return model, fields

    return with_fields


def expected_logits(model, fields, ids):
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return torch.stack([fla_logits(fields, tensors, row) for row in ids.cpu()])


@pytest.mark.supports("logits", "undo", model="FLA's kda")
@pytest.mark.parametrize("case", [name for name in CASES if name != "list of attentions"])
def test_logits(make, case, device, relative_error):
    model, fields = make(**CASES[case])
    ids = torch.randint(97, (2, 30), device=device)
    expected = expected_logits(model, fields, ids)
    own_class, names = type(model), sorted(model.state_dict())
    assert kda_hf.accelerate(model) is model and isinstance(model, AcceleratedModel)
    with torch.no_grad():
        assert relative_error(model(ids).logits, expected) < 1e-5
    assert sorted(model.state_dict()) == names and sorted(model.replaced) == ["lm_head", "model"]
    model.undo()
    assert type(model) is own_class and "_inner" not in vars(model)
    with kda_hf.accelerate(model) as same:
        assert same is model
    assert type(model) is own_class


@pytest.mark.supports("greedy", "prompt lookup", "crop", model="FLA's kda")
def test_generate(make, device):
    model, _ = make()
    kda_hf.accelerate(model)
    ids = torch.randint(3, 97, (2, 9), device=device)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert isinstance(getattr(out, CACHE_NAME), KDACache)
    with torch.no_grad():
        logits = model(out.sequences).logits
    assert torch.equal(logits[:, 8:-1].argmax(-1), out.sequences[:, 9:])
    looked_up = model.generate(ids[:1], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, out.sequences[:1])

    cache = KDACache(model.inner.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-3)
        again = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(again, logits[:, 6:9], rtol=1e-4, atol=1e-4)


@pytest.mark.supports("training", model="FLA's kda")
def test_training(make, device, relative_error):
    model, fields = make(tie_word_embeddings=True)
    kda_hf.accelerate(model).train()
    ids = torch.randint(97, (1, 20), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and model.inner.training
    model.eval()
    with torch.no_grad():
        assert relative_error(model(ids).logits, expected_logits(model, fields, ids)) < 1e-4
    assert not model.inner.training


def test_parameters_that_move(make, device, relative_error):
    """To another dtype and back, and to other memory."""
    model, fields = make(attn=CASES["hybrid"]["attn"])
    kda_hf.accelerate(model)
    ids = torch.randint(97, (1, 12), device=device)
    model.generate(ids, max_new_tokens=4)
    with torch.no_grad():
        model.double()
        assert model(ids).logits.dtype == torch.float64
        model.float()
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
        assert relative_error(model(ids).logits, expected_logits(model, fields, ids)) < 1e-5
        copied = copy.deepcopy(model)
        copied.lm_head.weight.zero_()
        assert not copied(ids).logits.any() and model(ids).logits.any()
        model.undo()
        assert isinstance(copied, AcceleratedModel) and not copied(ids).logits.any()


def test_what_is_refused(make, device):
    model, _ = make()
    own_class = type(model)
    model.get_submodule("model.layers.0.attn.q_proj").register_parameter("lora_A", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"`model`: model.layers.0.attn.q_proj.lora_A is \[2\] there"):
        kda_hf.accelerate(model)
    del model.get_submodule("model.layers.0.attn.q_proj").lora_A
    handle = model.get_submodule("model.layers.1").register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="`model`: model.layers.1 has hooks"):
        kda_hf.accelerate(model)
    handle.remove()
    model.config.use_short_conv = False
    with pytest.raises(ValueError, match="`use_short_conv` is False"):
        kda_hf.accelerate(model)
    assert type(model) is own_class
    model.config.use_short_conv = True
    kda_hf.accelerate(model)

    class Cache:
        pass

    Cache.__module__ = "fla.models.utils"
    with pytest.raises(TypeError, match="`past_key_values` must be a KDACache, got FLA's Cache"):
        model(torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=Cache())
