"""`kda_hf.accelerate`: models that transformers ships compute what they did, on our operators and our cache."""

import copy
import logging
from pathlib import Path

import accelerate as hf_accelerate
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, TextStreamer

import kda_hf
from kda_hf import KDACache, cli, decode_graph, decoding
from kda_hf.generation import CACHE_NAME
from kda_hf.integrations import native
from kda_hf.integrations.accelerated import AcceleratedModel
from kda_hf.integrations.experts import GroupedExperts, grouped_experts
from kda_hf.layer import KDALayer


MODEL_TYPES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in transformers.CONFIG_MAPPING, reason=f"transformers {transformers.__version__} has no {name}"
        ),
    )
    for name in native.MODEL_TYPES
]
WITH_GRAPHS = [param for param in MODEL_TYPES if param.values[0] != "glm5_next"]
LAYER_TYPES = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
VOCABULARY = 160


pytestmark = pytest.mark.usefixtures("plain_native_operators")


@pytest.fixture(params=MODEL_TYPES)
def model_type(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    seed = torch.seed() % 2**31
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def configuration(model_type, heads=2, head_dim=32, **others):
    """A model of four layers with a tiny mixture of experts."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
        "layer_types": LAYER_TYPES,
    } | others
    linear = {"linear_num_heads": heads, "linear_head_dim": head_dim}
    kind = transformers.CONFIG_MAPPING[model_type]
    if model_type == "kimi_linear":
        return kind(**fields, **linear, qk_rope_head_dim=8, num_local_experts=4, n_shared_experts=1)
    if model_type == "bailing_hybrid":
        fields |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim}
        fields |= {"qk_rope_head_dim": 8, "num_local_experts": 4, "n_group": 2, "topk_group": 1}
        return kind(**fields, first_k_dense_replace=1)
    fields |= {"q_lora_rank": 24, "n_routed_experts": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
    # All keys of short sequences: scores of random weights have ties, which fall as the number of candidates has it.
    fields |= {"index_topk": 128, "index_kpool": 4, "index_head_dim": 16, "index_n_heads": 2, "hc_mult": 2}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 96}
    text = transformers.CONFIG_MAPPING["glm5_next_text"](**fields, **linear)
    return kind(text_config=text.to_dict(), vision_config=vision | {"projection_intermediate_size": 64})


def make(model_type, device, **sizes):
    """A model with random weights, the gates of which both remember and forget."""
    config = configuration(model_type, **sizes)
    model_class = native_class(config)
    model = model_class(config).to(device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.uniform_(-6, 1)
            if name.endswith("A_log"):
                parameter.uniform_(-1, 1)
            if "norm" in name and parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.generation_config.eos_token_id = None
    return model


def native_class(config):
    name = {"kimi_linear": "KimiLinearForCausalLM", "bailing_hybrid": "BailingHybridForCausalLM"}
    return getattr(transformers, name.get(config.model_type, "Glm5NextForConditionalGeneration"))


def prompt(device, batch=2, length=9):
    return torch.randint(3, VOCABULARY, (batch, length), device=device)


def generate(model, ids, **kwargs):
    return model.generate(ids, **({"max_new_tokens": 16, "do_sample": False} | kwargs))


def cache_of(outputs):
    return getattr(outputs, CACHE_NAME)


@torch.no_grad()
def forward(model, ids, cache=None, **kwargs):
    return model(ids, **{CACHE_NAME: cache}, use_cache=cache is not None, **kwargs).logits


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("length", [1, 2, 9, 130])
def test_logits(model_type, device, length, relative_error):
    model, ids = make(model_type, device), prompt(device, length=length)
    expected = forward(model, ids)
    with kda_hf.accelerate(model):
        assert relative_error(forward(model, ids), expected) < 1e-5


@pytest.mark.parametrize("bound", [None, -3.0])
def test_gates(device, bound, relative_error):
    """What a configuration says of the gate: glm5_next knows both kinds."""
    model, ids = make("glm5_next", device, linear_lower_bound=bound), prompt(device)
    expected = forward(model, ids)
    kda_hf.accelerate(model)
    assert {layer.lower_bound for layer in model.modules() if isinstance(layer, KDALayer)} == {bound}
    assert relative_error(forward(model, ids), expected) < 1e-5


@pytest.mark.parametrize("safe", [True, False])
def test_gates_of_bailing_hybrid(device, safe, relative_error):
    if "bailing_hybrid" not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers has none")
    model, ids = make("bailing_hybrid", device, kda_safe_gate=safe, kda_lower_bound=-4.0), prompt(device)
    expected = forward(model, ids)
    kda_hf.accelerate(model)
    assert {layer.lower_bound for layer in model.modules() if isinstance(layer, KDALayer)} == {-4.0 if safe else None}
    assert relative_error(forward(model, ids), expected) < 1e-5


@pytest.mark.supports("checkpoints as they are", "greedy", model="{model_type}")
def test_a_checkpoint_of_real_shapes(model_type, device, tmp_path):
    """32 heads of 128, saved, loaded by transformers, and token for token the same."""
    make(model_type, "cpu", heads=32, head_dim=128).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    loader = AutoModelForCausalLM if model_type != "glm5_next" else native_class(config)
    model = loader.from_pretrained(tmp_path, dtype=torch.float32).to(device).eval()
    ids = prompt(device, length=21)
    expected = generate(model, ids, max_new_tokens=24)
    kda_hf.accelerate(model)
    actual = generate(model, ids, max_new_tokens=24, return_dict_in_generate=True)
    assert torch.equal(actual.sequences, expected)
    assert isinstance(cache_of(actual), KDACache)

    model.save_pretrained(tmp_path / "again")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").architectures == config.architectures
    again = loader.from_pretrained(tmp_path / "again", dtype=torch.float32).to(device).eval()
    assert type(again) is native_class(config)
    assert torch.equal(generate(again, ids, max_new_tokens=24), expected)


@pytest.mark.parametrize("chosen", [2, 4])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.supports("bf16", model="{model_type}", backend="cuda")
def test_bf16_on_a_gpu(model_type, chosen):
    def divergence(expected, actual):
        """KL(expected ‖ actual) in nats, of logarithms of probabilities: the mean of the tokens, or their median, where
        the choice of a few tokens' experts turns with the last bit."""
        tokens = (expected.exp() * (expected - actual)).sum(-1)
        return float(tokens.mean() if chosen == 4 else tokens.median())

    model = make(model_type, "cuda", heads=32, head_dim=128, num_experts_per_tok=chosen)
    ids = prompt("cuda", length=300)
    exact = forward(model, ids).log_softmax(-1)
    model.to(torch.bfloat16)
    expected = forward(model, ids).float().log_softmax(-1)
    kda_hf.accelerate(model)
    actual = forward(model, ids).float().log_softmax(-1)
    assert divergence(expected, actual) < 1e-3
    assert divergence(exact, actual) < 1.25 * divergence(exact, expected)

    cache = KDACache(model.config)  # and step by step
    forward(model, ids[:, :280], cache)
    stepped = torch.cat([forward(model, ids[:, t : t + 1], cache) for t in range(280, 300)], 1).float().log_softmax(-1)
    assert divergence(expected[:, 280:], stepped) < 1e-3


@pytest.mark.parametrize("tokens", [1, 77, 300])
def test_grouped_experts(model_type, device, tokens, relative_error):
    experts = next(m for m in make(model_type, device).modules() if type(m).__name__.endswith("Experts"))
    experts.config._experts_implementation_internal = "eager"
    experts.bfloat16()
    x = torch.randn(tokens, experts.hidden_dim, device=device, dtype=torch.bfloat16)
    chosen = torch.rand(tokens, experts.num_experts, device=device).topk(2).indices % 3  # of the last one, nothing
    weights = torch.rand(tokens, 2, device=device)
    with torch.no_grad():
        actual = grouped_experts(experts, x, chosen, weights)
        expected = experts.double()(x.double(), chosen, weights.double())
    assert actual.dtype == x.dtype
    assert relative_error(actual, expected) < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_experts_at_prefill_on_a_gpu(model_type, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "kda_hf.integrations.experts.grouped_experts", lambda *args: calls.append(1) or grouped_experts(*args)
    )
    model = kda_hf.accelerate(make(model_type, "cuda").to(torch.bfloat16))
    sparse = sum(isinstance(module, GroupedExperts) for module in model.modules())
    text_config = model.config.get_text_config()
    assert sparse == 3 and text_config._experts_implementation == "grouped_mm"

    def calls_of(length):
        calls.clear()
        model(prompt("cuda", length=length), use_cache=False)
        return len(calls)

    with torch.no_grad():
        assert calls_of(150) == sparse
        assert calls_of(100) == 0  # too few tokens
        text_config._experts_implementation_internal = "batched_mm"
        assert calls_of(150) == 0
        text_config._experts_implementation_internal = "grouped_mm"
        model.float()
        assert calls_of(150) == 0
    model.bfloat16()
    assert calls_of(150) == 0  # gradients


# ----------------------------------------------------------------------------------------------------------- generate()


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.supports("{mode}", model="{model_type}")
@pytest.mark.parametrize("mode", MODES)
def test_modes(model_type, device, mode):
    model, ids = make(model_type, device), prompt(device)
    torch.manual_seed(7)
    expected = generate(model, ids, **MODES[mode])
    kda_hf.accelerate(model)
    torch.manual_seed(7)
    assert torch.equal(generate(model, ids, **MODES[mode]), expected)


@pytest.mark.supports("chunked prefill", model="{model_type}")
def test_chunked_prefill(model_type, device):
    model, ids = make(model_type, device), prompt(device, length=40)
    expected = generate(model, ids)
    kda_hf.accelerate(model)
    for size in (1, 7, 64):
        assert torch.equal(generate(model, ids, prefill_chunk_size=size), expected), size


@pytest.mark.supports("prompt lookup", "assisted", model="{model_type}")
def test_speculation(model_type, device):
    model = make(model_type, device)
    period = prompt(device, batch=1, length=5)
    ids = period.repeat(1, 4)
    expected = generate(model, ids, max_new_tokens=24)
    with pytest.raises(ValueError, match="stateful"):  # what transformers says without us
        generate(model, ids, prompt_lookup_num_tokens=3)
    kda_hf.accelerate(model)
    assert torch.equal(generate(model, ids, max_new_tokens=24, prompt_lookup_num_tokens=3), expected)
    draft = kda_hf.accelerate(make(model_type, device))  # of other weights: drafts are mostly rejected
    assert torch.equal(generate(model, ids, max_new_tokens=24, assistant_model=draft), expected)
    twin = kda_hf.accelerate(copy.deepcopy(model))
    assert torch.equal(generate(model, ids, max_new_tokens=24, assistant_model=twin), expected)


@pytest.mark.supports("left padding", model="{model_type}")
def test_left_padding(model_type, device):
    model, ids = make(model_type, device), prompt(device, batch=3, length=12)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :11] = 0
    expected = generate(model, ids * mask, attention_mask=mask)
    kda_hf.accelerate(model)
    actual = generate(model, ids * mask, attention_mask=mask)
    assert torch.equal(actual, expected)
    alone = generate(model, ids[1:2, 5:])
    assert torch.equal(actual[1:2, 12:], alone[:, 7:])


def test_padding_behind_tokens_leaves_no_trace(model_type, device, relative_error):
    """transformers' layers let their states decay over it."""
    model = kda_hf.accelerate(make(model_type, device))
    ids = prompt(device, batch=2, length=12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    padded, alone = KDACache(model.config), KDACache(model.config)
    forward(model, ids, padded, attention_mask=mask)
    forward(model, ids[1:, :8], alone)
    for one, other in zip(padded.layers, alone.layers, strict=True):
        if hasattr(one, "recurrent_states"):
            assert relative_error(one.recurrent_states[0][1:], other.recurrent_states[0]) < 1e-5
            assert relative_error(one.conv_states[0][1:], other.conv_states[0]) < 1e-5


@pytest.mark.supports("streaming", model="{model_type}")
def test_streaming(model_type, device):
    class Tokens(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    model, ids, streamer = kda_hf.accelerate(make(model_type, device)), prompt(device, batch=1), Tokens()
    assert streamer.seen == [] and generate(model, ids, streamer=streamer)[0].tolist() == streamer.seen[:-1]


@pytest.mark.supports("static cache", model="{model_type}")
def test_static_cache(model_type, device):
    model, ids = make(model_type, device), prompt(device)
    expected = generate(model, ids)
    kda_hf.accelerate(model)
    assert torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), expected)
    cache = KDACache(model.config, max_cache_len=32)
    assert torch.equal(generate(model, ids, **{CACHE_NAME: cache}, disable_compile=True), expected)


@pytest.mark.supports("several turns", model="{model_type}")
def test_several_turns(model_type, device):
    model, ids = make(model_type, device), prompt(device, batch=1)
    first = generate(model, ids)
    more = torch.cat([first, prompt(device, batch=1, length=6)], 1)
    mask = torch.ones_like(more)  # a token that was chosen may be the one for padding
    second = generate(model, more, attention_mask=mask)
    kda_hf.accelerate(model)
    cache = KDACache(model.config)
    assert torch.equal(generate(model, ids, **{CACHE_NAME: cache}), first)
    assert torch.equal(generate(model, more, attention_mask=mask, **{CACHE_NAME: cache}), second)


@pytest.mark.supports("images", model="glm5_next")
def test_images(device):
    model = make("glm5_next", device)
    config = model.config
    size = config.vision_config.spatial_merge_size
    patches = torch.rand(4 * size**2, 3 * config.vision_config.patch_size**2 * 2, device=device)
    grid = torch.tensor([[1, 2 * size, 2 * size]], device=device)
    config.image_token_id = 5
    ids = prompt(device, batch=1, length=12)
    ids[ids == 5] = 6
    ids[0, 3:7] = 5
    inputs = {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == 5).int()}
    expected = generate(model, ids, **inputs)
    without = generate(model, ids.masked_fill(ids == 5, 6))
    assert not torch.equal(expected[:, 12:], without[:, 12:])
    kda_hf.accelerate(model)
    assert torch.equal(generate(model, ids, **inputs), expected)


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.mark.supports("crop", "snapshot", "fork", "save and load", model="{model_type}")
def test_cache(model_type, device, tmp_path):
    model, ids = kda_hf.accelerate(make(model_type, device)), prompt(device, length=20)
    whole = forward(model, ids)

    def follows(cache, logits=whole, tail=ids[:, 15:]):
        torch.testing.assert_close(forward(model, tail, cache), logits[:, 15:], rtol=1e-4, atol=1e-4)

    cache = KDACache(model.config)
    forward(model, ids[:, :15], cache)
    snapshot, forked = cache.snapshot(), cache.fork(1)
    cache.save(tmp_path / "cache.safetensors")
    follows(cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 15
    follows(cache)
    cache.restore(snapshot)
    follows(cache)
    follows(forked)
    follows(KDACache.load(tmp_path / "cache.safetensors", model.config, device=device))
    twice = KDACache(model.config)
    forward(model, ids[:, :15], twice)
    follows(twice.fork(2), whole.repeat_interleave(2, 0), ids[:, 15:].repeat_interleave(2, 0))
    twice.batch_select_indices(torch.tensor([1], device=device))
    follows(twice, whole[1:], ids[1:, 15:])
    cache.reset()
    torch.testing.assert_close(forward(model, ids, cache), whole, rtol=1e-4, atol=1e-4)


def test_static_cache_goes_back(model_type, device):
    model, ids = kda_hf.accelerate(make(model_type, device)), prompt(device, length=20)
    whole, cache = forward(model, ids), KDACache(model.config, max_cache_len=24)
    for _ in range(2):
        logits = torch.cat([forward(model, ids[:, :15], cache), forward(model, ids[:, 15:], cache)], 1)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
        cache.crop(-5)
        torch.testing.assert_close(forward(model, ids[:, 15:], cache), whole[:, 15:], rtol=1e-4, atol=1e-4)
        cache.reorder_cache(torch.tensor([1, 0], device=device))
        cache.reset()


def test_a_cache_of_another_model_does_not_fit(device):
    model, other = make("kimi_linear", device), make("kimi_linear", device, heads=4)
    cache = KDACache(model.config)
    with pytest.raises(ValueError, match="linear_num_heads"):
        KDACache(other.config).restore(cache.snapshot())


def test_caches_of_transformers_do(model_type, device):
    model, ids = make(model_type, device), prompt(device, length=20)
    whole = forward(model, ids)
    kda_hf.accelerate(model)
    cache = DynamicCache(config=model.config.get_text_config())
    logits = [forward(model, part, cache) for part in (ids[:, :12], ids[:, 12:13], ids[:, 13:])]
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_packed_sequences(model_type, device, relative_error):
    """Of a layer: what comes after one sequence knows nothing of it."""
    model = kda_hf.accelerate(make(model_type, device))
    layer = next(module for module in model.modules() if isinstance(module, KDALayer))
    x = torch.randn(1, 20, 96, device=device)
    bounds = torch.tensor([0, 7, 7, 20], device=device, dtype=torch.int32)
    expected = torch.cat([layer(x[:, :7]), layer(x[:, 7:])], 1)
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        assert relative_error(layer(x, **{name: bounds}), expected) < 1e-5


# -------------------------------------------------------------------------------------------------- the model around it


@pytest.mark.supports("training", model="{model_type}")
def test_gradients(model_type, device, relative_error):
    model, ids = make(model_type, device).train(), prompt(device, length=12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    kda_hf.accelerate(model)
    model(ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == expected.keys() and any("forget_gate" in name for name in gradients)
    for name, gradient in gradients.items():
        if expected[name].norm() > 1e-6:
            assert relative_error(gradient, expected[name]) < 1e-3, name


@pytest.mark.supports("gradient checkpointing", model="{model_type}")
def test_gradient_checkpointing(model_type, device, relative_error):
    model, ids = kda_hf.accelerate(make(model_type, device)).train(), prompt(device, length=12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, gradient in expected.items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-5 or gradient.norm() < 1e-6, name


@pytest.mark.slow
@pytest.mark.supports("torch.compile(fullgraph=True)", model="{model_type}")
@pytest.mark.parametrize("model_type", WITH_GRAPHS, indirect=True)
@torch.no_grad()
def test_compiles_into_one_graph(model_type, device):
    model, ids = kda_hf.accelerate(make(model_type, device)), prompt(device)
    expected = forward(model, ids)
    model.set_experts_implementation("batched_mm")  # which asks the host nothing
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def state_of(model):
    """All that a model is, down to the attributes of its modules."""
    attributes = {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, module in model.named_modules()
    }
    own = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    tensors = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    return own, attributes, tensors


@pytest.mark.supports("undo", model="{model_type}")
def test_undo(model_type, device):
    model, ids = make(model_type, device), prompt(device)
    expected = generate(model, ids)
    before = state_of(model)
    assert kda_hf.accelerate(model) is model
    changed = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, (KDALayer, GroupedExperts))
    }
    assert model.replaced == changed and len(changed) == 6  # three layers of KDA, three of experts
    assert kda_hf.accelerate(model) is model and model.replaced == changed  # twice is once
    generate(model, ids)
    model.undo()
    assert state_of(model) == before
    assert not hasattr(model, "undo") and not isinstance(model, AcceleratedModel)
    assert torch.equal(generate(model, ids), expected)

    with kda_hf.accelerate(model) as same:
        assert same is model and isinstance(model, AcceleratedModel)
    assert state_of(model) == before
    with pytest.raises(KeyError), kda_hf.accelerate(model):
        raise KeyError
    assert state_of(model) == before
    with kda_hf.accelerate(model):
        model.undo()
    assert state_of(model) == before


def test_a_copy_is_of_its_own(model_type, device):
    model, ids = kda_hf.accelerate(make(model_type, device)), prompt(device)
    expected = generate(model, ids)
    copied, replaced = copy.deepcopy(model), model.replaced
    model.undo()
    assert isinstance(copied, AcceleratedModel) and copied.replaced == replaced
    assert torch.equal(generate(copied, ids), expected)
    copied.undo()
    assert type(copied) is type(model)


def test_a_model_without_a_head(device, relative_error):
    model, ids = make("kimi_linear", device).model, prompt(device)
    expected = model(ids).last_hidden_state
    with kda_hf.accelerate(model):
        assert relative_error(model(ids).last_hidden_state, expected) < 1e-5
    assert not isinstance(model, AcceleratedModel)


def test_a_model_within_a_module(device):
    inner, ids = make("kimi_linear", device), prompt(device)
    outer = torch.nn.ModuleDict({"inner": inner})
    expected = generate(inner, ids)
    assert kda_hf.accelerate(outer) is outer
    assert isinstance(generate(inner, ids, return_dict_in_generate=True)[CACHE_NAME], KDACache)
    assert torch.equal(generate(inner, ids), expected)
    inner.undo()
    assert type(inner) is native_class(inner.config)


def test_offloaded_weights(model_type, device, relative_error):
    """accelerate's hooks bring weights when a module is called, also those that a layer uses itself."""
    model, ids = make(model_type, "cpu"), prompt("cpu")
    expected = forward(model, ids)
    hf_accelerate.cpu_offload(model, execution_device=device)
    kda_hf.accelerate(model)
    assert relative_error(forward(model, ids.to(device)), expected) < 1e-5
    model.undo()
    assert relative_error(forward(model, ids.to(device)), expected) < 1e-5


def test_errors(device, tiny_model):
    with pytest.raises(TypeError, match="`model` must be a loaded model, got str"):
        kda_hf.accelerate("moonshotai/Kimi-Linear-48B-A3B-Instruct")
    with pytest.raises(ValueError, match="kimi_linear, glm5_next, bailing_hybrid, or FLA's; it is 'kda_hf'"):
        kda_hf.accelerate(tiny_model())
    with pytest.raises(ValueError, match="it is 'Linear'"):
        kda_hf.accelerate(torch.nn.Linear(2, 2))
    model = make("kimi_linear", device)
    last = [module for module in model.modules() if type(module).__name__ == "KimiLinearDeltaAttention"][-1]
    last.activation = "gelu"
    before = state_of(model)
    with pytest.raises(ValueError, match=r"`model`: model\.layers\.3\.self_attn .* activation is 'gelu'"):
        kda_hf.accelerate(model)
    assert state_of(model) == before


# -------------------------------------------------------------------------------------------------- graphs of its steps


class Recorded:
    """In place of a CUDA graph, where there is none: the same calls, and results in the same place."""

    made = 0

    def __init__(self, program, cache, capacity, records):
        type(self).made += 1
        self.buffers = decode_graph.DecodeBuffers(program, cache, capacity)
        self.program, self.graph, self.nbytes = program, self, self.buffers.nbytes
        self.records, self.recorded = records, {} if records else None
        self.logits = program.embedding.new_full((cache.batch_size, VOCABULARY), -1)

    def replay(self):
        with torch.no_grad():
            self.logits.copy_(self.program.step(self.buffers, self.recorded))


@pytest.fixture
def graphs(monkeypatch, device):
    monkeypatch.setattr(KDALayer, "steps_at_once", lambda *_: True)  # whatever the kernels think of small heads
    if device.type == "cpu":
        monkeypatch.setattr(Recorded, "made", 0)
        monkeypatch.setattr(decode_graph, "DecodeGraph", Recorded)
        monkeypatch.setattr(decode_graph, "has_graphs", lambda device: True)
        monkeypatch.setattr(decode_graph, "_memory_of", lambda device: 2**34)


def graph_count(model):
    return len(decoding.program_of(model).graphs.idle)


@pytest.mark.parametrize("model_type", WITH_GRAPHS, indirect=True)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_graphs(model_type, device, graphs, implementation, monkeypatch):
    model, ids = make(model_type, device), prompt(device, batch=3, length=12)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cases = [{}, {"attention_mask": mask}, {"do_sample": True, "top_k": 9}]
    expected = []
    for case in cases:
        torch.manual_seed(3)
        expected.append(generate(model, ids, **case))
    kda_hf.accelerate(model)
    own = model.config._experts_implementation
    monkeypatch.setattr(decode_graph.GraphStepper, "_capacity", lambda self: self.length + 5)  # so that it has to grow
    for _ in range(2):
        for case, tokens in zip(cases, expected, strict=True):
            torch.manual_seed(3)
            assert torch.equal(generate(model, ids, **case), tokens), case
    assert graph_count(model) > 0
    assert model.config._experts_implementation == own
    model.undo()
    assert torch.equal(generate(model, ids), expected[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.supports("CUDA graphs", model="{model_type}", backend="cuda")
@pytest.mark.parametrize("model_type", WITH_GRAPHS, indirect=True)
@pytest.mark.parametrize("heads", [2, 4])
def test_graphs_on_a_gpu(model_type, heads):
    """As they are captured for widths that there are kernels for."""
    model, ids = make(model_type, "cuda", heads=heads, head_dim=64), prompt("cuda", batch=3, length=70)
    expected = generate(model, ids, max_new_tokens=40)
    kda_hf.accelerate(model)
    for _ in range(2):
        assert torch.equal(generate(model, ids, max_new_tokens=40), expected)
    program = decoding.program_of(model)
    assert graph_count(model) == 1 and program.graphs.failure is None
    model.to(torch.bfloat16)
    assert generate(model, ids).shape == (3, 86)
    assert graph_count(model) == 1 and decoding.program_of(model) is not program


@pytest.mark.parametrize("model_type", WITH_GRAPHS, indirect=True)
def test_graphs_leave_a_cache_that_goes_on(model_type, device, graphs):
    model, ids = kda_hf.accelerate(make(model_type, device)), prompt(device)
    cache = KDACache(model.config, max_rollback=8)
    tokens = generate(model, ids, **{CACHE_NAME: cache}, max_new_tokens=20)
    assert graph_count(model) == 1
    whole = forward(model, tokens)
    torch.testing.assert_close(forward(model, tokens[:, -1:], cache), whole[:, -1:], rtol=1e-4, atol=1e-4)
    cache.crop(-6)
    torch.testing.assert_close(forward(model, tokens[:, -6:], cache), whole[:, -6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", WITH_GRAPHS, indirect=True)
def test_graphs_know_when_the_model_has_changed(model_type, device, graphs):
    model, ids = kda_hf.accelerate(make(model_type, device)), prompt(device)
    generate(model, ids)
    with torch.no_grad():
        model.lm_head.weight.neg_()  # its values: the graph reads them
    changed = generate(model, ids)
    model.undo()
    assert torch.equal(generate(model, ids), changed)
    kda_hf.accelerate(model)
    layer = next(module for module in model.modules() if isinstance(module, KDALayer))
    handle = layer.register_forward_hook(lambda module, args, output: -output)  # what it does
    hooked = generate(model, ids)
    model.undo()
    assert torch.equal(generate(model, ids), hooked)
    handle.remove()


def test_no_graph(device, graphs, caplog, monkeypatch):
    """Where none can be captured, tokens are the same, and the log says why, once a program."""
    model, ids = make("kimi_linear", device), prompt(device)
    expected = generate(model, ids)
    kda_hf.accelerate(model)

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graph, "DecodeGraph", fails)
    with caplog.at_level(logging.WARNING, "kda_hf"):
        for _ in range(2):
            assert torch.equal(generate(model, ids), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding without a CUDA graph: a step can't be captured: operation not permitted when stream is capturing"
    ]


def test_glm5_next_decodes_without_graphs(device, graphs):
    """Its attention looks at a number of keys that changes."""
    model, ids = make("glm5_next", device), prompt(device)
    expected = generate(model, ids)
    kda_hf.accelerate(model)
    assert torch.equal(generate(model, ids), expected)
    assert graph_count(model) == 0
    assert "another kind" in decoding.program_of(model).graphs.refusal(KDACache(model.config))


# ----------------------------------------------------------------------------------------------------- the command line


def test_command_line(tmp_path, monkeypatch, capsys):
    """It accelerates what it can: a conversation goes on from a file, which takes a cache that can be saved."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "models" / "kda-hf-tiny")
    config = configuration("kimi_linear")
    config.vocab_size = len(tokenizer)
    native_class(config)(config).save_pretrained(tmp_path / "kimi")
    tokenizer.save_pretrained(tmp_path / "kimi")
    arguments = ["--model", str(tmp_path / "kimi"), "--greedy", "--max-new-tokens", "4", "--device", "cpu"]
    cli.main(["generate", *arguments, "--prompt", "In the beginning"])
    assert "backend torch on CPU" in capsys.readouterr().out
    session = tmp_path / "session.safetensors"
    for _ in range(2):
        answers = iter(["Who was the king?", ""])
        monkeypatch.setattr("builtins.input", lambda _, answers=answers: next(answers))
        cli.main(["chat", *arguments, "--session", str(session)])
    assert "goes on after" in capsys.readouterr().out and session.exists()
