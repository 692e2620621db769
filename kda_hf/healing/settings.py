"""The settings of a healing run, which are the options of `kda-hf heal` too."""

import argparse
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any


# What may differ between a run and its continuation: where things are, and what leaves no trace in the weights
FREE = {
    *("teacher", "gguf_file", "student", "data", "out", "plot"),
    *("eager", "resume", "keep", "save_every", "save_dtype", "eval_every", "eval_tokens", "max_skipped"),
}


def _option(default: Any, help: str, **how: Any) -> Any:
    """A field; `how` is for `add_argument`."""
    metadata = {"help": help, **how}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class HealSettings:
    """
    All that a run depends on; the help of each field is that of the option of the same name.

    Raises:
        ValueError: a value out of range, or two that do not go together; the message names the fields.
    """

    teacher: str = _option(MISSING, "the original: directory or Hub name of a checkpoint, or a .gguf file")
    data: list[str] = _option(
        MISSING, "text files, JSONL files, directories of them, or datasets of the Hub (name:configuration)", nargs="+"
    )
    out: Path = _option(MISSING, "directory for models, checkpoints and logs", type=Path)
    student: str | None = _option(None, "the swapped model, as swap_layers.py or an earlier stage wrote it")
    layers: str | None = _option(None, "without --student: which layers to swap, such as 3:1 or 0,1,2,5")
    gguf_file: str | None = _option(None, "name of the GGUF file in the directory --teacher")

    stages: list[int] = _option([1, 2], "1: each layer's output, 2: the logits (default: 1 2)", nargs="+", type=int)
    stage1_steps: int = _option(500, "updates in stage 1 (default: 500)")
    stage2_steps: int = _option(1000, "updates in stage 2 (default: 1000)")
    stage1_lr: float = _option(3e-3, "peak learning rate of stage 1 (default: 3e-3)")
    stage2_lr: float = _option(2e-4, "peak learning rate of stage 2 (default: 2e-4)")
    train: str = _option("all", "what stage 2 trains (default: all)", choices=["all", "kda"])
    cross_entropy: float = _option(0.0, "weight of the text's own cross-entropy in stage 2 (default: 0)")

    max_length: int = _option(2048, "longer documents are cut into pieces of so many tokens (default: 2048)")
    tokens_per_batch: int = _option(16384, "tokens in a row of packed documents (default: 16384)")
    gradient_accumulation: int = _option(1, "rows in an update, on each process (default: 1)")
    document_separator: str | None = _option(
        None, r"what stands between the documents of a text file, \n for a line end (default: a file is a document)"
    )
    text_field: str = _option("text", "where JSONL lines and rows of datasets have their text (default: text)")
    dataset_split: str = _option("train", "split of a dataset of the Hub (default: train)")
    max_documents: int | None = _option(None, "read no more than so many documents")
    held_out: float = _option(0.01, "share of the text that is kept out of training (default: 0.01)")

    warmup: float = _option(0.05, "share of a stage's steps in which the learning rate rises (default: 0.05)")
    final_lr: float = _option(0.1, "share of the peak at which the cosine ends (default: 0.1)")
    weight_decay: float = _option(0.01, "of the layers' matrices (default: 0.01)")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm (default: 1)")
    max_skipped: int = _option(5, "updates with a gradient that is not finite, in a row, that end the run (default: 5)")
    seed: int = _option(0, "of the order of the data, the layers' start and dropout (default: 0)")

    mixed_precision: str | None = _option(
        None, "bf16, or no for fp32 (default: bf16 on a GPU that has it)", choices=["no", "bf16"]
    )
    cpu: bool = _option(False, "run on the CPU even if there is a GPU")
    gradient_checkpointing: bool = _option(False, "keep less for the backward pass of stage 2, compute it again")
    eager: bool = _option(False, "without CUDA graphs, which capture an update's gradients where FLA 0.6 is installed")
    logits_chunk: int = _option(1024, "logits of so many tokens at a time in stage 2 (default: 1024)")

    save_every: int = _option(200, "updates between checkpoints (default: 200)")
    keep: int = _option(2, "checkpoints to keep (default: 2)")
    resume: bool = _option(False, "go on from the last checkpoint in --out, if there is one")
    eval_every: int = _option(
        100, "updates between losses on the held-out text; 0: only at a stage's end (default: 100)"
    )
    eval_tokens: int = _option(65536, "most tokens of held-out text in such a loss (default: 65536)")
    save_dtype: str | None = _option(None, "dtype of the saved models (default: the student's, or the teacher's)")
    plot: Path | None = _option(None, "picture of the losses (default: heal.svg in --out, with matplotlib)", type=Path)

    def __post_init__(self):
        if (self.student is None) == (self.layers is None):
            raise ValueError("give either `student` or `layers`, the layers to swap")
        if not self.stages or sorted(set(self.stages)) != self.stages or not set(self.stages) <= {1, 2}:
            raise ValueError(f"`stages` must be 1, 2 or 1 2, got {' '.join(map(str, self.stages))!r}")
        at_least_one = ("stage1_steps", "stage2_steps", "max_length", "tokens_per_batch", "gradient_accumulation")
        for name in (*at_least_one, "max_skipped", "logits_chunk", "save_every", "keep", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("stage1_lr", "stage2_lr", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        for name in ("cross_entropy", "weight_decay", "eval_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` can't be negative, got {getattr(self, name)}")
        for name in ("held_out", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"`final_lr` must be in [0, 1], got {self.final_lr}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"`max_documents` must be at least 1, got {self.max_documents}")
        if self.max_length > self.tokens_per_batch:
            raise ValueError(
                f"`max_length` ({self.max_length}) can't exceed `tokens_per_batch` ({self.tokens_per_batch})"
            )
        for name in ("train", "mixed_precision"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in (None, *choices):
                raise ValueError(f"`{name}` must be in {choices}, got {getattr(self, name)!r}")
        self.out = Path(self.out)

    def decisive(self) -> dict[str, Any]:
        """The settings that a continued run must share with the one that it continues."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in FREE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field of `HealSettings`."""
    for item in fields(HealSettings):
        how = dict(item.metadata)
        required = item.default is MISSING and item.default_factory is MISSING
        default = None if required else item.default if item.default_factory is MISSING else item.default_factory()
        if isinstance(default, bool):
            how["action"] = "store_true"
        else:
            how.setdefault("type", type(default) if isinstance(default, (int, float)) else str)
        parser.add_argument("--" + item.name.replace("_", "-"), default=default, required=required, **how)
