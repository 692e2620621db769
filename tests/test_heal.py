"""Healing of swapped models: data, losses, the run, interruption and resume."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kda_hf import KDAForCausalLM, swap_attention
from kda_hf.cli import main
from kda_hf.healing import HealInterrupted, HealSettings, checkpoints, data, graphs, heal, log, losses
from kda_hf.healing import run as healing_run
from kda_hf.healing.attention import VARLEN_FITS, last_hidden_state, packed_attention, packs_rows
from kda_hf.ops import fla


ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "models" / "kda-hf-tiny"
WORDS = ["the", "king", "said", "unto", "his", "servants", "that", "a", "great", "wind", "had", "come", "over", "all"]


def llama(seed=0, model=LlamaForCausalLM, config=LlamaConfig, **fields):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return model(config(**(sizes | fields))).eval()


def swapped(teacher, layers=(0, 2)):
    torch.manual_seed(1)
    return swap_attention(teacher, list(layers))


def random_row(*lengths, vocab=97):
    return data.PackedRow([torch.randint(vocab, (length,)) for length in lengths])


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A directory with `teacher/`, `student/` and `text.txt`."""
    folder = tmp_path_factory.mktemp("workshop")
    teacher = llama()
    teacher.save_pretrained(folder / "teacher")
    swapped(teacher).save_pretrained(folder / "student")
    for name in ("teacher", "student"):
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / name)
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(1, 90))) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return folder


def settings_for(workshop, out, **fields):
    defaults = {
        "teacher": str(workshop / "teacher"),
        "student": str(workshop / "student"),
        "data": [str(workshop / "text.txt")],
        "document_separator": "\n\n",
        "out": out,
        "stage1_steps": 6,
        "stage2_steps": 6,
        "stage1_lr": 5e-3,
        "stage2_lr": 2e-3,
        "max_length": 32,
        "tokens_per_batch": 64,
        "save_every": 3,
        "eval_every": 3,
        "eval_tokens": 64,
        "held_out": 0.1,
        "cpu": True,
    }
    return HealSettings(**(defaults | fields))


@pytest.fixture
def settings(workshop, tmp_path):
    return lambda **fields: settings_for(workshop, **({"out": tmp_path / "out"} | fields))


def weights_of(path):
    return load_file(path / "model.safetensors")


def identical(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- Data ------------------------------------------------------------------------------------------------------------


def test_documents_of_files_and_directories(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n \n\nthree")
    talk = [{"role": "user", "content": "Hi"}]
    lines = [{"text": "four\u2028"}, {"messages": talk, "text": "not this"}, {"text": ""}]
    (tmp_path / "b" / "c.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    (tmp_path / "b" / "picture.png").write_bytes(b"\xff")

    assert data.read_documents([tmp_path], separator="\n\n") == ["one", "two", "three", "four\u2028", talk]
    assert data.read_documents([tmp_path / "a.txt"]) == ["one\n\ntwo\n\n \n\nthree"]
    assert data.read_documents([tmp_path, tmp_path / "a.txt"], max_documents=2) == [
        "one\n\ntwo\n\n \n\nthree",
        "four\u2028",
    ]
    assert data.read_documents([tmp_path / "b"], text_field="text") == ["four\u2028", talk]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", b" \n", "has no text"),
        ("x.txt", b"\xff\xfe", "not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: neither a string 'text'"),
        ("x.jsonl", b'{"text": "a"}\n{\n', "line 2"),
        ("x.jsonl", b'"a"\n', "line 1"),
        ("folder/x.csv", b"a", "has no file that ends in"),
    ],
)
def test_files_that_are_no_documents(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_documents([path.parent if "folder" in name else path])


def test_datasets_of_the_hub(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert data.read_documents(["someone/texts:small"], dataset_split="test") == ["one", "two"]
    assert calls == [(("someone/texts", "small"), {"split": "test", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        data.read_documents(["someone/texts"])
    with pytest.raises(ValueError, match="no such file or directory: ./texts"):
        data.read_documents(["./texts"])


def test_what_is_held_out_is_not_trained_on():
    documents = [f"document {i} " * (1 + i % 7) for i in range(200)]
    train, held_out = data.hold_out(documents, 0.1)
    sizes = [sum(map(len, part)) for part in (train, held_out)]
    assert sum(sizes) == sum(map(len, documents)) and 0.08 < sizes[1] / sum(sizes) < 0.12
    assert data.hold_out(list(reversed(documents)), 0.1) == (train, held_out)
    assert set(train) & set(held_out) == set() and sorted(train + held_out) != sorted(documents)
    (begin,), (end,) = ([text for text in part if text not in documents] for part in (train, held_out))
    assert begin + end in documents  # the one that was cut

    train, held_out = data.hold_out(documents * 2, 0.1)
    assert len(set(held_out)) == len(held_out) and not any(text in train for text in held_out)
    assert train.count(train[0]) == 2

    one = "word " * 1000
    (begin,), (end,) = data.hold_out([one], 0.1)
    assert begin + end == one and 400 < len(end) <= 500
    talk = [{"role": "user", "content": "Hi" * 50}]
    assert data.hold_out([talk], 0.1) == ([talk], [])  # a conversation is never cut
    assert data.hold_out(documents, 0.0)[1] == []


def test_tokens_are_made_once(tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    documents = ["And the king", [{"role": "user", "content": "Who was he?"}], "said unto them"]
    corpus, made_of = data.cached_tokens(documents, tokenizer, tmp_path / "tokens.safetensors")
    parts = [corpus.ids[a:b].tolist() for a, b in zip(corpus.bounds[:-1], corpus.bounds[1:], strict=True)]
    assert parts[0] == tokenizer("And the king")["input_ids"] and parts[2] == tokenizer("said unto them")["input_ids"]
    assert parts[1] == tokenizer.apply_chat_template(documents[1], return_dict=False)

    with monkeypatch.context() as patch:
        patch.setattr(data, "tokenize", None)
        again = data.cached_tokens(documents, tokenizer, tmp_path / "tokens.safetensors")
    assert again[1] == made_of and torch.equal(again[0].ids, corpus.ids)
    other = data.cached_tokens(documents[:1], tokenizer, tmp_path / "tokens.safetensors")
    assert other[1] != made_of and other[0].ids.tolist() == parts[0]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        data.tokenize(documents, tokenizer)
    assert data.tokenize([], tokenizer).bounds.tolist() == [0]


def test_rows_hold_every_token_once_an_epoch():
    lengths = torch.tensor([0, 3, 1, 100, 32, 33, 7])
    corpus = data.Corpus(torch.arange(int(lengths.sum()), dtype=torch.int32), lengths.cumsum(0))
    stream = data.RowStream(corpus, max_length=32, tokens_per_row=48, seed=3)
    count = len(stream.rows)
    epochs = [stream.take(count), stream.take(len(data.pack(corpus, 32, 48, torch.Generator().manual_seed(1))))]
    first = epochs[0]
    assert sorted(i for row in first for a, b in row for i in range(a, b)) == list(range(len(corpus.ids)))
    assert all(sum(b - a for a, b in row) <= 48 and all(b - a <= 32 for a, b in row) for row in first)

    stream.seek(0, 0)
    twice = stream.take(2 * count + 3)
    assert twice[:count] == first and twice[count : 2 * count] != first
    stream.seek(0, 2)
    assert stream.take(2 * count + 1) == twice[2:]  # from any place, into the next epoch too
    assert data.RowStream(corpus, 32, 48, seed=4).take(count) != first


# --- Packed rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher",
    [
        pytest.param(lambda: llama(), id="llama"),
        pytest.param(lambda: llama(model=Qwen3ForCausalLM, config=Qwen3Config, head_dim=8), id="qwen3"),
        pytest.param(lambda: llama(model=MistralForCausalLM, config=MistralConfig, sliding_window=8), id="window"),
    ],
)
@torch.no_grad()
def test_packed_documents_are_as_alone(teacher, relative_error):
    """The logits of a document in a row are those that it has alone, for the original and the swapped model."""
    teacher = teacher()
    models = [teacher] if teacher.config.model_type == "mistral" else [teacher, swapped(teacher).eval()]
    row = random_row(5, 1, 30, 30, 1, 70, vocab=4096)
    for model in models:
        with packs_rows(model):
            packed = model.get_output_embeddings()(last_hidden_state(model, row))[0]
        assert model.config._attn_implementation == "sdpa"
        for start, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            alone = model(row.input_ids[:, start:end], use_cache=False).logits[0]
            assert relative_error(packed[start:end], alone) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention runs on a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 8])
def test_packed_attention_in_one_call_cuda(dtype, window, relative_error):
    """In half precision, what the calls of each length give in fp32, and their gradients."""
    row = data.PackedRow([torch.zeros(length) for length in (5, 1, 130, 30, 1, 30)], "cuda")
    shapes = [(1, 4, len(row), 16), (1, 2, len(row), 16), (1, 2, len(row), 16)]
    halves = [torch.randn(shape, dtype=dtype, device="cuda").requires_grad_() for shape in shapes]
    floats = [x.detach().float().requires_grad_() for x in halves]
    weight = torch.randn(1, len(row), 4, 16, device="cuda")
    outputs = []
    for inputs in (halves, floats):
        outputs.append(packed_attention(None, *inputs, None, packed_row=row, scaling=0.3, sliding_window=window)[0])
        (outputs[-1].float() * weight).sum().backward()
    assert VARLEN_FITS and outputs[0].dtype == dtype
    for half, single in [outputs, *((a.grad, b.grad) for a, b in zip(halves, floats, strict=True))]:
        assert relative_error(half, single) < 1e-2


# --- Losses ----------------------------------------------------------------------------------------------------------


def accumulate(loss):
    loss.backward()


def test_stage_1_matches_the_attention_of_the_original():
    teacher, row = llama(), random_row(20, 1, 9)
    student = swapped(teacher)
    hidden = {}
    hook = teacher.model.layers[2].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: hidden.update(inputs=kwargs["hidden_states"], output=output[0]),
        with_kwargs=True,
    )
    with packs_rows(teacher, student):
        errors = losses.layer_matching(teacher, student, row, accumulate)
    hook.remove()
    output = student.model.layers[2].linear_attn(hidden["inputs"], cu_seqlens=row.cu_seqlens)
    expected = (output - hidden["output"]).square().sum() / hidden["output"].square().sum()
    assert errors.shape == (2,)
    torch.testing.assert_close(errors[1], expected.detach())
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == ("linear_attn" in name), name
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cross_entropy", [0.0, 0.5])
def test_stage_2_in_chunks_is_the_divergence_of_all_logits(tied, cross_entropy):
    teacher, row = llama(tie_word_embeddings=tied), random_row(20, 1, 9, 2)
    one, other = swapped(teacher), swapped(teacher)
    with packs_rows(teacher, one, other):
        loss = losses.logit_matching(teacher, one, row, accumulate, chunk=7, cross_entropy=cross_entropy)
        student_logits = other.lm_head(last_hidden_state(other, row))[0]
        with torch.no_grad():
            teacher_logits = teacher.lm_head(last_hidden_state(teacher, row))[0]
    p, q = teacher_logits.softmax(-1), student_logits.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    if cross_entropy:
        for start, end in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True):
            targets = row.input_ids[0, start + 1 : end]
            nll = -q[start : end - 1].log().gather(1, targets[:, None]).sum()
            expected = expected + cross_entropy * nll / len(row)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_run_in_bf16(settings):
    AcceleratorState._reset_state(reset_partial_state=True)  # it holds the precision of the run before
    try:
        path = heal(settings(mixed_precision="bf16", gradient_checkpointing=True))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for stage in "12":
        values = [float(row["loss"]) for row in log.read_log(path.parent / "log.csv") if row["stage"] == stage]
        assert values[-1] < values[0], values
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights_of(path).values())


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (2,), (64, 1)])
def test_losses_are_finite_for_short_documents(lengths):
    teacher, row = llama(), random_row(*lengths)
    student = swapped(teacher)
    with packs_rows(teacher, student):
        assert losses.layer_matching(teacher, student, row, accumulate).isfinite().all()
        assert losses.logit_matching(teacher, student, row, accumulate, cross_entropy=1.0).isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_row_of_fixed_shape_counts_its_documents_alone(stage):
    """Whatever fills it up, before and behind, and also after other documents were in it."""
    teacher, documents = llama(), [torch.randint(97, (length,)) for length in (9, 1, 14)]
    fixed = data.FixedRow(40, 6, 20)
    fixed.fill([torch.randint(97, (length,)) for length in (20, 3, 2, 1, 14)])
    fixed.fill(documents)
    assert fixed.holds([torch.zeros(1)] * 6) and fixed.holds([torch.zeros(20)] * 2)
    assert not any(fixed.holds(x) for x in ([torch.zeros(1)] * 7, [torch.zeros(21)], [torch.zeros(14)] * 3))
    results, students = [], [swapped(teacher), swapped(teacher)]
    for row, student in zip((data.PackedRow(documents), fixed), students, strict=True):
        with packs_rows(teacher, student):
            if stage == 1:
                results.append(losses.layer_matching(teacher, student, row, accumulate))
            else:
                results.append(losses.logit_matching(teacher, student, row, accumulate, chunk=16, cross_entropy=0.5))
    torch.testing.assert_close(*results)
    for (name, a), b in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lengths", [(70, 0, 1, 64, 65), (0, 0), (200,), (0, 3)])
def test_blocks_of_a_fixed_shape(lengths):
    """Each block of each sequence once, and then some that are behind the end of any."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    blocks = fla._blocks(bounds.int(), 200).tolist()
    expected = [[i, block] for i, length in enumerate(lengths) for block in range(-(-length // fla.CHUNK))]
    assert blocks[: len(expected)] == expected and len(blocks) == 4 + len(lengths) - 1
    assert all(block * fla.CHUNK >= 200 for _, block in blocks[len(expected) :])


class Again(graphs.GraphedRow):
    """Computes what it would have captured."""

    def _capture(self, compute):
        self.compute = compute
        compute()  # leaves gradients behind, as a capture does

    def replay(self):
        self.loss = self.compute()


def test_a_run_by_graphs(settings, monkeypatch):
    """As one without: also where the documents of some rows do not fit, and after a resume."""
    plain = heal(settings(gradient_accumulation=2))
    out, update, holds = plain.parent.with_name("graphs"), healing_run.Healing._update, data.FixedRow.holds
    held = []

    def interrupted(self):
        result = update(self)
        if (self.stage, self.step) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def holds_few(row, documents):
        held.append(holds(row, documents) and len(documents) < 4)
        return held[-1]

    monkeypatch.setattr(healing_run, "can_capture", lambda device, autocast, dropout: True)
    monkeypatch.setattr(graphs, "GraphedRow", Again)
    monkeypatch.setattr(data.FixedRow, "holds", holds_few)
    with monkeypatch.context() as patch:
        patch.setattr(healing_run.Healing, "_update", interrupted)
        with pytest.raises(HealInterrupted):
            heal(settings(gradient_accumulation=2, out=out))
    again = heal(settings(gradient_accumulation=2, out=out, resume=True))
    assert len(held) == 24 and any(held) and not all(held)
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(again)[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_where_no_graph_can_be_captured(settings, monkeypatch, caplog):
    def fails(self, compute):
        compute()
        raise RuntimeError("no such memory")

    monkeypatch.setattr(healing_run, "can_capture", lambda device, autocast, dropout: True)
    monkeypatch.setattr(graphs.GraphedRow, "_capture", fails)
    path = heal(settings())
    assert "healing goes on without CUDA graphs: no such memory" in caplog.text
    monkeypatch.undo()
    plain = heal(settings(out=path.parent.with_name("plain")))
    assert identical(weights_of(path), weights_of(plain))


@pytest.mark.skipif(not torch.cuda.is_available() or (fla.VERSION or (0,)) < (0, 6), reason="needs a GPU and FLA 0.6")
def test_graphs_on_a_gpu_cuda(workshop, tmp_path):
    """Losses of a run by graphs are those of one without."""
    teacher = llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "teacher")
    values = []
    for eager in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = healing_run.Healing(
            settings_for(
                workshop,
                tmp_path / f"out{eager}",
                teacher=str(tmp_path / "teacher"),
                student=None,
                layers="0,2",
                cpu=False,
                eager=eager,
                max_length=90,
                tokens_per_batch=512,
            )
        )
        run.run()
        assert (run.graphed is None) == eager
        values.append([float(row["loss"]) for row in log.read_log(tmp_path / f"out{eager}" / "log.csv")])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert values[0] == pytest.approx(values[1], rel=0.05)


def test_losses_are_finite_at_the_edges():
    zeros = torch.zeros(1, 5, 4)
    assert losses.output_error(zeros, zeros) == 0
    assert losses.output_error(torch.ones(1, 5, 4), zeros).isfinite()
    logits = torch.tensor([[0.0, 1e4, -1e4], [3e4, 0.0, 0.0]])
    labels = torch.full((2,), -100)
    assert losses.divergence(logits, -logits, labels, 1.0).isfinite()
    torch.testing.assert_close(losses.divergence(logits, logits, labels), torch.tensor(0.0))


def test_checkpointed_gradients_are_the_same():
    """Also under autocast, whose cache of cast weights must not outlive the pass without gradients."""
    teacher, row = llama(), random_row(30, 10)
    gradients = []
    for checkpointed in (False, True):
        student = swapped(teacher).train()
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        with packs_rows(teacher, student), torch.autocast("cpu", torch.bfloat16):
            losses.logit_matching(teacher, student, row, accumulate)
        gradients.append([parameter.grad for parameter in student.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# --- The run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole_run(workshop, tmp_path_factory):
    """An uninterrupted run of six steps a stage, as `settings` has it."""
    out = tmp_path_factory.mktemp("whole")
    heal(settings_for(workshop, out))
    return out


def test_twenty_steps_a_stage(settings, workshop, tmp_path):
    """Both losses fall on text that is not trained on, stage 1 changes KDA layers only, and all files are there."""
    path = heal(settings(stage1_steps=20, stage2_steps=20, eval_every=1, eval_tokens=300))
    out = tmp_path / "out"
    assert path == out / "stage2"
    rows = log.read_log(out / "log.csv")
    assert [(row["stage"], row["step"]) for row in rows] == [(s, str(i)) for s in "12" for i in range(1, 21)]
    for stage in "12":
        held_out = [float(row["held_out_loss"]) for row in rows if row["stage"] == stage]
        assert held_out[-1] < 0.97 * held_out[0], held_out
    layers = log.read_log(out / "layers.csv")
    assert len(layers) == 20 and set(layers[0]) == {"stage", "step", "layer_0", "layer_2"}
    mean = (float(layers[3]["layer_0"]) + float(layers[3]["layer_2"])) / 2
    assert mean == pytest.approx(float(rows[3]["loss"]))

    before, stage1, stage2 = (weights_of(p) for p in (workshop / "student", out / "stage1", out / "stage2"))
    assert before.keys() == stage1.keys() == stage2.keys()
    for name in before:
        assert torch.equal(before[name], stage1[name]) == (".linear_attn." not in name), name
        assert not torch.equal(stage1[name], stage2[name]), name
    healed = AutoModelForCausalLM.from_pretrained(path)
    assert type(healed) is KDAForCausalLM and healed.config._attn_implementation == "sdpa"
    ids = AutoTokenizer.from_pretrained(path)("And the king", return_tensors="pt").input_ids
    assert healed.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]

    held_out = data.read_documents([out / "heldout.jsonl"])
    train = load_file(out / "train.safetensors")
    text = AutoTokenizer.from_pretrained(path).decode(train["ids"])
    assert all(document not in text for document in held_out if len(document) > 100)


def test_plot(whole_run, tmp_path, monkeypatch):
    """At the end of a run, and from its CSV files at any time."""
    pytest.importorskip("matplotlib")
    assert (whole_run / "heal.svg").read_text().startswith("<?xml")

    def draw(run):
        monkeypatch.setattr(sys, "argv", ["plot_heal.py", str(run), str(tmp_path / "again.png")])
        runpy.run_path(str(ROOT / "scripts" / "plot_heal.py"), run_name="__main__")

    draw(whole_run)
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="log.csv has no line"):
        draw(tmp_path)


def test_kda_alone_can_be_trained(settings, workshop):
    path = heal(settings(stages=[2], stage2_steps=2, train="kda", layers="0,2", student=None, save_dtype="bfloat16"))
    before = weights_of(workshop / "teacher")
    after = weights_of(path)
    kept = [name for name in after if ".linear_attn." not in name]
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in kept)
    assert AutoModelForCausalLM.from_pretrained(path).config.layer_types == [
        "linear_attention",
        "full_attention",
        "linear_attention",
    ]


class Killed(BaseException):
    """What a test raises where a process would die."""


@pytest.mark.parametrize("how", ["signal", "kill"])
@pytest.mark.parametrize("updates", [2, 4, 6, 8, 11])
def test_resumed_run_ends_at_the_same_weights(settings, whole_run, monkeypatch, updates, how):
    """Interrupted in stage 1, between the stages and in stage 2, before and after a checkpoint, by a signal and by the
    death of the process."""
    update, done = healing_run.Healing._update, []

    def interrupted(self):
        result = update(self)
        done.append(1)
        if len(done) == updates:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(healing_run.Healing, "_update", interrupted)
        with pytest.raises(Killed if how == "kill" else HealInterrupted) as caught:
            heal(settings())
    if how == "signal":
        assert caught.value.signum == signal.SIGTERM and caught.value.checkpoint.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    path = heal(settings(resume=True))
    for stage in ("stage1", "stage2"):
        assert identical(weights_of(path.parent / stage), weights_of(whole_run / stage))
    for name in ("log.csv", "layers.csv"):
        rows, expected = (log.read_log(folder / name) for folder in (path.parent, whole_run))
        same = [key for key in expected[0] if key not in ("seconds", "tokens_per_second")]
        assert [[row[key] for key in same] for row in rows] == [[row[key] for key in same] for row in expected]


def test_a_run_that_dies_while_it_writes_a_model(settings, whole_run, monkeypatch):
    def dies(self, folder, **kwargs):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(KDAForCausalLM, "save_pretrained", dies)
        with pytest.raises(Killed):
            heal(settings())
    assert not (settings().out / "stage1").exists()
    path = heal(settings(resume=True))
    for stage in ("stage1", "stage2"):
        assert identical(weights_of(path.parent / stage), weights_of(whole_run / stage))
    assert not list(path.parent.glob("*.tmp"))


def test_a_finished_run_can_be_resumed(settings, whole_run):
    first = heal(settings(resume=True))  # from no checkpoint: from the start
    weights = weights_of(first)
    assert identical(weights, weights_of(whole_run / "stage2"))
    assert identical(weights_of(heal(settings(resume=True))), weights)
    assert [path.name for path in checkpoints.checkpoints(first.parent / "checkpoints")] == [
        "stage2-step000003.pt",
        "stage2-step000006.pt",
    ]


def test_checkpoints_are_whole(tmp_path, monkeypatch):
    for step in (9, 10, 11):
        checkpoints.save_checkpoint(tmp_path, 1, step, {"step": step}, keep=2)
    save = torch.save

    def dies(state, file):
        file.write(b"half of it")
        raise Killed

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        checkpoints.save_checkpoint(tmp_path, 2, 1, {"step": 1}, keep=2)
    monkeypatch.setattr(torch, "save", save)
    found = checkpoints.checkpoints(tmp_path)
    assert [checkpoints.load_checkpoint(path)["step"] for path in found] == [10, 11]


def test_rows_of_an_update_weigh_by_their_tokens(settings, monkeypatch):
    """Gradient accumulation: the gradient of an update is that of the mean over all of its tokens."""
    run = healing_run.Healing(settings(gradient_accumulation=3, stages=[2]))
    run._start_stage()
    gradients = []
    monkeypatch.setattr(
        run.optimizer, "step", lambda: gradients.extend(p.grad.clone() for p in run.student.parameters())
    )
    run.settings.max_grad_norm = 1e9
    with packs_rows(run.teacher, run.student):
        loss, _, line = run._update()
        run.stream.seek(0, 0)
        pieces = [piece for row in run.stream.take(3) for piece in row]
        row = data.PackedRow([run.train_data.ids[a:b] for a, b in pieces])
        assert line["tokens"] == len(row)
        expected = losses.logit_matching(run.teacher, run.student, row, accumulate)
    assert loss == pytest.approx(float(expected), rel=1e-4)
    for gradient, parameter in zip(gradients, run.student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_gradients_that_are_not_finite(settings, monkeypatch):
    """Such a step is skipped and counted; several in a row end the run."""
    clip = torch.nn.utils.clip_grad_norm_
    bad = {2, 3}

    def clipped(parameters, limit):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) in bad:
            parameters[0].grad.fill_(float("nan"))
        return clip(parameters, limit)

    calls: list[int] = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    path = heal(settings(max_skipped=3))
    assert [row["skipped"] for row in log.read_log(path.parent / "log.csv")][:5] == ["0", "1", "2", "2", "2"]
    assert all(tensor.isfinite().all() for tensor in weights_of(path).values())

    calls.clear()
    with pytest.raises(RuntimeError, match="2 updates in a row were not finite, up to step 3 of stage 1.*`stage1_lr`"):
        heal(settings(max_skipped=2, out=path.parent / "again"))


def test_weight_decay_spares_what_is_no_matrix():
    student = swapped(llama())
    healing_run.choose_trained(student, kda_only=True)
    decayed, spared = (
        {id(p) for p in group["params"]} for group in healing_run.make_optimizer(student, 1e-3, 0.1).param_groups
    )
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    assert {names[i].split(".")[-2] for i in decayed} >= {"q_proj", "o_proj", "f_a_proj", "b_proj"}
    for part in ("A_log", "dt_bias", "conv1d", "norm"):
        assert any(part in names[i] for i in spared) and not any(part in names[i] for i in decayed)
    assert {names[i] for i in decayed | spared} == {name for name in names.values() if ".linear_attn." in name}


def test_learning_rate():
    rates = [healing_run.learning_rate_at(step, 100, 0.1, 0.2) for step in range(101)]
    assert 0 < rates[0] < rates[9] < 1 and rates[10] == 1 and rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:-1], rates[11:], strict=True))
    assert healing_run.learning_rate_at(0, 1, 0.0, 0.1) == 1


def test_a_run_without_matplotlib(settings, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = heal(settings(stages=[1], stage1_steps=1))
    assert "no plot" in capsys.readouterr().out and not (path.parent / "heal.svg").exists()
    with pytest.raises(ImportError, match=r"kda_hf\[plot\]"):
        heal(settings(plot=path.parent / "x.svg", out=path.parent / "other"))


# --- What a user may get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"student": None}, "`student` or `layers`"),
        ({"layers": "3:1"}, "`student` or `layers`"),
        ({"stages": [2, 1]}, "`stages`"),
        ({"stages": [3]}, "`stages`"),
        ({"stage2_steps": 0}, "`stage2_steps`"),
        ({"stage1_lr": float("nan")}, "`stage1_lr`"),
        ({"held_out": 1.0}, "`held_out`"),
        ({"max_length": 100}, "`max_length` .100. can't exceed `tokens_per_batch`"),
        ({"train": "mlp"}, "`train`"),
        ({"mixed_precision": "fp16"}, "`mixed_precision`"),
        ({"teacher": "./nothing"}, "`teacher`: no such model: ./nothing"),
        ({"student": str(TOKENIZER)}, "`student` and `teacher` differ in hidden_size"),
        ({"data": ["./nothing.txt"]}, "`data`"),
        ({"save_dtype": "float99"}, "`save_dtype`"),
    ],
)
def test_errors_name_the_setting(settings, fields, message):
    with pytest.raises(ValueError, match=message):
        heal(settings(**fields))


def test_a_student_must_be_swapped(settings, workshop):
    with pytest.raises(ValueError, match="`student`: .* is a LlamaForCausalLM"):
        heal(settings(student=str(workshop / "teacher")))


def test_what_does_not_go_on(settings, workshop, tmp_path):
    heal(settings(stages=[1], stage1_steps=1))
    with pytest.raises(ValueError, match="`out`: .* has checkpoints of a run: give `resume`"):
        heal(settings(stages=[1], stage1_steps=1))
    with pytest.raises(ValueError, match=r"other settings: `stage1_steps` \(1, now 2\), `seed` \(0, now 1\)"):
        heal(settings(stages=[1], stage1_steps=2, seed=1, resume=True))
    (tmp_path / "more.txt").write_text("some more text")
    more = [str(workshop / "text.txt"), str(tmp_path / "more.txt")]
    with pytest.raises(ValueError, match="another `data`"):
        heal(settings(stages=[1], stage1_steps=1, data=more, resume=True))


# --- The command -----------------------------------------------------------------------------------------------------

ARGUMENTS = "heal --teacher teacher --data text.txt --document-separator \\n\\n --stage1-steps 6 --stage2-steps 6"
ARGUMENTS += " --stage1-lr 5e-3 --stage2-lr 2e-3 --max-length 32 --tokens-per-batch 64 --save-every 3 --eval-every 3"
ARGUMENTS += " --eval-tokens 64 --held-out 0.1 --cpu"


def test_errors_of_the_command(monkeypatch, workshop, capsys):
    monkeypatch.chdir(workshop)
    for extra, message in (
        (["--student", "student", "--out", "x", "--stages", "7"], "`stages`"),
        (["--student", "./nobody", "--out", "x"], "`student`: no such model: ./nobody"),
        (["--student", "student", "--out", "x", "--data", "nothing.txt"], "`data`: no such file"),
        (["--student", "student", "--out", "x", "--data", "owner/none"], "pip install datasets"),
    ):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(SystemExit) as error:
            main([*ARGUMENTS.split(), *extra])
        assert message in str(error.value)
    with pytest.raises(SystemExit):
        main(["heal", "--out", "x"])
    assert "--teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_a_terminated_command_goes_on(workshop, whole_run, tmp_path):
    """From another directory, ended by a real SIGTERM, and resumed: the weights of a run that was left alone."""
    for name in ("teacher", "student", "text.txt"):
        (tmp_path / name).symlink_to(workshop / name)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-P", str(ROOT / "scripts" / "heal.py"), *ARGUMENTS.split()[1:]]
    command += ["--student", "student", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 240
    while len(log.read_log(tmp_path / "run" / "log.csv")) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "interrupted by SIGTERM" in errors and "--resume" in errors and "Traceback" not in errors
    assert len(log.read_log(tmp_path / "run" / "log.csv")) < 12

    result = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "goes on after step" in result.stdout and "[written: run/stage2]" in result.stdout
    assert identical(weights_of(tmp_path / "run" / "stage2"), weights_of(whole_run / "stage2"))


@pytest.mark.slow
def test_two_processes_do_as_one_that_accumulates(workshop, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    runs = []
    for processes, accumulation in ((1, 2), (2, 1)):
        out = tmp_path / str(processes)
        command = [*launch, str(processes), str(ROOT / "scripts" / "heal.py"), *ARGUMENTS.split()[1:]]
        command += ["--student", "student", "--out", str(out), "--gradient-accumulation", str(accumulation)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if torch.cuda.device_count() < 2:  # one for each process, or none
            environment["CUDA_VISIBLE_DEVICES"] = ""
        result = subprocess.run(command, cwd=workshop, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        runs.append((weights_of(out / "stage2"), log.read_log(out / "log.csv")))
    (one, one_log), (two, two_log) = runs
    for column in ("loss", "held_out_loss"):
        for a, b in zip(one_log, two_log, strict=True):
            assert a[column] == b[column] == "" or float(a[column]) == pytest.approx(float(b[column]), rel=1e-3)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0.05, atol=5e-3, msg=name)
