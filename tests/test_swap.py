"""swap_attention: what stays, what KDA starts from, what is refused, and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import kda_hf
from kda_hf import KDAConfig, KDAForCausalLM
from kda_hf.cli import main
from kda_hf.swap import calibration_rows, parse_layers, swap_table


ROOT = Path(__file__).parent.parent
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BACKBONES: dict[str, dict] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}
ROPES: dict[str, dict] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.fixture
def make(device):
    """Models of transformers with random weights, biases and norms included, from a seed that a failing test shows."""

    def make(**fields):
        seed = torch.seed() % 2**31
        print(f"torch.manual_seed({seed})")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(TINY | {"model_type": "llama"} | fields)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
        return model.to(device).eval()

    return make


@pytest.fixture(params=BACKBONES)
def source(request, make):
    return make(**BACKBONES[request.param])


@torch.no_grad()
def test_without_layers_it_is_the_original(source, device, relative_error):
    ids = torch.randint(97, (2, 30), device=device)
    model = kda_hf.swap_attention(source, layers=[])
    assert type(model) is KDAForCausalLM
    assert model.state_dict().keys() == source.state_dict().keys()
    assert relative_error(model(ids).logits, source(ids).logits) < 1e-6


@pytest.mark.parametrize("rope_type", ROPES)
@torch.no_grad()
def test_types_of_rope(rope_type, make, device, relative_error):
    rope = {"rope_type": rope_type, "rope_theta": 100.0} | ROPES[rope_type]
    source = make(rope_parameters=rope, max_position_embeddings=64)
    plain = make(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    plain.load_state_dict(source.state_dict())
    ids = torch.randint(97, (2, 80), device=device)
    expected = source(ids).logits
    assert relative_error(kda_hf.swap_attention(source, layers=[])(ids).logits, expected) < 1e-6
    assert relative_error(plain(ids).logits, expected) > 1e-3  # or the type would not have shown


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_what_is_not_attention_stays(source, calibrated, device):
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    ids = torch.randint(97, (2, 30), device=device)
    model = kda_hf.swap_attention(source, calibration_ids=ids if calibrated else None)
    after = model.state_dict()
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    swapped = {name for name in before if ".self_attn." in name and not name.startswith("model.layers.3.")}
    assert {name for name in after if ".linear_attn." not in name} == before.keys() - swapped
    for name in before.keys() - swapped:
        assert torch.equal(after[name], before[name]), name
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    pointers = {tensor.data_ptr() for tensor in source.parameters()}
    assert not pointers & {tensor.data_ptr() for tensor in model.parameters()}
    assert all(tensor.isfinite().all() for tensor in after.values())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == source.config.tie_word_embeddings
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_mode(dtype, make, device):
    source = make().to(dtype).train()
    model = kda_hf.swap_attention(source, calibration_ids=torch.randint(97, (1, 20), device=device))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.dtype == dtype and model.training
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    assert kda_hf.swap_attention(source.eval()).training is False


@torch.no_grad()
def test_kda_heads_are_those_of_the_attention(make):
    """Head h of q stays, and gets the key and value head that the attention gives it: h // 2 of 4 on 2."""
    source = make()
    attention, layer = source.model.layers[0].self_attn, kda_hf.swap_attention(source, layers=[0]).model.layers[0]
    layer = layer.linear_attn
    assert torch.equal(layer.q_proj.weight, attention.q_proj.weight)
    for name in ("k_proj", "v_proj"):
        heads = getattr(attention, name).weight.split(8)
        expected = torch.cat([heads[0], heads[0], heads[1], heads[1]])
        assert torch.equal(getattr(layer, name).weight, expected)
    ratio = (layer.o_proj.weight / attention.o_proj.weight).split(8, dim=1)
    for head in ratio:  # one positive factor for each head
        assert (head > 0).all() and head.max() / head.min() < 1 + 1e-5
    # Two query heads on one KDA head, or on two value heads that share their query
    merged = kda_hf.swap_attention(source, layers=[0], linear_num_heads=2).model.layers[0].linear_attn
    queries = attention.q_proj.weight.split(8)
    torch.testing.assert_close(merged.q_proj.weight[:8], (queries[0] + queries[1]) / 2)
    assert torch.equal(merged.k_proj.weight, attention.k_proj.weight)
    grouped = kda_hf.swap_attention(source, layers=[0], linear_num_heads=2, linear_num_value_heads=4)
    grouped = grouped.model.layers[0].linear_attn
    assert torch.equal(grouped.k_proj.weight, attention.k_proj.weight)
    assert torch.equal(grouped.v_proj.weight, layer.v_proj.weight)
    torch.testing.assert_close(grouped.o_proj.weight, layer.o_proj.weight)
    torch.testing.assert_close(
        merged.o_proj.weight[:, :8], grouped.o_proj.weight[:, :8] + grouped.o_proj.weight[:, 8:16]
    )


@torch.no_grad()
def test_norms_of_queries_and_keys_go_into_the_convolution(make):
    source = make(model_type="qwen3", head_dim=16)
    layer = kda_hf.swap_attention(source, layers=[0]).model.layers[0].linear_attn
    attention = source.model.layers[0].self_attn
    for conv, norm in ((layer.q_conv1d, attention.q_norm), (layer.k_conv1d, attention.k_norm)):
        assert not conv.weight[:, :, :-1].any()
        ratio = conv.weight[:, 0, -1].view(4, 16) / norm.weight
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"linear_lower_bound": None}, {"linear_lower_bound": -0.5, "allow_neg_eigval": True}],
    ids=["safe", "softplus", "mild"],
)
@torch.no_grad()
def test_gates_start_constant_and_trainable(overrides, make, device):
    model = kda_hf.swap_attention(make(), layers="all", **overrides)
    layer = model.model.layers[0].linear_attn
    x = torch.randn(1, 5, 32, device=device)
    logits = layer.decay_logits(x) + layer.dt_bias
    safe, softplus = -(layer.lower_bound or 0) * logits.sigmoid(), torch.nn.functional.softplus(logits)
    decay = (softplus if layer.lower_bound is None else safe).view(5, 4, 8)
    assert torch.equal(decay, decay[:1, :, :1].expand_as(decay))
    torch.testing.assert_close(decay[0, [0, 3], 0].cpu(), torch.tensor([0.1, 0.01]), rtol=1e-3, atol=0)
    with torch.enable_grad():
        model.train()(
            torch.randint(97, (1, 20), device=device), labels=torch.arange(20, device=device)[None]
        ).loss.backward()
    for name in ("q_proj", "f_b_proj", "g_b_proj", "b_proj", "o_norm", "q_conv1d"):
        assert getattr(layer, name).weight.grad.abs().max() > 0, name


def _train(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for ids in batches:
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_start_is_close(make, device):
    """After a training on sequences that repeat, a swap is far nearer to the original than new KDA layers are, and a
    calibrated one still nearer."""
    source = make(num_hidden_layers=2)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            parameter.copy_(torch.ones_like(parameter) if "norm" in name else torch.randn_like(parameter) * 0.05)

    def text(rows):
        """Each token is followed by what a fixed table says, or by what the table says for the token before it."""
        table = torch.arange(97).roll(13)
        ids = torch.randint(97, (rows, 1))
        for _ in range(31):
            before = ids[:, -2:-1] if ids.shape[1] > 1 else ids[:, -1:]
            ids = torch.cat([ids, table[(ids[:, -1:] + 3 * before) % 97]], dim=1)
        return ids.to(device)

    _train(source.train(), [text(32) for _ in range(200)])
    source.eval()
    held_out, rows = text(32), text(32)

    def loss(model):
        with torch.no_grad():
            return model.eval()(held_out, labels=held_out).loss.item()

    plain = kda_hf.swap_attention(source, layers=[0])
    calibrated = kda_hf.swap_attention(source, layers=[0], calibration_ids=rows)
    new = kda_hf.swap_attention(source, layers=[0])
    new.model.layers[0].linear_attn.apply(new._init_weights)
    original, plain, calibrated, new = map(loss, (source, plain, calibrated, new))
    print(original, plain, calibrated, new)
    assert original < calibrated < plain < new


def test_layers():
    assert parse_layers("3:1", 10) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert parse_layers("3:1", 8) == [
        i for i, kind in enumerate(KDAConfig(num_hidden_layers=8).layer_types) if "lin" in kind
    ]
    assert parse_layers("1:1", 5) == [0, 2, 4]
    assert parse_layers("1:2", 6) == [0, 3]
    assert parse_layers("all", 3) == parse_layers("1:0", 3) == [0, 1, 2]
    assert parse_layers("2", 3) == [2] and parse_layers("2, 0", 3) == [0, 2]
    assert parse_layers([], 4) == [] and parse_layers((3, 0, 3), 4) == [0, 3]


WRONG_LAYERS = ["", "4", "1,", "0,4", "0,-1", "3:1:1", "0:1", "-1:1", "a:b", "most", [4], [-1], [True], [0.0]]


@pytest.mark.parametrize("layers", WRONG_LAYERS)
def test_wrong_layers(layers, make):
    with pytest.raises(ValueError, match="`layers` must be"):
        kda_hf.swap_attention(make(), layers)


@pytest.mark.parametrize(
    "field, fields",
    [
        ("model_type", {"model_type": "gemma2", "head_dim": 8}),
        ("model_type", {"model_type": "qwen3_moe"}),
        ("mlp_bias", {"mlp_bias": True}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("sliding_window", {"model_type": "mistral", "sliding_window": 16}),
        ("sliding_window", {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_what_we_have_not_is_refused(field, fields, make):
    source = make(**fields)
    with pytest.raises(ValueError, match=f"`{field}` is "):
        kda_hf.swap_attention(source)


def test_a_window_longer_than_the_context_is_none(make):
    source = make(model_type="mistral", sliding_window=64, max_position_embeddings=64)
    assert kda_hf.swap_attention(source, layers=[]).config.max_position_embeddings == 64


@pytest.mark.parametrize(
    "name, value",
    [
        ("linear_num_heads", 3),
        ("linear_num_heads", 8),
        ("linear_num_heads", 1),
        ("linear_head_dim", 16),
        ("linear_value_head_dim", 16),
        ("linear_lower_bound", -7.0),
        ("linear_conv_kernel_dim", 0),
        ("hidden_size", 64),
        ("rope_parameters", None),
        ("num_heads", 4),
    ],
)
def test_wrong_overrides(name, value, make):
    with pytest.raises(ValueError, match=f"`{name}`"):
        kda_hf.swap_attention(make(), **{name: value})


def test_overrides(make, device):
    model = kda_hf.swap_attention(
        make(), linear_lower_bound=None, linear_conv_kernel_dim=3, linear_output_gate_bias=True
    )
    config = model.config
    assert (config.linear_lower_bound, config.linear_conv_kernel_dim, config.linear_output_gate_bias) == (None, 3, True)
    assert model(torch.randint(97, (1, 20), device=device)).logits.isfinite().all()


def test_models_that_are_not_plain(make, device):
    source = make()
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        kda_hf.swap_attention(source, calibration_ids=torch.arange(9, device=device))
    source.model.layers[1].self_attn.q_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="no plain llama: model.layers.1.self_attn.q_proj.lora_A"):
        kda_hf.swap_attention(source)
    source = make()
    source.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="`quantization_config`: model.layers.1.mlp.up_proj.weight is"):
        kda_hf.swap_attention(source)


def test_calibration_rows():
    class Letters:
        def __call__(self, text, add_special_tokens):
            assert add_special_tokens is False
            return {"input_ids": [ord(letter) for letter in text]}

    rows = calibration_rows("".join(map(chr, range(100))), Letters(), rows=4, length=10)
    assert rows.tolist() == [list(range(start, start + 10)) for start in (0, 25, 50, 75)]
    assert calibration_rows("abcdef", Letters(), rows=2).shape == (2, 3)
    with pytest.raises(ValueError, match="`calibration_text` has 3 characters"):
        calibration_rows("abc", Letters(), rows=2)


@pytest.mark.parametrize("tied", [False, True])
def test_table(tied, make):
    source = make(tie_word_embeddings=tied)
    model = kda_hf.swap_attention(source)
    lines = [line.split() for line in swap_table(source.config, model).splitlines()]
    assert lines[1][:3] == ["0", "attention", "KDA"] and lines[4][:3] == ["3", "attention", "attention"]
    counts = [f"{sum(p.numel() for p in m.parameters()):,}" for m in (source, model)]
    assert lines[5] == ["llama", "kda_hf", *counts]
    kv = [2 * 2 * 8 * 4 * count for count in (4, 1)]
    assert lines[-2] == ["KV", "bytes", "per", "token", str(kv[0]), str(kv[1])]
    cache = kda_hf.KDACache(model.config, max_rollback=0)
    with torch.no_grad():
        model(torch.zeros(1, 100, dtype=torch.long, device=model.device), past_key_values=cache)
    state = cache.nbytes - 100 * kv[1]
    assert lines[-1] == ["state", "bytes", "per", "sequence", "0", f"{state:,}"]


@pytest.fixture
def checkpoint(make, tmp_path):
    """A directory with a model, a tokenizer of words, and a chat template."""
    words = {word: i for i, word in enumerate(["[pad]", "[bos]", "[eos]", *(f"w{i}" for i in range(94))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[bos]", eos_token="[eos]")
    fast.chat_template = "{% for message in messages %}w1 {{ message['content'] }} {% endfor %}w2"
    source = make()
    source.generation_config.max_new_tokens = 7
    source.save_pretrained(tmp_path / "base")
    fast.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


LOADS = """
import sys, torch, kda_hf
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
chat = tokenizer.apply_chat_template([{"role": "user", "content": "w5 w6"}], tokenize=False)
ids = tokenizer(chat, return_tensors="pt").input_ids
print(type(model).__name__, ids.tolist(), model.generation_config.max_new_tokens)
torch.save(model(ids).logits, sys.argv[2])
"""


def test_command(checkpoint, tmp_path):
    """From another directory; and what is written loads in a process of its own."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 94}" for i in range(600)))
    command = [sys.executable, ROOT / "scripts" / "swap_layers.py", "--base", checkpoint, "--layers", "0,2"]
    command += ["--out", "new/model", "--set", "linear_lower_bound=null", "--calibrate", "../text.txt"]
    command += ["--max-shard-size", "20KB"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "elsewhere", timeout=300)
    assert result.returncode == 0, result.stderr
    assert "KV bytes per token" in result.stdout and "[written: new/model]" in result.stdout
    new = tmp_path / "elsewhere" / "new" / "model"
    fields = json.loads((new / "config.json").read_text())
    assert fields["linear_lower_bound"] is None and fields["model_type"] == "kda_hf"
    assert [kind[:3] for kind in fields["layer_types"]] == ["lin", "ful", "lin", "ful"]
    assert len(list(new.glob("*.safetensors"))) > 1
    assert [path.name for path in new.parent.iterdir()] == ["model"]  # nothing is left beside it

    loaded = subprocess.run(
        [sys.executable, "-c", LOADS, new, tmp_path / "logits"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert loaded.stdout.split() == ["KDAForCausalLM", "[[4,", "8,", "9,", "5]]", "7"], loaded.stderr
    model = KDAForCausalLM.from_pretrained(new).eval()
    with torch.no_grad():
        expected = model(torch.tensor([[4, 8, 9, 5]])).logits
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_out_is_kept_where_something_is_refused(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("!")

    def run(*arguments):
        main(["swap", "--base", str(checkpoint), "--out", str(out), *arguments])

    with pytest.raises(SystemExit, match="not empty.*--overwrite"):
        run()
    with pytest.raises(SystemExit, match="`layers` must be"):
        run("--overwrite", "--layers", "7")
    with pytest.raises(SystemExit, match="`linear_num_heads` is 3"):
        run("--overwrite", "--set", "linear_num_heads=3")
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(fields | {"mlp_bias": True}))
    with pytest.raises(SystemExit, match="`mlp_bias` is True"):
        run("--overwrite")
    assert [path.name for path in out.iterdir()] == ["mine"]
    (checkpoint / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SystemExit, match="`target` must not be `base`"):
        main(["swap", "--base", str(checkpoint), "--out", str(checkpoint), "--overwrite"])
    with pytest.raises(SystemExit, match="`dtype`.*'half-ish'"):
        run("--overwrite", "--dtype", "half-ish")
    with pytest.raises(SystemExit, match="no such file: .*none.gguf"):
        run("--overwrite", "--gguf-file", "none.gguf")

    run("--overwrite", "--layers", "all")
    assert not (out / "mine").exists()
    source = load_file(checkpoint / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert ".linear_attn." in name or torch.equal(tensor, source[name])
    assert (out / "chat_template.jinja").read_text() == (checkpoint / "chat_template.jinja").read_text()
