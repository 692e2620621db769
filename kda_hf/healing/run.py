"""The healing run: the stages, their updates, interruption and resume."""

import json
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..modeling_kda import KDAForCausalLM
from ..swap import swap_attention
from .attention import packs_rows
from .checkpoints import HealInterrupted, Interruption, checkpoints, load_checkpoint, save_checkpoint
from .data import Corpus, FixedRow, PackedRow, RowStream, cached_tokens, hold_out, pack, read_documents, write_documents
from .graphs import GraphedRow, can_capture, captured
from .log import Log, plot_log, require_matplotlib
from .losses import layer_matching, logit_matching, swapped_layers
from .settings import HealSettings


def load_causal_lm(path: str, gguf_file: str | None = None, **options: Any) -> tuple[PreTrainedModel, Any]:
    """
    A causal language model and its tokenizer.

    Args:
        path (`str`): directory or Hub name of a checkpoint, or a .gguf file.
        gguf_file (`str`, *optional*): name of a GGUF file in that directory.
        options: for `from_pretrained` of the model.

    Raises:
        ValueError: a path that does not exist.
    """
    place = Path(path)
    if not place.exists() and (place.is_absolute() or path.startswith(".") or place.suffix == ".gguf"):
        raise ValueError(f"no such model: {path}")
    if place.suffix == ".gguf":
        path, gguf_file = str(place.parent), place.name
    from_gguf = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(path, **from_gguf)
    return AutoModelForCausalLM.from_pretrained(path, **from_gguf, **options), tokenizer


def learning_rate_at(step: int, steps: int, warmup: float, final: float) -> float:
    """Share of the peak for update `step` of `steps`, from 0: a line up, then half a cosine down to `final`."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(steps - rising, 1)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW of what is trained: weight decay on the layers' matrices only, not on embeddings, norms, biases,
    convolutions, `A_log` and `dt_bias`."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if decays else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def choose_trained(student: KDAForCausalLM, kda_only: bool) -> None:
    """Freezes all parameters but those to be trained."""
    student.requires_grad_(not kda_only)
    for index in swapped_layers(student):
        student.model.layers[index].linear_attn.requires_grad_(True)


def heal(settings: HealSettings) -> Path:
    """
    Trains the KDA layers of a swapped model, and what the settings say besides, to do what the original does.

    Writes to `settings.out`: the models, `stage1/` and `stage2/`, each with its tokenizer; `log.csv`, `layers.csv` and
    a plot; `heldout.jsonl`, the text that was kept out; `settings.json`; and checkpoints, which `resume` goes on from.

    Returns:
        The directory of the last stage's model.

    Raises:
        ValueError: settings that do not fit the models, the data or the checkpoint; the message names them.
        HealInterrupted: SIGINT or SIGTERM came; a checkpoint is written.
        RuntimeError: the gradients of several updates in a row are not finite.
        ImportError: a dataset of the Hub without `datasets`, or a plot asked for without matplotlib.
    """
    return Healing(settings).run()


class Healing:
    """A run: models, data, and how far it is. `heal` is what to call."""

    PROGRESS = ("stage", "step", "tokens", "seconds", "skipped", "skipped_in_a_row")

    def __init__(self, settings: HealSettings):
        self.settings = settings
        if settings.plot is not None:
            require_matplotlib()
        bf16 = not settings.cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = settings.mixed_precision or ("bf16" if bf16 else "no")
        self.accelerator = Accelerator(mixed_precision=precision, cpu=settings.cpu)
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"each process holds the whole model here: start it with plain data parallelism, not {kind}"
            )
        self.device = self.accelerator.device
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used

        self.folder = settings.out / "checkpoints"
        self.found = checkpoints(self.folder)
        if self.found and not settings.resume:
            raise ValueError(f"`out`: {settings.out} has checkpoints of a run: give `resume`, or another directory")
        settings.out.mkdir(parents=True, exist_ok=True)
        self._load_models(torch.bfloat16 if precision == "bf16" else torch.float32)
        self._load_data()
        # Where the run is: the stage, updates done in it, and the data used
        self.stage, self.step = settings.stages[0], 0
        self.tokens, self.seconds, self.skipped, self.skipped_in_a_row = 0, 0.0, 0, 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.graphed: GraphedRow | None = None  # of this stage
        self.stream = RowStream(self.train_data, settings.max_length, settings.tokens_per_batch, settings.seed)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    # --- What it starts from ---

    def _load_models(self, teacher_dtype: torch.dtype) -> None:
        settings = self.settings
        # A model out of a GGUF file refuses to be cast later on
        self.teacher, self.tokenizer = self._load("teacher", teacher_dtype)
        if settings.student is not None:
            student, _ = self._load("student", "auto")
            if not isinstance(student, KDAForCausalLM):
                raise ValueError(f"`student`: {settings.student} is a {type(student).__name__}, not a swapped model")
        else:
            assert settings.layers is not None
            original, _ = self._load("teacher", "auto")
            torch.manual_seed(settings.seed)
            student = swap_attention(original, settings.layers)
        self.save_dtype = student.dtype
        if settings.save_dtype is not None:
            dtype = getattr(torch, settings.save_dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"`save_dtype`: {settings.save_dtype!r} is no dtype of torch")
            self.save_dtype = dtype
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            ours, theirs = getattr(student.config, name), getattr(self.teacher.config, name, None)
            if ours != theirs:
                raise ValueError(f"`student` and `teacher` differ in {name}: {ours} and {theirs}")
        if not swapped_layers(student):
            raise ValueError("`student` or `layers`: no layer is swapped, there is nothing to heal")
        self.teacher.to(self.device).eval().requires_grad_(False)
        self.student: KDAForCausalLM = student.to(self.device, torch.float32).train()

    def _load(self, name: str, dtype: torch.dtype | str) -> tuple[PreTrainedModel, Any]:
        gguf_file = self.settings.gguf_file if name == "teacher" else None
        try:
            return load_causal_lm(getattr(self.settings, name), gguf_file, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"`{name}`: {error}") from error

    def _load_data(self) -> None:
        settings = self.settings
        separator = settings.document_separator
        documents = read_documents(
            settings.data,
            separator=separator.replace("\\n", "\n") if separator else None,
            text_field=settings.text_field,
            dataset_split=settings.dataset_split,
            max_documents=settings.max_documents,
        )
        train, held_out = hold_out(documents, settings.held_out)
        with self.accelerator.main_process_first():  # which writes what the others then find
            self.train_data, self.made_of = cached_tokens(train, self.tokenizer, settings.out / "train.safetensors")
            held_out_data, _ = cached_tokens(held_out, self.tokenizer, settings.out / "heldout.safetensors")
        if len(self.train_data.ids) == 0:
            raise ValueError("`data` has no token to train on")
        self.held_out_rows = self._rows_up_to(held_out_data, settings.eval_tokens)
        self.held_out_data = held_out_data
        if self.is_main:
            write_documents(held_out, settings.out / "heldout.jsonl")
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            text = json.dumps(asdict(settings) | versions, indent=1, default=str)
            (settings.out / "settings.json").write_text(text + "\n")

    def _rows_up_to(self, data: Corpus, tokens: int) -> list[list[tuple[int, int]]]:
        rows = pack(data, self.settings.max_length, self.settings.tokens_per_batch)
        kept: list[list[tuple[int, int]]] = []
        size = 0
        for row in rows:
            size += _size(row)
            if kept and size > tokens:
                break
            kept.append(row)
        return kept

    # --- Checkpoints ---

    def _checkpoint(self) -> Path:
        settings = self.settings
        path = self.folder
        if self.is_main:
            assert self.optimizer is not None
            state = {
                "student": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": {name: getattr(self, name) for name in self.PROGRESS},
                "data": {"made_of": self.made_of, "epoch": self.stream.epoch, "row": self.stream.row},
                "settings": settings.decisive() | {"processes": self.accelerator.num_processes},
            }
            path = save_checkpoint(self.folder, self.stage, self.step, state, settings.keep)
        self.accelerator.wait_for_everyone()
        return path

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path)
        now = self.settings.decisive() | {"processes": self.accelerator.num_processes}
        if changed := [name for name, value in now.items() if state["settings"].get(name) != value]:
            values = ", ".join(f"`{name}` ({state['settings'].get(name)}, now {now[name]})" for name in changed)
            raise ValueError(f"`resume`: {path} is of a run with other settings: {values}")
        if state["data"]["made_of"] != self.made_of:
            raise ValueError(f"`resume`: {path} is of a run with another `data` or tokenizer")
        self.student.load_state_dict(state["student"])
        for name in self.PROGRESS:
            setattr(self, name, state["progress"][name])
        self.stream.seek(state["data"]["epoch"], state["data"]["row"])
        self._start_stage()
        assert self.optimizer is not None
        self.optimizer.load_state_dict(state["optimizer"])
        if self.is_main:
            print(f"goes on after step {self.step} of stage {self.stage}: {path}", flush=True)

    # --- The run ---

    def run(self) -> Path:
        settings = self.settings
        if self.found:
            self._resume(self.found[-1])
        self.log = Log(settings.out, swapped_layers(self.student), (self.stage, self.step)) if self.is_main else None
        interruption = Interruption()
        with interruption.watched(), packs_rows(self.teacher, self.student):
            for stage in settings.stages:
                if stage < self.stage:
                    continue
                if stage > self.stage or self.optimizer is None:
                    self.stage, self.step = stage, 0
                    self._start_stage()
                self._run_stage(interruption)
        self._plot()
        return self._export_path(settings.stages[-1])

    def _start_stage(self) -> None:
        choose_trained(self.student, kda_only=self.stage == 1 or self.settings.train == "kda")
        if self.settings.gradient_checkpointing and self.stage == 2:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = make_optimizer(self.student, self._stage("lr"), self.settings.weight_decay)
        self.student.zero_grad(set_to_none=True)
        self.graphed = self._captured()

    def _captured(self) -> GraphedRow | None:
        """The gradients of a row as a CUDA graph, where that can be."""
        settings = self.settings
        self.graphed = None  # its memory is free for the next one
        bf16 = self.accelerator.mixed_precision == "bf16"
        if (
            settings.eager
            or (settings.gradient_checkpointing and self.stage == 2)
            or not can_capture(self.device, bf16, self.student.config.attention_dropout)
        ):
            return None
        documents = max(map(len, self.stream.rows))  # another order may need some more; a row that does goes without
        row = FixedRow(settings.tokens_per_batch, documents + 8, settings.max_length, self.device)
        row.fill([torch.zeros(settings.max_length, dtype=torch.int64)])
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        with packs_rows(self.teacher, self.student):
            return captured(self._loss, row, trained)

    def _stage(self, name: str) -> Any:
        return getattr(self.settings, f"stage{self.stage}_{name}")

    def _run_stage(self, interruption: Interruption) -> None:
        settings, steps = self.settings, self._stage("steps")
        bar = tqdm(total=steps, initial=self.step, desc=f"stage {self.stage}", disable=not self.is_main, unit="step")
        with bar:
            while self.step < steps:
                loss, layer_errors, row = self._update()
                due = settings.eval_every and self.step % settings.eval_every == 0
                held_out = self.held_out_loss() if due or self.step == steps else None
                row["held_out_loss"] = "" if held_out is None else held_out
                if self.log is not None:
                    self.log.write(row, layer_errors)
                bar.set_postfix_str(f"loss {loss:.4g}, {row['tokens_per_second']:,.0f} tokens/s", refresh=False)
                bar.update()
                signum = self._agreed(interruption.signum)
                if signum or self.step % settings.save_every == 0 or self.step == steps:
                    checkpoint = self._checkpoint()
                    if signum:
                        raise HealInterrupted(signum, checkpoint)
        self._export()

    def _update(self) -> tuple[float, list[float] | None, dict[str, Any]]:
        """One step of the optimizer; returns its loss, the layers' errors in stage 1, and the line of the log."""
        assert self.optimizer is not None
        begun, settings, accelerator = time.monotonic(), self.settings, self.accelerator
        processes, rank = accelerator.num_processes, accelerator.process_index
        rows = self.stream.take(processes * settings.gradient_accumulation)
        tokens = sum(map(_size, rows))
        lr = self._stage("lr") * learning_rate_at(self.step, self._stage("steps"), settings.warmup, settings.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # So that dropout follows from the step alone, whatever happened before
        torch.manual_seed((((settings.seed * 2 + self.stage) << 20) + self.step) * processes + rank)

        losses = torch.zeros(len(swapped_layers(self.student)) if self.stage == 1 else 1, device=self.device)
        for row in rows[rank::processes]:
            share = _size(row) / tokens
            losses += share * self._with_gradients(row, share)
        trained = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
        if processes > 1:
            gradients = [parameter.grad for parameter in trained] if self.graphed is None else [self.graphed.gradients]
            for tensor in (losses, *gradients):
                torch.distributed.all_reduce(tensor)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        if self.graphed is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.graphed.gradients.zero_()
        self.step += 1
        self.tokens += tokens
        values = losses.tolist()
        seconds = time.monotonic() - begun
        self.seconds += seconds
        if self.skipped_in_a_row >= settings.max_skipped:
            raise RuntimeError(
                f"the gradients of {self.skipped_in_a_row} updates in a row were not finite, up to step {self.step} of "
                f"stage {self.stage}: lower `stage{self.stage}_lr`, and start from a checkpoint in {self.folder}"
            )
        loss = sum(values) / len(values)
        line = {
            "stage": self.stage,
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "skipped": self.skipped,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        return loss, values if self.stage == 1 else None, line

    def _with_gradients(self, row: list[tuple[int, int]], share: float) -> torch.Tensor:
        """The loss on a row of the training data; so much of its gradients is added."""
        documents = [self.train_data.ids[start:end] for start, end in row]
        if self.graphed is not None and self.graphed.row.holds(documents):
            return self.graphed(documents, share)
        return self._loss(PackedRow(documents, self.device), share)

    def _loss(self, row: PackedRow, share: float | torch.Tensor | None = None) -> torch.Tensor:
        """The stage's loss on a row, `[layers]` or a scalar; with `share`, the gradients of so much of it are added."""

        def add_gradients(loss):
            with torch.autocast(self.device.type, enabled=False):
                self.accelerator.backward(loss * share)

        backward = None if share is None else add_gradients
        with self.accelerator.autocast():
            if self.stage == 1:
                return layer_matching(self.teacher, self.student, row, backward)
            return logit_matching(
                self.teacher,
                self.student,
                row,
                backward,
                chunk=self.settings.logits_chunk,
                cross_entropy=self.settings.cross_entropy,
            )

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """The stage's loss on the held-out text, or None where there is none."""
        if not self.held_out_rows:
            return None
        total = torch.zeros(2, device=self.device)
        self.student.eval()
        for row in self.held_out_rows[self.accelerator.process_index :: self.accelerator.num_processes]:
            loss = self._loss(self._packed(self.held_out_data, row)).mean()
            total += torch.stack([loss * _size(row), loss.new_tensor(_size(row))])
        self.student.train()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(total)
        return float(total[0] / total[1])

    def _packed(self, data: Corpus, row: list[tuple[int, int]]) -> PackedRow:
        return PackedRow([data.ids[start:end] for start, end in row], self.device)

    def _agreed(self, signum: int) -> int:
        """The signal that any of the processes got."""
        if self.accelerator.num_processes == 1:
            return signum
        number = torch.tensor(signum, device=self.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    # --- What it leaves ---

    def _export_path(self, stage: int) -> Path:
        return self.settings.out / f"stage{stage}"

    def _export(self) -> None:
        """The model and its tokenizer, as `from_pretrained` expects them."""
        if self.is_main:
            path = self._export_path(self.stage)
            scratch = path.with_name(path.name + ".tmp")
            shutil.rmtree(scratch, ignore_errors=True)
            cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
            weights = {
                name: cast.setdefault(tensor.data_ptr(), tensor.to(self.save_dtype))
                for name, tensor in self.student.state_dict().items()
            }
            dtype = self.student.config.dtype
            self.student.config.dtype = self.save_dtype
            self.student.save_pretrained(scratch, state_dict=weights)
            self.student.config.dtype = dtype
            self.tokenizer.save_pretrained(scratch)
            if path.exists():
                shutil.rmtree(path)
            os.replace(scratch, path)
        self.accelerator.wait_for_everyone()

    def _plot(self) -> None:
        if not self.is_main:
            return
        picture = self.settings.plot
        if picture is None:
            try:
                require_matplotlib()
            except ImportError as error:
                print(f"no plot: {error}", flush=True)
                return
        plot_log(self.settings.out, picture or self.settings.out / "heal.svg")


def _size(row: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in row)
