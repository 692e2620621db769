"""The evaluations of healed models: perplexity by length of the context, and recall of a fact."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import choose_layers
import eval_chat
import eval_ppl
import eval_recall
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kda_hf import swap_attention


ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "kda-hf-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


# --- Perplexity ------------------------------------------------------------------------------------------------------


def test_windows_begin_every_stride():
    documents = [torch.arange(10), torch.arange(1), torch.arange(0), torch.arange(4)]
    assert [row.tolist() for row in eval_ppl.windows(documents, 4, 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [0, 1, 2, 3],
    ]
    assert [len(row) for row in eval_ppl.windows(documents[:1], 6, 2)] == [6, 6, 6, 4, 2]


@pytest.mark.parametrize("kind", ["original", "swapped"])
@pytest.mark.parametrize("chunk", [1, 16, 40, 41, 100])
def test_losses_in_chunks_are_those_of_one_pass(kind, chunk):
    """Each token's loss is given all of the context before it, wherever the chunks end."""
    model = llama() if kind == "original" else swap_attention(llama(), [0]).eval()
    ids = torch.randint(97, (2, 41))
    with torch.no_grad():
        log_probabilities = model(ids).logits.log_softmax(-1)
    expected = -log_probabilities[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(eval_ppl.token_losses(model, ids, chunk), expected, rtol=1e-4, atol=1e-4)


class Counter(nn.Module):
    """A model that is sure of a token by `sharpness` times the number of tokens before it."""

    device = torch.device("cpu")

    def __init__(self, vocab, sharpness):
        super().__init__()
        self.vocab, self.sharpness = vocab, sharpness

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.vocab)
        logits[..., 0] = self.sharpness * (1 + torch.arange(input_ids.shape[1]))
        return SimpleNamespace(logits=logits)


def test_perplexity_of_a_range_is_that_of_its_contexts():
    rows = [torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)]
    uniform = eval_ppl.perplexities(Counter(16, 0.0), rows, [4, 8, 9, 12], batch_tokens=10, chunk=100)
    assert [entry["tokens"] for entry in uniform] == [9, 9, 2, 0, 20]  # contexts of 1-3, 4-7, 8, none, all
    assert uniform[3]["perplexity"] is None
    for entry in uniform[:3] + uniform[4:]:
        assert entry["perplexity"] == pytest.approx(16)

    surer = eval_ppl.perplexities(Counter(16, 1.0), rows, [4, 9], batch_tokens=100, chunk=100)
    expected = [math.log(1 + 15 * math.exp(-context)) for context in (1, 2, 3)]
    assert surer[0]["perplexity"] == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
    assert surer[1]["perplexity"] < surer[0]["perplexity"]


def test_perplexity_script(tmp_path):
    """From another directory, two models, JSON; joined documents fill contexts that they do not fill alone."""
    (tmp_path / "model").symlink_to(MODEL)
    text = (MODEL / "heldout.txt").read_text()[:4000]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text[i : i + 400]}) + "\n" for i in range(0, 4000, 400))
    )
    command = [sys.executable, ROOT / "scripts" / "eval_ppl.py", "model", "model", "--text", "text.jsonl"]
    command += ["--lengths", "32", "256", "--json", "ppl.json", "--device", "cpu", "--join", "--chunk", "100"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "ppl.json").read_text())
    assert {"device", "commit", "date", "torch", "transformers", "options"} <= result.keys()
    first, second = result["results"]
    assert first["perplexity"] == second["perplexity"] and second["to_first"] == 1 and second["same_tokens_as_first"]
    near, far = first["ranges"]
    assert (near["from"], near["to"], far["to"]) == (0, 32, 256) and near["tokens"] and far["tokens"]
    # Its card has 3.2 nats a token or so on this text; a model that is fed wrongly has far more
    assert 5 < far["perplexity"] < near["perplexity"] < 200
    assert f"{first['perplexity']:.4g}" in run.stdout and "32-255" in run.stdout


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (eval_ppl, ["./nothing", "--text", "x.txt"], "no such model: ./nothing"),
        (eval_ppl, [str(MODEL), "--text", "./nothing.txt"], "no such file"),
        (eval_ppl, [str(MODEL), "--text", "x.txt", "--dtype", "float99"], "--dtype"),
        (eval_recall, [str(MODEL), "--text", "x.txt", "--lengths", "5000"], "--lengths: 5000 tokens need"),
        (eval_recall, [str(MODEL), "--text", "x.txt", "--lengths", "8"], "--lengths: 8 tokens need"),
        (eval_recall, [str(MODEL), "--text", "talk.jsonl"], "--text: it has conversations only"),
    ],
)
def test_errors_name_the_argument(script, arguments, message, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("And the king said unto them")
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert message in str(error.value)


# --- Recall ----------------------------------------------------------------------------------------------------------


def filler(tokenizer):
    return torch.tensor(tokenizer((MODEL / "heldout.txt").read_text()[:20000], add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_case_has_one_fact_at_its_depth(tokenizer, depth, chat):
    case = eval_recall.make_case(tokenizer, filler(tokenizer), 600, depth, 4, chat, random.Random(3))
    prompt, answers = eval_recall.answer_ids(tokenizer, case, chat)
    assert 580 < len(prompt) < 640 and len(answers) == 5
    assert len({case.key, *case.distractors}) == 5 and all(re.fullmatch(r"\d{5}", n) for n in case.distractors)
    assert case.prompt.count(case.key) == 1 and not any(number in case.prompt for number in case.distractors)
    place = case.prompt.index("The pass key of")
    assert abs(place / len(case.prompt) - depth) < 0.15
    name = re.search(rf"The pass key of (\w+) is {case.key}\.", case.prompt)[1]
    assert case.prompt.endswith(f"The pass key of {name} is") and f"What is the pass key of {name}?" in case.prompt
    assert tokenizer.decode(answers[0]) == f" {case.key}"


class Stub(nn.Module):
    """A model that has read the prompt and knows the key (`certainty` above 0), or has forgotten it (0)."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, certainty, noise=0.0):
        super().__init__()
        self.tokenizer, self.certainty, self.noise = tokenizer, certainty, noise
        self.generator = torch.Generator().manual_seed(0)

    def next_logits(self, ids):
        logits = self.noise * torch.randn(len(self.tokenizer), generator=self.generator)
        text = self.tokenizer.decode(ids)
        key = re.search(r"The pass key of \w+ is (\d{5})\.", text)[1]
        said = text[text.rindex(" is") + 3 :]
        answer = self.tokenizer(f" {key}", add_special_tokens=False)["input_ids"]
        so_far = len(self.tokenizer(said, add_special_tokens=False)["input_ids"]) if said else 0
        if so_far < len(answer):
            logits[answer[so_far]] += self.certainty
        return logits

    def forward(self, input_ids, logits_to_keep, **kwargs):
        length = input_ids.shape[1]
        rows = [
            torch.stack([self.next_logits(row[: end + 1]) for end in range(length - logits_to_keep, length)])
            for row in input_ids
        ]
        return SimpleNamespace(logits=torch.stack(rows))

    def generate(self, input_ids, max_new_tokens, **kwargs):
        for _ in range(max_new_tokens):
            following = self.next_logits(input_ids[0]).argmax()
            input_ids = torch.cat([input_ids, following.view(1, 1)], dim=1)
        return input_ids


def recall_of(model, tokenizer, samples=20):
    rng = random.Random(1)
    cases = [eval_recall.make_case(tokenizer, filler(tokenizer), 120, 0.5, 4, False, rng) for _ in range(samples)]
    scores = [eval_recall.score(model, tokenizer, case, False) for case in cases]
    return {name: sum(score[name] for score in scores) / samples for name in scores[0]}


def test_a_model_that_knows_scores_all(tokenizer):
    scores = recall_of(Stub(tokenizer, certainty=30.0), tokenizer)
    assert scores["exact"] == scores["choice"] == 1 and scores["margin"] > 10


def test_a_model_that_has_forgotten_scores_as_chance(tokenizer):
    scores = recall_of(Stub(tokenizer, certainty=0.0), tokenizer)
    assert scores["exact"] == 0 and scores["choice"] == pytest.approx(1 / 5)
    guessing = recall_of(Stub(tokenizer, certainty=0.0, noise=1.0), tokenizer, samples=60)
    assert guessing["exact"] == 0 and 0.05 < guessing["choice"] < 0.4


def test_log_probabilities_are_those_of_the_whole_answer():
    model, prompt, answers = llama(), [5, 6, 7, 8], [[1, 2, 3], [4, 9], [9, 4]]
    values = eval_recall.log_probabilities(model, prompt, answers)
    for value, answer in zip(values, answers, strict=True):
        with torch.no_grad():
            table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        assert value == pytest.approx(sum(float(table[3 + i, token]) for i, token in enumerate(answer)), rel=1e-4)


def test_scores():
    assert eval_recall.says(" 48213.", "48213") and eval_recall.says(' "48213"', "48213")
    assert not eval_recall.says(" 482135", "48213") and not eval_recall.says(" 4821", "48213")
    assert not eval_recall.says("not known", "48213") and not eval_recall.says(" 1, 48213", "48213")
    assert eval_recall.choice_score([2.0, 1.0, 0.0]) == 1 and eval_recall.choice_score([1.0, 2.0]) == 0
    assert eval_recall.choice_score([1.0, 1.0, 0.0, 1.0]) == pytest.approx(1 / 3)


def test_recall_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text((MODEL / "heldout.txt").read_text()[:8000])
    monkeypatch.chdir(tmp_path)
    options = (
        "--text text.txt --lengths 64 200 --depths 0 1 --samples 2 --distractors 3 --chat --device cpu --json r.json"
    )
    monkeypatch.setattr(sys, "argv", ["eval_recall.py", str(MODEL), *options.split()])
    eval_recall.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["chance"] == 0.25 and {"device", "commit", "date"} <= result.keys()
    assert [(row["length"], row["depth"]) for row in result["results"]] == [(64, 0), (64, 1), (200, 0), (200, 1)]
    for row in result["results"]:
        assert 0 <= row["exact"] <= 1 and 0 <= row["choice"] <= 1 and abs(row["tokens"] - row["length"]) < 40
    assert "choice by chance 25%" in capsys.readouterr().out


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_the_perplexity_of_an_answer_is_given_the_question():
    model, ids, tokens = llama(), [5, 6, 7], [1, 2, 3, 4]
    with torch.no_grad():
        table = model(torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
    expected = -sum(float(table[2 + i, token]) for i, token in enumerate(tokens)) / 4
    assert eval_chat.perplexity(model, ids, tokens) == pytest.approx(math.exp(expected), rel=1e-4)
    assert eval_chat.perplexity(model, ids, []) is None


def test_chat_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.txt").write_text("Who are you?\n\n  Why?  \n")
    monkeypatch.chdir(tmp_path)
    options = "--prompts questions.txt --new 5 --device cpu --json chat.json"
    monkeypatch.setattr(sys, "argv", ["eval_chat.py", str(MODEL), str(MODEL), *options.split()])
    eval_chat.main()
    result = json.loads((tmp_path / "chat.json").read_text())
    assert {"device", "commit", "date"} <= result.keys() and result["options"]["prompts"] == "questions.txt"
    assert [row["prompt"] for row in result["results"]] == ["Who are you?", "Why?"] * 2
    assert result["results"][:2] == result["results"][2:]  # the same model answers the same
    assert all(1 <= row["tokens"] <= 5 and row["perplexity"] >= 1 for row in result["results"])
    assert "perplexity by the first" in capsys.readouterr().out

    (tmp_path / "questions.txt").write_text("\n")
    with pytest.raises(SystemExit, match="eval_chat: --prompts: questions.txt has no line"):
        eval_chat.main()


# --- Which layers ----------------------------------------------------------------------------------------------------


def test_choose_layers(tmp_path, monkeypatch, capsys, tokenizer):
    """The layer that does what the attention did loses least, and those chosen come out as they were healed."""
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.2}
    original = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, **config)).eval()
    with torch.no_grad():
        original.model.layers[1].self_attn.o_proj.weight.zero_()
    healed = swap_attention(original, "all")
    with torch.no_grad():
        healed.model.layers[1].linear_attn.o_proj.weight.zero_()  # as its attention, which adds nothing
        for layer in healed.model.layers:
            layer.linear_attn.o_norm.weight.fill_(1.5)
    for name, model in (("original", original), ("healed", healed)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    options = f"--text {MODEL / 'heldout.txt'} --max-tokens 300 --max-length 64 --device cpu --json layers.json"
    run = ["choose_layers.py", "original", "healed", *options.split()]
    monkeypatch.setattr(sys, "argv", [*run, "--count", "2", "--out", "chosen", "--beside", "1", "all"])
    choose_layers.main()
    result = json.loads((tmp_path / "layers.json").read_text())
    assert result["layers"][0] == {"layer": 1, "nats": pytest.approx(0, abs=1e-6)}
    assert [row["nats"] for row in result["layers"]] == sorted(row["nats"] for row in result["layers"])
    assert result["beside"]["1"] < 1e-6 < result["nats"] < result["beside"]["all"]
    assert result["tokens"] == 300 and len(result["chosen"]) == 2 and 1 in result["chosen"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "chosen")
    other = next(i for i in result["chosen"] if i != 1)
    for index, layer in enumerate(model.model.layers):
        assert (layer.layer_type == "linear_attention") == (index in result["chosen"])
    assert torch.equal(
        model.model.layers[other].linear_attn.o_norm.weight, healed.model.layers[other].linear_attn.o_norm.weight
    )
    assert f"--layers {result['chosen'][0]},{result['chosen'][1]}: " in capsys.readouterr().out

    for options, message in (
        (["--count", "4"], "--count: healed has 3 swapped layers, got 4"),
        (["--out", "chosen"], "chosen is not empty"),
        (["--beside", "0,7"], "must be indices from 0 to 2"),
    ):
        monkeypatch.setattr(sys, "argv", [*run, *options])
        with pytest.raises(SystemExit, match=message):
            choose_layers.main()
