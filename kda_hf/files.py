"""Directories of checkpoints: where they are, what lies beside the weights, and how one comes to be as a whole."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download


BESIDE_THE_MODEL = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
)


def checkpoint_directory(source: str | Path) -> Path:
    """`source`, or where what it names on the Hub lies. Raises FileNotFoundError where there is no checkpoint."""
    path = Path(source)
    if not path.is_dir():
        if path.is_absolute() or str(source).startswith("."):
            raise FileNotFoundError(f"no such directory: {source}")
        try:
            path = Path(snapshot_download(str(source), ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{source} is no directory here, and the Hub gives none: {error}") from error
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{source} has no config.json")
    return path.resolve()


def copy_beside_the_model(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation configuration of a checkpoint, to another."""
    for pattern in BESIDE_THE_MODEL:
        for path in source.glob(pattern):
            if path.suffix != ".safetensors":
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target / path.name)


def check_target(target: Path, source: Path, source_name: str, overwrite: bool) -> None:
    """Raises ValueError or FileExistsError where `target` may not become a new directory made of `source`."""
    if target == source or target in source.parents:
        raise ValueError(f"`target` must not be `{source_name}`, or have it inside: {target}")
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty; `overwrite` (--overwrite) replaces it")


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """An empty directory to fill, which becomes `target` at the end. Where something fails, `target` is what it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
