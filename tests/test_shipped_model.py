"""The trained model in the repository: it loads, predicts as its card says on every backend, and generates alike."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kda_hf import KDAForCausalLM, decoding, generation
from kda_hf.ops import backend_report, has_kernel


FOLDER = Path(__file__).parent.parent / "models" / "kda-hf-tiny"
PROMPTS = ["And the king", "The system administrator must", "In the beginning", "There is a way to"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def model(device):
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).to(device).eval()


def usable_backends():
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for dtype in (torch.float32, torch.bfloat16):
            for row in backend_report(device=device, dtype=dtype, K=128, V=128):
                if row["usable"]:
                    yield pytest.param(device, dtype, row["backend"], id=f"{device}-{dtype}-{row['backend']}")


def test_size():
    size = sum(file.stat().st_size for file in FOLDER.iterdir() if file.suffix in (".safetensors", ".json"))
    assert size <= 16 * 2**20


def test_architecture(model):
    assert type(model) is KDAForCausalLM
    config = model.config
    assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"] + config.layer_types[4:]
    assert config.linear_head_dim == config.linear_value_head_dim == 128
    assert config.linear_lower_bound == -5.0


def test_tokenizer_is_lossless(tokenizer):
    text = "In the beginning — “naïve” ½\n\n  kda_hf\t(2026) 雪"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("device_type, dtype, backend", list(usable_backends()))
@torch.no_grad()
def test_held_out_loss_is_that_of_the_card(tokenizer, device_type, dtype, backend, monkeypatch):
    """Bits per byte on the text that was kept out of training, within 1% of the card."""
    monkeypatch.setenv("KDA_HF_BACKEND", backend)
    card = json.loads((FOLDER / "training.json").read_text())["heldout_file"]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).to(device_type).eval()
    ids = torch.tensor(tokenizer((FOLDER / "heldout.txt").read_text())["input_ids"], device=device_type)
    windows = ids[: card["windows"] * card["window"]].view(card["windows"], 1, card["window"])
    losses = [model(rows, labels=rows, use_cache=False).loss for rows in windows]
    assert torch.stack(losses).mean().item() == pytest.approx(card["nats_per_token"], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_tokens_do_not_depend_on_the_way(tokenizer, device, dtype):
    """With and without cache, padded and unpadded, batched and single."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).to(device).eval()
    settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
    single = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        ids = inputs["input_ids"]
        single.append(model.generate(ids, attention_mask=inputs["attention_mask"], **settings)[0, ids.shape[1] :])
        if dtype == torch.float32:
            recomputed = model.generate(ids, attention_mask=inputs["attention_mask"], use_cache=False, **settings)
            torch.testing.assert_close(recomputed[0, ids.shape[1] :], single[-1])
    if dtype == torch.float32:
        tokenizer.padding_side = "left"
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(device)
        outputs = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
        for output, alone in zip(outputs[:, batch["input_ids"].shape[1] :], single, strict=True):
            torch.testing.assert_close(output, alone)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, penalty", [(torch.float32, 1.1), (torch.bfloat16, 1.0)], ids=str)
def test_long_greedy_text_is_that_of_the_modules(tokenizer, device, dtype, penalty):
    """2000 tokens of two rows by program, on a GPU by graphs. In bf16, of two equally good ones either may be next."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).to(device).eval()
    text = tokenizer((FOLDER / "heldout.txt").read_text()[:1000], return_tensors="pt")["input_ids"]
    ids = text[:, :64].view(2, 32).to(device)
    # A penalty keeps the text from going round in circles; without one, a graph chooses the tokens, too.
    settings = {"do_sample": False, "max_new_tokens": 2000, "eos_token_id": None, "repetition_penalty": penalty}
    actual = model.generate(ids, **settings)[:, 32:]
    if device.type == "cuda" and has_kernel("kda_decode_step", model.lm_head.weight, 128, 128, torch.float32):
        assert len(decoding.program_of(model).graphs.idle) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "decode_program", contextlib.nullcontext)
        output = model.generate(ids, **settings, output_logits=True, return_dict_in_generate=True)
    expected = output.sequences[:, 32:]
    for row in range(2):
        differ = (actual[row] != expected[row]).nonzero()
        equal = int(differ[0]) if len(differ) else 2000
        print(f"row {row}: {equal} of 2000 tokens are equal")
        if equal < 2000:
            # The tokens fed are the same so far. What rounding moves a logit by is up to two units in the last place.
            assert dtype == torch.bfloat16
            best, other = (output.logits[equal][row, tokens[row, equal]] for tokens in (expected, actual))
            assert best - other <= 4 * torch.finfo(dtype).eps * best.abs()


def test_speculation_is_lossless(tokenizer, model):
    ids = tokenizer(PROMPTS[0], return_tensors="pt").to(model.device)["input_ids"]
    plain = model.generate(ids, do_sample=False, max_new_tokens=80)
    torch.testing.assert_close(
        model.generate(ids, do_sample=False, max_new_tokens=80, prompt_lookup_num_tokens=4), plain
    )


def test_it_writes_words(tokenizer, model):
    """Not noise: nearly all words of a sample are words of the text it has not seen."""
    known = set((FOLDER / "heldout.txt").read_text().lower().split())
    torch.manual_seed(0)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").to(model.device)["input_ids"]
    output = model.generate(ids.repeat(4, 1), do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=100)
    words = " ".join(tokenizer.batch_decode(output, skip_special_tokens=True)).lower().split()
    assert len(words) > 150
    assert sum(word in known for word in words) / len(words) > 0.8
