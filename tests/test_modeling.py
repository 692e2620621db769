"""The layer and the models, against transformers' own and against themselves: padded, packed, in pieces, reloaded."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextLinearAttention
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from kda_hf import KDACache, KDAConfig, KDAForCausalLM, KDAModel, KimiDeltaAttention


NATIVE = {
    "softplus": (KimiLinearConfig, KimiLinearDeltaAttention),
    "safe": (Glm5NextTextConfig, Glm5NextTextLinearAttention),
}
PURE_KDA = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}


def native_pair(gate, device, heads=2, head_dim=32, hidden=64):
    """transformers' layer with random weights, and ours with the same ones."""
    config_class, layer_class = NATIVE[gate]
    shape = {"hidden_size": hidden, "num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    linear = {"linear_num_heads": heads, "linear_head_dim": head_dim}
    native_config = config_class(**shape, **linear, mlp_layer_types=["dense"])
    native = layer_class(native_config, 0)
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(-1, 2))
            elif name.endswith("dt_bias"):
                parameter.copy_(torch.randn_like(parameter) * 2 - 2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)

    lower_bound = -5.0 if gate == "safe" else None
    config = KDAConfig(**shape, **linear, linear_lower_bound=lower_bound, rms_norm_eps=native_config.rms_norm_eps)
    ours = KimiDeltaAttention(config, 0)
    weights = {name.removeprefix("forget_gate."): value for name, value in native.state_dict().items()}
    convs = weights.pop("conv1d.weight").chunk(3)
    weights |= dict(zip(("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"), convs, strict=True))
    ours.load_state_dict(weights)
    # transformers' layer stays on the CPU, where fp32 is fp32: matrix products of a GPU may be in tf32
    return native.eval(), ours.to(device).eval(), native_config, config


@pytest.mark.usefixtures("plain_native_operators")
@pytest.mark.parametrize("gate", NATIVE)
@pytest.mark.parametrize("lengths", [[1], [70], [130, 1, 1], [5, 64, 3, 1]])
@torch.no_grad()
def test_layer_equals_transformers(gate, lengths, device, relative_error):
    native, ours, native_config, config = native_pair(gate, device)
    native_cache, cache = DynamicCache(config=native_config), KDACache(config)
    for length in lengths:
        x = torch.randn(2, length, 64, device=device)
        expected = native(x.cpu(), native_cache)
        assert relative_error(ours(x, past_key_values=cache), expected) < 1e-5
    state = native_cache.layers[0].recurrent_states[0]
    assert relative_error(cache.layers[0].recurrent_states[0], state) < 1e-5
    assert relative_error(cache.layers[0].conv_states[0], native_cache.layers[0].conv_states[0]) < 1e-5


@pytest.mark.usefixtures("plain_native_operators")
@pytest.mark.parametrize("gate", NATIVE)
@torch.no_grad()
def test_layer_equals_transformers_without_cache(gate, device, relative_error):
    native, ours, _, _ = native_pair(gate, device)
    x = torch.randn(3, 77, 64, device=device)
    assert relative_error(ours(x), native(x.cpu())) < 1e-5


MODELS = {
    "hybrid": {},
    "hybrid with rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "use_qk_norm": True},
    "softplus": {"linear_lower_bound": None},
    "pure": PURE_KDA,
    "grouped values": {"linear_num_value_heads": 4, "linear_value_head_dim": 8},
}


@pytest.fixture(params=MODELS)
def model(request, tiny_model):
    return tiny_model(**MODELS[request.param])


@pytest.mark.supports("{side} padding", model="kda_hf")
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(model, side, device, relative_error):
    lengths, longest = [3, 70, 41], 70
    ids = torch.randint(97, (3, longest), device=device)
    mask = torch.zeros(3, longest, dtype=torch.long, device=device)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    cache = KDACache(model.config)
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    padded = model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
    # and go on from there with several tokens, then one
    for step in (5, 1):
        new = torch.randint(97, (3, step), device=device)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        position_ids = (mask.cumsum(1) - 1).clamp_min(0)[:, -step:]
        logits = model(new, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
        padded = torch.cat([padded, logits], 1)
    for row in range(3):
        tokens = mask[row].bool()
        alone = model(ids[row : row + 1, tokens]).logits[0]
        assert relative_error(padded[row, tokens], alone) < 1e-4


@torch.no_grad()
def test_padding_inside_a_layer_leaves_no_trace(tiny_config, device, relative_error):
    config = tiny_config()
    layer = KimiDeltaAttention(config, 0).to(device)
    KDAForCausalLM(config)._init_weights(layer)
    x = torch.randn(2, 50, 32, device=device)
    mask = torch.rand(2, 50, device=device) < 0.6
    cache = KDACache(config)
    out = layer(x, attention_mask=mask, past_key_values=cache)
    for row in range(2):
        alone_cache = KDACache(config)
        alone = layer(x[row : row + 1, mask[row]], past_key_values=alone_cache)
        assert relative_error(out[row, mask[row]], alone[0]) < 1e-5
        for kind in ("conv_states", "recurrent_states"):
            ours = getattr(cache.layers[0], kind)[0][row]
            assert relative_error(ours, getattr(alone_cache.layers[0], kind)[0][0]) < 1e-5
    assert (out[~mask] == 0).all()


@pytest.mark.supports("packed sequences", model="kda_hf")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_packed_equals_separate(model, dtype, device, relative_error):
    lengths = [5, 1, 66, 17]
    ids = torch.randint(97, (1, sum(lengths)), device=device)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype, device=device)
    packed = model(ids, cu_seqlens=cu_seqlens).logits[0].split(lengths)
    for logits, tokens in zip(packed, ids.split(lengths, dim=1), strict=True):
        assert relative_error(logits, model(tokens).logits[0]) < 1e-4


@torch.no_grad()
def test_packed_layer_fills_a_cache_of_sequences(tiny_model, device, relative_error):
    model = tiny_model(**PURE_KDA)
    cu_seqlens = torch.tensor([0, 7, 7, 20], device=device)
    cache = KDACache(model.config)
    ids = torch.randint(97, (1, 20), device=device)
    model(ids, cu_seqlens=cu_seqlens, past_key_values=cache)
    alone = KDACache(model.config)
    model(ids[:, 7:], past_key_values=alone)
    state = cache.layers[1].recurrent_states[0]
    assert state.shape[0] == 3 and (state[1] == 0).all()
    assert relative_error(state[2], alone.layers[1].recurrent_states[0][0]) < 1e-5


@pytest.mark.parametrize(
    "make_cache", [KDACache, lambda c: KDACache(c, max_cache_len=140), lambda c: DynamicCache(config=c)]
)
@pytest.mark.parametrize("pieces", [[140], [64, 64, 12], [1] * 5 + [100] + [1] * 35, [3, 17, 120]])
@torch.no_grad()
def test_forward_in_pieces(model, make_cache, pieces, device, relative_error):
    ids = torch.randint(97, (2, 140), device=device)
    expected = model(ids).logits
    cache = make_cache(model.config)
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
    assert relative_error(torch.cat(logits, dim=1), expected) < 1e-4


@torch.no_grad()
def test_static_cache_of_transformers(tiny_model, device, relative_error):
    model = tiny_model()
    ids = torch.randint(97, (2, 20), device=device)
    cache = StaticCache(config=model.config, max_cache_len=20)
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split([15, 1, 4], dim=1)]
    assert relative_error(torch.cat(logits, dim=1), model(ids).logits) < 1e-4


@torch.no_grad()
def test_inputs_embeds(model, device, relative_error):
    ids = torch.randint(97, (2, 20), device=device)
    assert relative_error(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits) < 1e-6


@torch.no_grad()
def test_longer_than_max_position_embeddings(tiny_model, device):
    for overrides in ({}, PURE_KDA):
        model = tiny_model(max_position_embeddings=16, **overrides)
        ids = torch.randint(97, (1, 40), device=device)
        assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 44)


@pytest.mark.parametrize("backbone", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_attention_layers_fit_the_backbones(backbone, device, relative_error):
    """A model of attention layers alone is the backbone: same weights, same names, same logits."""
    config = AutoConfig.for_model(
        backbone,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=backbone == "llama",
    )
    theirs = AutoModelForCausalLM.from_config(config).to(device).eval()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ours = KDAForCausalLM(
        KDAConfig(
            **{name: getattr(config, name) for name in shared},
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["full_attention"] * 2,
            rope_parameters=config.rope_parameters,
            rms_norm_eps=config.rms_norm_eps,
            attention_bias=backbone in ("llama", "qwen2"),
            attention_output_bias=backbone == "llama",
            use_qk_norm=backbone == "qwen3",
        )
    )
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(97, (2, 30), device=device)
    assert relative_error(ours.to(device).eval()(ids).logits, theirs(ids).logits) < 1e-5


@pytest.mark.supports("save_pretrained", model="kda_hf")
def test_auto_classes_and_reload(model, tmp_path, device):
    model.save_pretrained(tmp_path)
    ids = torch.randint(97, (1, 9), device=device)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    assert type(loaded) is KDAForCausalLM
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    base = AutoModel.from_pretrained(tmp_path).to(device)
    assert type(base) is KDAModel
    torch.testing.assert_close(base(ids)[0], model.model(ids)[0], rtol=0, atol=0)
    assert AutoConfig.from_pretrained(tmp_path).to_dict().keys() == model.config.to_dict().keys()


def test_tied_embeddings_are_saved_once(tiny_model, tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@torch.no_grad()
def test_device_map_auto(tiny_model, tmp_path, relative_error):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    ids = torch.randint(97, (1, 9))
    assert relative_error(loaded(ids.to(loaded.device)).logits, model(ids.to(model.device)).logits) < 1e-4


@pytest.mark.parametrize("name", ["A_log", "dt_bias", "q_conv1d.weight", "f_b_proj.weight", "o_norm.weight"])
@pytest.mark.parametrize("fault", ["missing", "wrong shape"])
def test_broken_checkpoints_name_the_parameter(tiny_model, tmp_path, name, fault):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    key = f"model.layers.1.linear_attn.{name}"
    weight = weights.pop(key)
    if fault == "wrong shape":
        weights[key] = torch.cat([weight, weight])
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=key):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_kimi_shaped_a_log_loads(tiny_config):
    layer = KimiDeltaAttention(tiny_config(), 0)
    weights = layer.state_dict()
    a_log = torch.randn(2)
    layer.load_state_dict(weights | {"A_log": a_log.view(1, 1, 2, 1)})
    assert torch.equal(layer.A_log, a_log)


@pytest.mark.supports("training", model="kda_hf")
def test_loss_and_gradients(model, device):
    ids = torch.randint(97, (2, 70), device=device)
    model.train()
    output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_rope_that_no_layer_needs(tiny_model, device):
    model = tiny_model(
        layer_types=["linear_attention"] * 4, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
    )
    ids = torch.randint(3, 97, (1, 9), device=device)
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model(tokens).logits[:, 8:-1].argmax(-1), tokens[:, 9:])


@pytest.mark.supports("gradient checkpointing", model="kda_hf")
def test_gradient_checkpointing_changes_nothing(tiny_model, device):
    model = tiny_model().train()
    ids = torch.randint(97, (2, 33), device=device)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], msg=name)


def test_gradient_checkpointing_leaves_a_given_cache_alone(tiny_model, device):
    """The backward pass runs the layers again, and would update it twice."""
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    ids, cache = torch.randint(97, (2, 5), device=device), KDACache(model.config)
    model(ids, labels=ids, past_key_values=cache).loss.backward()
    assert cache.get_seq_length() == 0


def test_outputs_asked_for(tiny_model, device):
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids = torch.randint(97, (2, 7), device=device)
    outputs = model(ids, output_hidden_states=True, output_attentions=True, logits_to_keep=2)
    assert outputs.logits.shape == (2, 2, 97)
    assert [h.shape for h in outputs.hidden_states] == [(2, 7, 32)] * 5
    assert [a.shape for a in outputs.attentions] == [(2, 4, 7, 7)]
    assert isinstance(model(ids, return_dict=False), tuple)
    assert isinstance(outputs.past_key_values, KDACache)
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.supports("torch.compile(fullgraph=True)", model="kda_hf")
@pytest.mark.slow
@torch.no_grad()
def test_compiles_into_one_graph(tiny_model, device, relative_error):
    model = tiny_model()
    ids = torch.randint(97, (2, 20), device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(ids, use_cache=False).logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize(
    "argument, call",
    [
        ("inputs_embeds", lambda m, ids, cu: m()),
        ("cu_seqlens", lambda m, ids, cu: m(ids.expand(2, -1), cu_seqlens=cu)),
        ("cu_seqlens", lambda m, ids, cu: m(ids, cu_seqlens=cu, past_key_values=KDACache(m.config))),
        ("attention_mask", lambda m, ids, cu: m(ids, cu_seqlens=cu, attention_mask=torch.ones_like(ids))),
        ("attention_mask", lambda m, ids, cu: m.model.layers[0].linear_attn(torch.ones(1, 9, 32), ids[:, :4])),
    ],
)
def test_bad_input_names_the_argument(tiny_config, argument, call):
    model = KDAForCausalLM(tiny_config())
    with pytest.raises(ValueError, match=argument):
        call(model, torch.zeros(1, 9, dtype=torch.long), torch.tensor([0, 4, 9]))


@pytest.mark.parametrize("head_dims", [(16, 16), (16, 8), (8, 16)])
@torch.no_grad()
def test_output_gate_bias_and_width_of_the_decay(head_dims, tiny_model, device, relative_error):
    """As FLA's layers have them: in a forward, in steps with a cache, after a crop, and in `generate()`."""
    K, V = head_dims
    dims = {"linear_head_dim": K, "linear_value_head_dim": V, "linear_decay_low_rank_dim": V}
    model = tiny_model(**dims, linear_output_gate_bias=True)
    layer = model.model.layers[0].linear_attn
    assert layer.f_a_proj.weight.shape == (V, 32) and layer.f_b_proj.weight.shape == (2 * K, V)
    assert layer.g_b_proj.bias.shape == (2 * V,)
    x = torch.randn(2, 30, 32, device=device)
    assert layer(x).norm() > 1e-3
    layer.g_b_proj.bias.fill_(-100.0)  # the gate lets nothing through
    assert layer(x).norm() < 1e-20

    layer.g_b_proj.bias.normal_()
    ids = torch.randint(97, (2, 30), device=device)
    expected, cache = model(ids).logits, KDACache(model.config)
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split([20] + [1] * 10, dim=1)]
    assert relative_error(torch.cat(logits, dim=1), expected) < 1e-4
    cache.crop(-5)
    assert relative_error(model(ids[:, 25:], past_key_values=cache).logits, expected[:, 25:]) < 1e-4
    tokens = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for length in range(30, 38):
        assert (model(tokens[:, :length]).logits[:, -1].argmax(-1) == tokens[:, length]).all()
