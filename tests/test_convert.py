"""Checkpoints of flash-linear-attention and ours: the same tensors, the same logits, and nothing half done."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kda_hf import KDAConfig, convert, files
from kda_hf.convert import config_from_fla, config_to_fla, convert_checkpoint


# ------------------------------------------------------------------------- FLA's model, from what its code says of it

BASE = {
    "architectures": ["KDAForCausalLM"],
    "model_type": "kda",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "dtype": "float32",
}
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 500.0}
CASES: dict[str, dict] = {
    "softplus": {},
    "safe gate": {"safe_gate": True, "lower_bound": -5.0},
    "bounded": {"lower_bound": -3.0},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "grouped": {"num_v_heads": 4},
    "wide values": {"expand_v": 2.0, "num_v_heads": 4},
    "narrow values": {"expand_v": 0.5},
    "hybrid": {"attn": ATTENTION},
    "list of attentions": {"attn": [ATTENTION | {"layers": [0]}, ATTENTION]},
    "tied": {"tie_word_embeddings": True},
    "by ratio": {"intermediate_size": None, "hidden_ratio": 3},
    "short convolution": {"conv_size": 2, "norm_eps": 0.1},
}


def fla_sizes(fields):
    """Heads of values, V and the MLP's width as FLA has them."""
    value_heads = fields.get("num_v_heads") or fields["num_heads"]
    width = fields["intermediate_size"]
    if width is None:
        width = int(fields["hidden_size"] * fields["hidden_ratio"] * 2 / 3)
        width = (width + 255) // 256 * 256
    return value_heads, int(fields["head_dim"] * fields.get("expand_v", 1.0)), width


def attention_of(fields, layer):
    specs = fields.get("attn") or []
    return next((spec for spec in ([specs] if isinstance(specs, dict) else specs) if layer in spec["layers"]), None)


def fla_shapes(fields):
    D, H, K = fields["hidden_size"], fields["num_heads"], fields["head_dim"]
    HV, V, width = fla_sizes(fields)
    shapes = {"model.embeddings.weight": [fields["vocab_size"], D], "model.norm.weight": [D]}
    if not fields.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [fields["vocab_size"], D]
    for i in range(fields["num_hidden_layers"]):
        layer = {"attn_norm.weight": [D], "mlp_norm.weight": [D]}
        layer |= {"mlp.gate_proj.weight": [width, D], "mlp.up_proj.weight": [width, D]}
        layer["mlp.down_proj.weight"] = [D, width]
        if spec := attention_of(fields, i):
            rows = {"q": D, "k": D // spec["num_heads"] * spec["num_kv_heads"]}
            for name in "qkv":
                layer[f"attn.{name}_proj.weight"] = [rows.get(name, rows["k"]), D]
                if spec.get("qkv_bias"):
                    layer[f"attn.{name}_proj.bias"] = [rows.get(name, rows["k"])]
            layer["attn.o_proj.weight"] = [D, D]
        else:
            for name, rows in {"q": H * K, "k": H * K, "v": HV * V}.items():
                layer[f"attn.{name}_proj.weight"] = [rows, D]
                layer[f"attn.{name}_conv1d.weight"] = [rows, 1, fields.get("conv_size", 4)]
            layer |= {"attn.f_proj.0.weight": [V, D], "attn.f_proj.1.weight": [HV * K, V]}
            layer |= {"attn.g_proj.0.weight": [V, D], "attn.g_proj.1.weight": [HV * V, V]}
            layer |= {"attn.g_proj.1.bias": [HV * V], "attn.b_proj.weight": [HV, D], "attn.o_norm.weight": [V]}
            layer |= {"attn.A_log": [HV], "attn.dt_bias": [HV * K], "attn.o_proj.weight": [D, HV * V]}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def fla_checkpoint(path, fields=BASE, dtype=torch.float32):
    """A directory with random weights of which no part can be left out unnoticed; A_log and dt_bias are in fp32."""
    tensors = {}
    for name, shape in fla_shapes(fields).items():
        tensor = torch.randn(shape) * 0.3
        if "norm" in name:
            tensor += 1
        tensors[name] = tensor if name.endswith(("A_log", "dt_bias")) else tensor.to(dtype)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(fields))
    return tensors


def fla_logits(fields, tensors, ids):
    """FLA's `KDAForCausalLM` in plain PyTorch, token by token, with its names of tensors and fields. ids `[T]`."""
    eps = fields.get("norm_eps", 1e-6)

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def kda(x, w):
        H, K = fields["num_heads"], fields["head_dim"]
        HV, V, _ = fla_sizes(fields)

        def convolved(name):
            weight = w[f"{name}_conv1d.weight"]  # [D, 1, W], the newest token last
            y = F.pad((x @ w[f"{name}_proj.weight"].T).T, (weight.shape[-1] - 1, 0))
            return F.silu(F.conv1d(y[None], weight, groups=len(weight))[0].T)

        q, k = (convolved(name).view(-1, H, K).repeat_interleave(HV // H, 1) for name in "qk")
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        v = convolved("v").view(-1, HV, V)
        g = (x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]).view(-1, HV, K)
        rate, bound = w["A_log"].exp()[:, None], fields.get("lower_bound")
        g = -rate * F.softplus(g) if bound is None else bound * torch.sigmoid(rate * g)
        beta = torch.sigmoid(x @ w["b_proj.weight"].T) * (2 if fields.get("allow_neg_eigval") else 1)
        state, outputs = torch.zeros(HV, K, V), []
        for t in range(len(x)):
            state = state * g[t].exp()[..., None]
            read = torch.einsum("hkv,hk->hv", state, k[t])
            state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - read))
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(K))
        gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
        o = norm(torch.stack(outputs), w["o_norm.weight"]) * torch.sigmoid(gate.view(-1, HV, V))
        return o.flatten(1) @ w["o_proj.weight"].T

    def rotated(x, theta):
        """The two halves of each head [T, heads, K] by angles of position and channel."""
        half = x.shape[-1] // 2
        angles = torch.arange(len(x))[:, None] / theta ** (torch.arange(half) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.split(half, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def attention(x, w, spec):
        def projected(name):
            y = x @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0.0)
            return y.view(len(x), -1, fields["hidden_size"] // spec["num_heads"])

        q, k = (rotated(projected(name), spec["rope_theta"]) for name in "qk")
        v, group = projected("v"), spec["num_heads"] // spec["num_kv_heads"]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        return torch.einsum("hts,shk->thk", scores.softmax(-1), v).flatten(1) @ w["o_proj.weight"].T

    x = tensors["model.embeddings.weight"][ids]
    for i in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("attn."): tensor for name, tensor in w.items()}
        y, spec = norm(x, w["attn_norm.weight"]), attention_of(fields, i)
        x = x + (attention(y, mixer, spec) if spec else kda(y, mixer))
        y = norm(x, w["mlp_norm.weight"])
        y = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + y @ w["mlp.down_proj.weight"].T
    head = tensors.get("lm_head.weight", tensors["model.embeddings.weight"])
    return norm(x, tensors["model.norm.weight"]) @ head.T


# ------------------------------------------------------------------------------------------------ what a checkpoint is


def tensors_of(path):
    return {name: tensor for file in Path(path).glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def fields_of(path):
    return json.loads((Path(path) / "config.json").read_text())


def ours_of(fields):
    """What our configuration says, but for versions."""
    return {k: v for k, v in config_from_fla(fields).to_dict().items() if k not in convert._WRITTEN_ANEW}


def content_of(directory):
    return {
        path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if not path.is_dir()
    }


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_flas_model(case, tmp_path, relative_error):
    fields = BASE | CASES[case]
    tensors = fla_checkpoint(tmp_path / "fla", fields)
    convert_checkpoint(tmp_path / "fla", tmp_path / "ours")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(97, (20,))
    logits = model(ids[None]).logits[0]
    assert relative_error(logits, fla_logits(fields, tensors, ids)) < 1e-5
    for name, tensor in tensors.items():  # and each tensor counts
        assert relative_error(logits, fla_logits(fields, tensors | {name: tensor * 1.3 + 0.1}, ids)) > 1e-5, name


@pytest.mark.parametrize("size", ["5GB", "20KB", 1])
@pytest.mark.parametrize("case", CASES)
def test_fla_to_ours_and_back(case, size, tmp_path):
    fields = BASE | CASES[case] | {"dtype": "bfloat16"}
    tensors = fla_checkpoint(tmp_path / "fla", fields, torch.bfloat16)
    assert convert_checkpoint(tmp_path / "fla", tmp_path / "ours", max_shard_size=size) == tmp_path / "ours"
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", max_shard_size=size)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)
    assert ours_of(fields_of(tmp_path / "back")) == ours_of(fields)
    assert fields_of(tmp_path / "ours")["dtype"] == fields_of(tmp_path / "back")["dtype"] == "bfloat16"
    files = sorted(path.name for path in (tmp_path / "ours").glob("model*"))
    assert files == ["model.safetensors"] if size == "5GB" else len(files) > 2


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"linear_lower_bound": None, "allow_neg_eigval": True},
        {"linear_lower_bound": 0.0, "linear_output_gate_bias": True},
        {"linear_num_value_heads": 4, "linear_value_head_dim": 5, "linear_decay_low_rank_dim": 5},
        {"tie_word_embeddings": True, "eos_token_id": [3, 4], "bos_token_id": 5},
        {"layer_types": ["full_attention"] * 2, "attention_bias": True, "attention_output_bias": False},
        {"layer_types": ["linear_attention", "full_attention"]},
    ],
)
def test_ours_to_fla_and_back(overrides, tiny_model, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 100.0}
    fields = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"rope_parameters": rope} if "full_attention" in overrides.get("layer_types", ()) else {}
    model = tiny_model(**(fields | overrides)).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "fla", "fla")
    assert fla_shapes(fields_of(tmp_path / "fla")) == {
        k: list(v.shape) for k, v in tensors_of(tmp_path / "fla").items()
    }
    convert_checkpoint(tmp_path / "fla", tmp_path / "back", "kda_hf")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "ours"))
    before, after = (fields_of(tmp_path / name) for name in ("ours", "back"))
    if "full_attention" not in before["layer_types"]:  # fields of attention have no meaning
        for name in ("num_key_value_heads", "head_dim"):
            del before[name], after[name]
    assert after == before


@torch.no_grad()
def test_a_bias_that_fla_has_trained_stays(tiny_model, tmp_path, relative_error):
    pure = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}
    model = tiny_model(**pure, linear_lower_bound=None).cpu()
    model.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "fla")
    tensors, ids = tensors_of(tmp_path / "fla"), torch.randint(97, (12,))
    biases = [name for name in tensors if name.endswith("g_proj.1.bias")]
    assert len(biases) == 2 and not any(tensors[name].any() for name in biases)
    fields = fields_of(tmp_path / "fla")
    expected = fla_logits(fields, tensors, ids)
    assert relative_error(model(ids[None]).logits[0], expected) < 1e-5

    tensors[biases[1]] += 1
    save_file(tensors, tmp_path / "fla" / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "fla", tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert trained.config.linear_output_gate_bias
    assert relative_error(trained(ids[None]).logits[0], fla_logits(fields, tensors, ids)) < 1e-5


def test_shards_have_an_index_and_a_bound(tmp_path, monkeypatch):
    tensors = fla_checkpoint(tmp_path / "fla")
    sizes = []

    def counting_save(shard, path, metadata):
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
        save_file(shard, path, metadata=metadata)

    monkeypatch.setattr(convert, "save_file", counting_save)
    target = convert_checkpoint(tmp_path / "fla", tmp_path / "ours", max_shard_size="20KB")
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(sizes) == total and max(sizes) <= 20_000 and len(sizes) > 2
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    for name, file in index["weight_map"].items():
        assert name in load_file(target / file)
    # and from many files into one
    again = convert_checkpoint(target, tmp_path / "again")
    assert_same_bits(load_file(again / "model.safetensors"), tensors)


def test_a_tied_head_that_was_saved_stays(tmp_path):
    fields = BASE | {"tie_word_embeddings": True}
    tensors = fla_checkpoint(tmp_path / "fla", fields)
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone()
    save_file(tensors, tmp_path / "fla" / "model.safetensors")
    convert_checkpoint(tmp_path / "fla", tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    fla_checkpoint(tmp_path / "snapshot")
    monkeypatch.setattr(files, "snapshot_download", lambda name, **kwargs: {"someone/kda": tmp_path / "snapshot"}[name])
    assert len(tensors_of(convert_checkpoint("someone/kda", tmp_path / "ours"))) == len(
        tensors_of(tmp_path / "snapshot")
    )

    def offline(name, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(files, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="someone/kda .*: no connection"):
        convert_checkpoint("someone/kda", tmp_path / "again")


def test_what_comes_along(tmp_path):
    fla_checkpoint(tmp_path / "fla")
    copied = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
    copied += [
        "chat_template.jinja",
        "merges.txt",
        "vocab.json",
        "tokenizer.model",
        "additional_chat_templates/a.jinja",
    ]
    for name in [*copied, "README.md", "modeling_kda.py", "optimizer.pt", "training_args.bin"]:
        path = tmp_path / "fla" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    target = convert_checkpoint(tmp_path / "fla", tmp_path / "ours")
    assert {str(name) for name in content_of(target)} == {*copied, "config.json", "model.safetensors"}
    assert all((target / name).read_text() == name for name in copied)


# ------------------------------------------------------------------------------------------------- configuration fields


# For each field of FLA's a value that is not the default, and fields of ours that it leads to: none where it makes no
# difference, None where it is refused.
FLA_FIELDS: dict[str, tuple] = {
    "vocab_size": (50, {"vocab_size": 50}),
    "hidden_size": (64, {"hidden_size": 64}),
    "hidden_ratio": (2, {}),  # BASE has `intermediate_size`
    "intermediate_size": (None, {"intermediate_size": 256}),
    "hidden_act": ("powlu", None),
    "num_hidden_layers": (3, {"num_hidden_layers": 3, "layer_types": ["linear_attention"] * 3}),
    "num_heads": (4, {"linear_num_heads": 4, "linear_num_value_heads": 4}),
    "num_v_heads": (6, {"linear_num_value_heads": 6}),
    "head_dim": (8, {"linear_head_dim": 8, "linear_value_head_dim": 8}),
    "expand_v": (0.25, {"linear_value_head_dim": 4, "linear_decay_low_rank_dim": 4}),
    "use_short_conv": (False, None),
    "conv_size": (3, {"linear_conv_kernel_dim": 3}),
    "safe_gate": (True, None),  # without a bound
    "lower_bound": (-2.5, {"linear_lower_bound": -2.5}),
    "allow_neg_eigval": (True, {"allow_neg_eigval": True}),
    "attn": (ATTENTION, {"layer_types": ["linear_attention", "full_attention"], "attention_bias": True, "head_dim": 8}),
    "norm_eps": (1e-5, {"rms_norm_eps": 1e-5}),
    "max_position_embeddings": (99, {"max_position_embeddings": 99}),
    "initializer_range": (0.5, {"initializer_range": 0.5}),
    "use_cache": (False, {"use_cache": False}),
    "use_l2warp": (True, None),
    "attnres_block_size": (2, None),
    "pad_token_id": (7, {"pad_token_id": 7}),
    "bos_token_id": (None, {"bos_token_id": None}),
    "eos_token_id": (8, {"eos_token_id": 8}),
    "tie_word_embeddings": (True, {"tie_word_embeddings": True}),
    "attn_mode": ("fused_recurrent", {}),
    "fuse_norm": (False, {}),
    "fuse_swiglu": (False, {}),
    "fuse_cross_entropy": (False, {}),
}


def test_all_fields_of_fla_are_here():
    assert FLA_FIELDS.keys() == convert._FLA_DEFAULTS.keys() | convert._FLA_KERNEL_CHOICES


@pytest.mark.parametrize("field", FLA_FIELDS)
def test_field_of_fla(field):
    value, expected = FLA_FIELDS[field]
    fields = BASE | {field: value}
    if expected is None:
        with pytest.raises(ValueError, match=f"`{'lower_bound' if field == 'safe_gate' else field}`"):
            config_from_fla(fields)
        return
    config = ours_of(fields)
    assert expected.items() <= config.items()
    assert expected or config == ours_of(BASE)
    back = config_to_fla(config_from_fla(fields))
    assert ours_of(back) == config
    if expected and field not in ("attn", "intermediate_size"):
        assert back[field] == value


def test_defaults_of_fla():
    config = config_from_fla({"model_type": "kda"})
    assert (config.linear_lower_bound, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        None,
        1,
        2,
        None,
    )
    assert (config.linear_num_heads, config.linear_head_dim, config.intermediate_size) == (16, 128, 5632)
    assert config.linear_output_gate_bias and config.rms_norm_eps == 1e-6 and config.max_position_embeddings == 2048
    assert set(config.layer_types) == {"linear_attention"} and len(config.layer_types) == 24


def test_fields_of_any_configuration():
    fields = {name: value for name, value in BASE.items() if name != "dtype"}
    general = {
        "torch_dtype": "bfloat16",
        "transformers_version": "4.56.0",
        "_name_or_path": "somewhere",
        "auto_map": {},
    }
    config = config_from_fla(fields | general | {"output_hidden_states": True})
    assert config.dtype in (torch.bfloat16, "bfloat16") and config.output_hidden_states
    back = config_to_fla(config)
    assert back["dtype"] == "bfloat16" and back["output_hidden_states"] is True
    assert not {"torch_dtype", "_name_or_path", "auto_map", "id2label"} & back.keys()


def test_attention_of_fla():
    config = config_from_fla(BASE | {"attn": {"layers": [0], "num_heads": 2}})
    assert config.layer_types == ["full_attention", "linear_attention"]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 16)
    assert not config.attention_bias and not config.attention_output_bias and not config.use_qk_norm
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    expected = {"layers": [0], "num_heads": 2, "num_kv_heads": 2, "qkv_bias": False, "window_size": None}
    assert config_to_fla(config)["attn"] == expected | {"rope_theta": 10000.0}
    assert config_to_fla(config_from_fla(BASE | {"attn": {"layers": [], "num_heads": 2}}))["attn"] is None


@pytest.mark.parametrize(
    "change, name",
    [
        ({"attn": ATTENTION | {"window_size": 512}}, "attn.window_size"),
        ({"attn": ATTENTION | {"rope_theta": None}}, "attn.rope_theta"),
        ({"attn": ATTENTION | {"num_heads": 5}}, "attn.num_heads"),
        ({"attn": ATTENTION | {"num_kv_heads": 3}}, "attn.num_kv_heads"),
        ({"attn": ATTENTION | {"layers": [1, 1]}}, "attn.layers"),
        ({"attn": ATTENTION | {"layers": [2]}}, "attn.layers"),
        ({"attn": ATTENTION | {"sinks": True}}, "attn.sinks"),
        ({"attn": {"layers": [1]}}, "attn.num_heads"),
        ({"attn": [ATTENTION, ATTENTION | {"layers": [0], "rope_theta": 1.0}]}, "attn.rope_theta"),
        ({"attn": [ATTENTION, ATTENTION | {"layers": [0], "num_kv_heads": 4}]}, "attn.num_kv_heads"),
        ({"expand_v": 1.3}, "expand_v"),
        ({"num_v_heads": 3}, "num_v_heads"),
        ({"num_v_heads": 1}, "num_v_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"lower_bound": -6.0}, "lower_bound"),
        ({"lower_bound": 0.5}, "lower_bound"),
        ({"use_gate": False}, "use_gate"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_refused_fields_of_fla(change, name, tmp_path):
    fla_checkpoint(tmp_path / "fla")
    (tmp_path / "fla" / "config.json").write_text(json.dumps(BASE | change))
    with pytest.raises(ValueError, match=re.escape(name)):
        convert_checkpoint(tmp_path / "fla", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fla"]


ROPE = {"rope_type": "default", "rope_theta": 100.0}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "rope_parameters": ROPE}
# For each field of ours, values that FLA can hold, and values that it can't, in a hybrid model.
OUR_FIELDS: dict[str, tuple[list, list]] = {
    "vocab_size": ([50], []),
    "hidden_size": ([64], []),
    "intermediate_size": ([100], []),
    "num_hidden_layers": ([2], []),
    "layer_types": ([["full_attention"] * 2], []),
    "linear_num_heads": ([1], []),
    "linear_num_value_heads": ([4], []),
    "linear_head_dim": ([], []),  # with those of value and decay, below
    "linear_value_head_dim": ([], []),
    "linear_conv_kernel_dim": ([3], []),
    "linear_lower_bound": ([None, -1.0, 0.0], []),
    "linear_decay_low_rank_dim": ([], [8]),
    "linear_output_gate_bias": ([True], []),
    "allow_neg_eigval": ([True], []),
    "num_attention_heads": ([2], []),
    "num_key_value_heads": ([1], []),
    "head_dim": ([], [16]),
    "attention_bias": ([True], []),
    "attention_output_bias": ([], [True]),
    "attention_dropout": ([], [0.1]),
    "use_qk_norm": ([], [True]),
    "rope_parameters": (
        [ROPE | {"rope_theta": 5.0}],
        [None, ROPE | {"partial_rotary_factor": 0.5}, ROPE | {"rope_type": "linear", "factor": 2.0}],
    ),
    "rms_norm_eps": ([1e-5], []),
    "hidden_act": ([], ["gelu"]),
    "tie_word_embeddings": ([True], []),
    "max_position_embeddings": ([99], []),
    "initializer_range": ([0.5], []),
    "use_cache": ([False], []),
    "pad_token_id": ([3], []),
    "bos_token_id": ([3], []),
    "eos_token_id": ([3, [3, 4]], []),
}


def test_all_our_fields_are_here():
    assert OUR_FIELDS.keys() == set(KDAConfig.__annotations__)


@pytest.mark.parametrize("field", OUR_FIELDS)
def test_our_field(field, tiny_config):
    held, refused = OUR_FIELDS[field]
    for value in held:
        kwargs = HYBRID | {"attention_output_bias": False, "head_dim": None} | {field: value}
        if field == "hidden_size":
            kwargs["num_attention_heads"] = 4
        config = tiny_config(**kwargs)
        back = config_from_fla(json.loads(json.dumps(config_to_fla(config))))
        assert getattr(back, field) == value
        assert back.to_diff_dict() == config.to_diff_dict() | {"architectures": ["KDAForCausalLM"]}
    for value in refused:
        with pytest.raises(ValueError, match=f"`{field}`"):
            config_to_fla(tiny_config(**(HYBRID | {field: value})))


def test_every_ratio_of_widths_comes_back(tiny_config):
    for K in range(1, 130):
        for V in (1, 7, 64, 127, 200):
            widths = {"linear_head_dim": K, "linear_value_head_dim": V, "linear_decay_low_rank_dim": V}
            fields = config_to_fla(tiny_config(**HYBRID, **widths))
            assert int(K * fields["expand_v"]) == V
            assert math.isclose(K * fields["expand_v"], V, rel_tol=1e-5)


def test_a_field_of_ours_that_is_not_known(tiny_config):
    with pytest.raises(ValueError, match="sliding_window"):
        config_to_fla(tiny_config(**HYBRID, sliding_window=5))


# ------------------------------------------------------------------------------------------------- broken checkpoints


def _without(tensors, name):
    del tensors[name]


def _with(tensors, name):
    tensors[name] = torch.zeros(3)


def _misshapen(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize("to", ["kda_hf", "fla"])
@pytest.mark.parametrize(
    "fault, names",
    [
        (_without, ("model.layers.1.attn.A_log", "model.layers.1.linear_attn.A_log")),
        (_without, ("lm_head.weight", "lm_head.weight")),
        (_without, ("model.layers.0.attn.g_proj.1.bias", "model.layers.0.linear_attn.g_b_proj.bias")),
        (_with, ("model.layers.0.attn.q_conv1d.bias", "model.layers.0.linear_attn.q_conv1d.bias")),
        (_with, ("model.layers.2.attn.A_log", "model.layers.2.linear_attn.A_log")),
        (_with, ("model.layers.0.linear_attn.A_log", "model.layers.0.attn.A_log")),
        (_misshapen, ("model.layers.0.attn.f_proj.1.weight", "model.layers.0.linear_attn.f_b_proj.weight")),
    ],
)
def test_tensors_are_refused_by_name(fault, names, to, tmp_path):
    source, name = tmp_path / "fla", names[to == "fla"]
    fla_checkpoint(source)
    if to == "fla":
        source = convert_checkpoint(source, tmp_path / "ours")
    tensors = tensors_of(source)
    fault(tensors, name)
    save_file(tensors, source / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=re.escape(name)):
        convert_checkpoint(source, tmp_path / "target", to)
    assert sorted(tmp_path.iterdir()) == before


def test_many_names_are_counted(tmp_path):
    fla_checkpoint(tmp_path / "fla", BASE | {"num_hidden_layers": 3})
    (tmp_path / "fla" / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(ValueError, match=r"model\.layers\.2\..* and \d+ more"):
        convert_checkpoint(tmp_path / "fla", tmp_path / "ours")


def test_broken_files(tmp_path):
    def refuse(error, message):
        with pytest.raises(error, match=message):
            convert_checkpoint(tmp_path / "fla", tmp_path / "ours")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fla"]

    with pytest.raises(FileNotFoundError, match="no such directory"):
        convert_checkpoint(tmp_path / "fla", tmp_path / "ours")
    tensors = fla_checkpoint(tmp_path / "fla")
    weights, index = (tmp_path / "fla" / f"model.safetensors{end}" for end in ("", ".index.json"))
    config = tmp_path / "fla" / "config.json"

    config.write_text("{")
    refuse(ValueError, "config.json")
    config.write_text(json.dumps(BASE | {"model_type": "llama"}))
    refuse(ValueError, "`model_type`.*'llama'")
    config.unlink()
    refuse(FileNotFoundError, "config.json")
    config.write_text(json.dumps(BASE))

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refuse(ValueError, "model.safetensors is no complete file")
    weights.rename(tmp_path / "fla" / "pytorch_model.bin")
    refuse(FileNotFoundError, "pytorch_model.bin: load it and save it again")
    names = sorted(tensors)
    halves = {"a.safetensors": names[:9], "b.safetensors": names[8:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tmp_path / "fla" / file)
    index.write_text(json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}}))
    refuse(ValueError, f"{names[8]} is in a.safetensors and in b.safetensors")
    (tmp_path / "fla" / "b.safetensors").unlink()
    refuse(FileNotFoundError, "b.safetensors")


def test_wrong_arguments(tmp_path):
    source = tmp_path / "fla"
    fla_checkpoint(source)
    for kwargs, message in [
        ({"to": "fla"}, "`to` is 'fla'"),
        ({"to": "onnx"}, "`to` is 'onnx'"),
        ({"max_shard_size": "5 parsecs"}, "`max_shard_size`"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "ours", **kwargs)
    for target in (source, tmp_path):
        with pytest.raises(ValueError, match="`target`"):
            convert_checkpoint(source, target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fla"]
    with pytest.raises(FileNotFoundError, match="no such directory"):
        convert_checkpoint("./nowhere", tmp_path / "ours")


# --------------------------------------------------------------------------------------------------- nothing half done


def test_overwrite(tmp_path):
    tensors = fla_checkpoint(tmp_path / "fla")
    target = tmp_path / "ours"
    target.mkdir()
    convert_checkpoint(tmp_path / "fla", target)  # an empty directory is as good as none
    (target / "notes.txt").write_text("mine")
    before = content_of(target)
    with pytest.raises(FileExistsError, match="overwrite"):
        convert_checkpoint(tmp_path / "fla", target)
    assert content_of(target) == before
    convert_checkpoint(tmp_path / "fla", target, overwrite=True, max_shard_size="20KB")
    assert not (target / "notes.txt").exists() and not (target / "model.safetensors").exists()
    assert len(tensors_of(target)) == len(tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fla", "ours"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk", "interrupt"])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_failure_on_the_way(error, there_before, tmp_path, monkeypatch):
    fla_checkpoint(tmp_path / "fla")
    target = tmp_path / "deep" / "ours"
    if there_before:
        convert_checkpoint(tmp_path / "fla", target)
    before = content_of(tmp_path)
    calls = []

    def failing_save(shard, path, metadata):
        calls.append(path)
        # What a process that is killed here would leave: no directory that a model could be loaded from.
        configs = {p.parent for p in tmp_path.rglob("config.json")}
        assert configs == ({tmp_path / "fla", target} if there_before else {tmp_path / "fla"})
        if len(calls) == 3:
            raise error
        save_file(shard, path, metadata=metadata)

    monkeypatch.setattr(convert, "save_file", failing_save)
    with pytest.raises(type(error)):
        convert_checkpoint(tmp_path / "fla", target, max_shard_size="20KB", overwrite=there_before)
    assert len(calls) == 3 and content_of(tmp_path) == before
    assert [path.name for path in (tmp_path / "deep").iterdir()] == (["ours"] if there_before else [])


def test_a_failure_at_the_last_moment(tmp_path, monkeypatch):
    """The old checkpoint is back where the new one can't take its place."""
    fla_checkpoint(tmp_path / "fla")
    target = convert_checkpoint(tmp_path / "fla", tmp_path / "ours")
    before, rename = content_of(tmp_path), Path.rename

    def failing_rename(self, to):
        if self.name == "new":
            raise OSError("busy")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OSError, match="busy"):
        convert_checkpoint(tmp_path / "fla", target, overwrite=True)
    assert content_of(tmp_path) == before
