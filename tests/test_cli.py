"""The command kda-hf, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kda_hf import KDAForCausalLM
from kda_hf.cli import main


ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "kda-hf-tiny"


def kda_hf(*arguments, text=None, cwd=None):
    command = [sys.executable, "-P", "-m", "kda_hf.cli", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_info_names_the_backends():
    result = kda_hf("info")
    assert result.returncode == 0, result.stderr
    for word in ("kda_hf", "torch", "transformers", "device:", "the CUDA extension", "the CPU extension", "usable"):
        assert word in result.stdout


def test_generate_streams_and_reports(tmp_path):
    result = kda_hf(
        "generate", "--model", MODEL, "--prompt", "And the king", "--greedy", "--max-new-tokens", 12, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("And the king")
    for word in ("prefill", "decode", "tokens/s", "backend"):
        assert word in result.stdout


def test_generate_is_reproducible_and_reads_standard_input():
    arguments = ("generate", "--model", MODEL, "--prompt", "-", "--seed", 5, "--max-new-tokens", 12)
    texts = {kda_hf(*arguments, text="And the king").stdout.rsplit("[", 1)[0] for _ in range(2)}
    assert len(texts) == 1 and texts.pop().startswith("And the king")


def test_chat_goes_on_where_it_stopped(tmp_path):
    arguments = ("chat", "--model", MODEL, "--greedy", "--max-new-tokens", 6)
    session = ("--session", tmp_path / "talk.safetensors")
    whole = kda_hf(*arguments, text="Who was the king?\nWhat did he say?\n\n")
    assert whole.returncode == 0, whole.stderr
    first = kda_hf(*arguments, *session, text="Who was the king?\n\n")
    second = kda_hf(*arguments, *session, text="What did he say?\n\n")
    assert "goes on after" in second.stdout

    def answers(text):
        lines = [line.replace("> ", "") for line in text.splitlines()]
        return [line for line in lines if line and not line.startswith("[")]

    assert len(answers(whole.stdout)) >= 2
    assert answers(first.stdout) + answers(second.stdout) == answers(whole.stdout)


def test_convert_there_and_back(tiny_config, tmp_path, monkeypatch):
    pure = tiny_config(layer_types=["linear_attention"] * 2, num_hidden_layers=2)
    KDAForCausalLM(pure).save_pretrained(tmp_path / "ours")
    result = kda_hf("convert", "ours", "fla", "--max-shard-size", "20KB", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "fla") in result.stdout
    assert json.loads((tmp_path / "fla" / "config.json").read_text())["model_type"] == "kda"
    assert len(list((tmp_path / "fla").glob("*.safetensors"))) > 2

    script = [sys.executable, "-P", ROOT / "scripts" / "convert_checkpoint.py", "fla", "back", "--to", "kda_hf"]
    result = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--overwrite"):
        main(["convert", "fla", "back"])
    main(["convert", "fla", "back", "--overwrite"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    result = kda_hf("generate", "--model", MODEL, "--device", "cuda")
    assert result.returncode != 0 and "--device: torch finds no GPU" in result.stderr


def test_a_session_whose_files_do_not_fit(tmp_path):
    def chat(name):
        arguments = ("--greedy", "--max-new-tokens", 2, "--session", tmp_path / f"{name}.safetensors")
        return kda_hf("chat", "--model", MODEL, *arguments, text="Who was the king?\n\n")

    for name in ("one", "two", "two"):
        assert chat(name).returncode == 0
    tokens = tmp_path / "one.json"
    for content in ((tmp_path / "two.json").read_text(), "{", "[1, 2]"):
        tokens.write_text(content)
        result = chat("one")
        assert result.returncode != 0 and str(tokens) in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate", "--model", "./no-such-model"), "no-such-model"),
        (("generate",), "--model"),
        (("generate", "--model", MODEL, "--prompt", ""), "--prompt"),
        (("generate", "--model", MODEL, "--dtype", "float99"), "--dtype: 'float99'"),
        (("convert", MODEL, "never-written"), "`rope_parameters` is None"),  # FLA's attention always has RoPE
        (("chant",), "chant"),
    ],
)
def test_errors_are_one_clear_line(arguments, message):
    result = kda_hf(*arguments)
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr
