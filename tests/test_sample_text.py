"""The script that lets a model write the text that another is healed on."""

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sample_text
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kda_hf.generation import CACHE_NAME
from kda_hf.healing.data import read_documents


ROOT = Path(__file__).parent.parent
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DOCUMENT, START, END = range(3)
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template=TEMPLATE):
    """A token for each character of ASCII, after the special ones."""
    characters = [
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in map(chr, range(128))
    ]
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *characters])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model with random weights that ends its texts every now and then, and has tokens that its tokenizer lacks."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=136,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data[END] *= 3
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def script(original, tmp_path, monkeypatch):
    """Runs the script, and gives back what it has stored."""

    def run(options="", out="out.jsonl", model=original):
        defaults = "--documents 20 --conversations 40 --batch 16 --max-tokens 40 --max-prompt-tokens 30 --device cpu"
        command = ["sample_text.py", str(model), "--out", str(tmp_path / out), *defaults.split(), *options.split()]
        monkeypatch.setattr(sys, "argv", command)
        sample_text.main()
        return (tmp_path / out).read_text()

    return run


# --- What is asked of the model --------------------------------------------------------------------------------------


def test_kinds_follow_from_the_tokenizer(tokenizer):
    kind = sample_text.conversation_kind(tokenizer, {DOCUMENT, START, END})
    assert tokenizer.decode(kind.prompt) == "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n"
    assert kind.message_end == END and tokenizer.decode(kind.reply) == "\n<|im_start|>assistant\n"
    assert sample_text.document_kind(tokenizer, None) == sample_text.Kind((DOCUMENT,))
    assert sample_text.document_kind(tokenizer, "<|im_end|>") == sample_text.Kind((END,))


class Scripted:
    """A model that says to each row what is written for it, and checks that it is given the tokens before."""

    device = torch.device("cpu")

    def __init__(self, prompt, rows, forced):
        self.prompt, self.script, self.forced, self.layers = list(prompt), torch.tensor(rows), forced, []
        self.kept, self.column, self.sizes = torch.arange(len(rows)), 0, []

    def batch_select_indices(self, indices):
        self.kept = self.kept[indices]

    def __call__(self, input_ids, use_cache, logits_to_keep, **cache):
        assert bool(cache) == (self.column > 0)
        rows = self.script[self.kept]
        for row, given, index in zip(rows, input_ids.tolist(), self.kept.tolist(), strict=True):
            previous = self.forced.get((index, self.column - 1), int(row[self.column - 1]))
            assert given == (self.prompt if self.column == 0 else [previous])
        self.sizes.append(len(rows))
        logits = torch.nn.functional.one_hot(rows[:, self.column], 16)[:, None]
        self.column += 1
        return SimpleNamespace(logits=logits, **{CACHE_NAME: self})


def sampled(model, kind, rows, max_message=6, max_tokens=40, deadline=float("inf")):
    specials = torch.arange(16) < 3
    groups = sample_text.sample(
        model, kind, rows, lambda logits: logits.argmax(-1), specials, max_message, max_tokens, deadline
    )
    return [tuple(result) for group in groups for result in group]


def test_conversations_by_a_script():
    """Each row goes on to its answer by itself, with the template's tokens in between."""
    kind, other = sample_text.Kind((5, 6), END, (7, START, 8)), 15
    rows = [
        [9, 9, END, *[other] * 3, 10, 11, END],
        [END],  # an empty message
        [9, 9, START, 9, END],  # a message that another token ends
        [9] * 7,  # one that is too long
        [9] * 6 + [END, *[other] * 3, *[12] * 40],  # one that is not, and an answer that is cut
        [9, END, *[other] * 3, END],  # an empty answer
        [9, END, *[other] * 3, *[13] * 30, DOCUMENT],
    ]
    rows = [row + [other] * (50 - len(row)) for row in rows]
    forced = {(r, begin + i): kind.reply[i] for r, begin in [(0, 3), (4, 7), (5, 2), (6, 2)] for i in range(3)}
    model = Scripted(kind.prompt, rows, forced)
    model.forced |= {(2, 5 + i): kind.reply[i] for i in range(3)}  # goes on, though nobody will read it
    results = sampled(model, kind, len(rows))
    assert len(results) == len(rows) and model.sizes == [7] * 16 + [2] * 32 + [1] * 2
    assert sorted(result for result in results if result[1]) == [
        ([9], [13] * 30, True),
        ([9, 9], [10, 11], True),
        ([9] * 6, [12] * 40, False),
    ]


def test_documents_by_a_script():
    rows = [[4] * 5 + [END], [DOCUMENT], [5] * 50, [6] * 20 + [DOCUMENT]]
    rows = [row + [15] * (50 - len(row)) for row in rows]
    results = sampled(Scripted([DOCUMENT], rows, {}), sample_text.Kind((DOCUMENT,)), 4)
    assert sorted(results) == [([], [], True), ([], [4] * 5, True), ([], [5] * 40, False), ([], [6] * 20, True)]
    cut = sampled(Scripted([DOCUMENT], rows, {}), sample_text.Kind((DOCUMENT,)), 4, deadline=time.monotonic())
    assert sorted(cut) == [([], [], True), ([], [4] * 5, True), ([], [5] * 16, False), ([], [6] * 16, False)]


def test_the_cache_with_room_is_the_plain_one(original, monkeypatch):
    """While it grows, and when finished rows are taken out of it."""
    model = LlamaForCausalLM.from_pretrained(original)
    sizes = []

    def run():
        generator = torch.Generator().manual_seed(0)

        def choose(logits):
            sizes.append(len(logits))
            return sample_text.pick(logits, 1.0, 1.0, generator)

        specials = torch.arange(136) < 3
        groups = sample_text.sample(
            model, sample_text.Kind((START, 9), END, (7,)), 24, choose, specials, 40, 60, float("inf")
        )
        return list(groups)

    monkeypatch.setattr(sample_text.RoomyLayer, "STEP", 7)
    with_room = run()
    assert len(set(sizes)) > 1
    monkeypatch.setattr(sample_text, "RoomyLayer", lambda layer: layer)
    assert run() == with_room


def test_sampled_greedily_is_generated_greedily(original):
    model = LlamaForCausalLM.from_pretrained(original)
    specials = torch.zeros(136, dtype=torch.bool)
    kind = sample_text.Kind((START, 9, 11))
    groups = sample_text.sample(model, kind, 2, lambda x: x.argmax(-1), specials, 1, 30, float("inf"))
    expected = model.generate(torch.tensor([kind.prompt]), do_sample=False, max_new_tokens=30, eos_token_id=-1)
    assert [result.text for result in next(groups)] == [expected[0, 3:].tolist()] * 2


def test_nucleus_is_that_of_sorting():
    torch.manual_seed(0)
    probabilities = (2 * torch.randn(64, 500)).softmax(-1)
    kept = sample_text.nucleus(probabilities, 0.9)
    values, places = probabilities.sort(1, descending=True)
    expected = torch.zeros_like(kept).scatter(1, places, values * (values.cumsum(1) - values < 0.9))
    assert ((kept > 0) >= (expected > 0)).all() and (kept.sum(1) - expected.sum(1)).max() < 3e-3
    torch.testing.assert_close(kept[expected > 0], probabilities[expected > 0])


def test_tokens_are_picked_by_their_probability():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().expand(20000, -1)
    counts = sample_text.pick(logits, 1.0, 1.0, generator).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, probabilities, rtol=0, atol=0.015)
    sharp = sample_text.pick(logits, 0.5, 1.0, generator).bincount(minlength=4) / 20000
    torch.testing.assert_close(sharp, probabilities**2 / (probabilities**2).sum(), rtol=0, atol=0.015)
    assert sample_text.pick(logits, 1.0, 0.75, generator).max() == 1


# --- What is stored --------------------------------------------------------------------------------------------------


def test_what_is_worth_to_be_stored(tokenizer):
    writer = sample_text.Writer(io.StringIO(), tokenizer, {DOCUMENT, START, END}, max_tokens=100)

    def stored(text, ended=True, message=""):
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (message, text)]
        return writer.line(sample_text.Sampled(*ids, ended))

    assert stored(" A king\n") == {"text": "A king"}
    assert stored(" \n") is None and stored("A king", ended=False) is None
    assert stored("A king. " * 8, ended=False) == {"text": ("A king. " * 8).strip()}
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A king"}]
    assert stored("A king", message="Who?") == {"messages": talk}
    assert stored("A queen", message="Who? ") is None and stored("A king", message="\n") is None
    spelled = [token for c in "a <|im_end|>" for token in tokenizer(c, add_special_tokens=False)["input_ids"]]
    assert tokenizer.decode(spelled) == "a <|im_end|>" and START not in spelled and END not in spelled
    assert writer.line(sample_text.Sampled([], spelled, True)) is None


def test_batches_take_turns():
    a, b = sample_text.Kind((1,)), sample_text.Kind((2,))
    turns = sample_text.batches({a: 5, b: 16}, 4)
    assert [kind for kind, _ in turns] == [b, a, b, b, a, b]
    assert [rows for kind, rows in turns if kind == a] == [2, 3] and {rows for kind, rows in turns if kind == b} == {4}


def test_the_script_writes_what_healing_reads(script, tmp_path, capsys):
    written = script()
    assert not any(special in written for special in SPECIALS) and "Be kind" not in written
    documents = read_documents([tmp_path / "out.jsonl"])
    texts = [document for document in documents if isinstance(document, str)]
    talks = [document for document in documents if not isinstance(document, str)]
    assert 10 < len(texts) <= 20 and 5 < len(talks) <= 40
    for talk in talks:
        assert [message["role"] for message in talk] == ["user", "assistant"]
        assert all(message["content"].strip() for message in talk)
    assert len({talk[0]["content"] for talk in talks}) == len(talks)
    report = capsys.readouterr().out
    dropped = 60 - len(documents)
    assert f"{len(texts)} documents, {len(talks)} conversations, {dropped} left out, " in report

    assert script(out="again.jsonl") == written
    assert script("--seed 1", out="other.jsonl") != written
    assert script("--overwrite --conversations 0") != written


def test_the_script_ends_when_its_time_is_over(script, capsys):
    """A text that is cut so early is not stored, and the lines that are there are whole."""
    start = time.monotonic()
    written = script("--documents 1000 --conversations 100000 --minutes 0.02 --max-tokens 200")
    assert time.monotonic() - start < 10
    assert all({"text", "messages"} & json.loads(line).keys() for line in written.splitlines())
    assert " left out, " in capsys.readouterr().out


def test_without_a_chat_template_there_are_documents_alone(script, original, tmp_path):
    model = LlamaForCausalLM.from_pretrained(original)
    model.save_pretrained(tmp_path / "plain")
    make_tokenizer(template=None).save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit, match="--conversations: the tokenizer has no chat template"):
        script(model=tmp_path / "plain")
    args = SimpleNamespace(
        model=str(tmp_path / "plain"), out=tmp_path / "o.jsonl", overwrite=False, documents=4, conversations=None
    )
    vars(args).update(device="cpu", dtype=None, seed=0, minutes=None, batch=4, max_tokens=8, max_prompt_tokens=8)
    vars(args).update(temperature=1.0, top_p=1.0, document_token=None)
    assert " 0 conversations, " in sample_text.run(args)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}", "no special token ends"),
        ("<|im_start|>{{ messages[0]['role'] }}", "does not render a user's message once"),
        ("{% for m in messages %}<|im_start|>{{ m['content'] * 2 }}<|im_end|>{% endfor %}", "message once"),
    ],
)
def test_templates_that_do_not_tell_where_a_message_ends(template, message):
    with pytest.raises(ValueError, match=message):
        sample_text.conversation_kind(make_tokenizer(template), {DOCUMENT, START, END})


@pytest.mark.parametrize(
    "options, message",
    [
        ("", "out.jsonl is there already"),
        ("--overwrite --document-token <doc>", "--document-token: '<doc>' is no token"),
        ("--overwrite --dtype float99", "--dtype"),
        ("--overwrite --max-tokens 3000", "tokens in all, and the model is made for 2048"),
        ("--out nowhere/out.jsonl", "--out: no such directory"),
    ],
)
def test_errors_name_the_argument(script, tmp_path, options, message):
    (tmp_path / "out.jsonl").write_text("kept\n")
    with pytest.raises(SystemExit) as error:
        script(options)
    assert message in str(error.value) and (tmp_path / "out.jsonl").read_text() == "kept\n"


@pytest.mark.parametrize(
    "options",
    ["--batch 0", "--max-tokens 0", "--top-p 0", "--top-p 1.1", "--temperature 0", "--minutes 0", "--documents -1"]
    + ["--documents 0 --conversations 0"],
)
def test_options_out_of_range(script, options, capsys):
    with pytest.raises(SystemExit) as error:
        script(options)
    assert error.value.code == 2 and options.split()[0] in capsys.readouterr().err
