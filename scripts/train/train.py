#!/usr/bin/env python3
"""Train `kda-hf-tiny` from scratch on one GPU, and export it with its tokenizer.

    python scripts/train/train.py --data .data --out models/kda-hf-tiny --minutes 7.8 --fast-start
    python scripts/train/train.py --data .data --out /tmp/try --device cpu --smoke          # a few steps of a toy model

`--data` holds what `prepare_corpus.py` and `train_tokenizer.py` wrote: `train.bin`, `heldout.bin`, `tokenizer/`. With
`--minutes` the learning rate follows the clock, so that the schedule ends when the budget does, whatever the speed of
the machine; with `--steps` it follows the steps. A budget longer than one sitting is split with `--pause-after` and
`--resume`.

Weights are kept in fp32, the forward pass runs in bf16 where the GPU does. Matrices are trained with Muon (or AdamW),
everything else with AdamW.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import platform
import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, set_seed

from kda_hf import KDAConfig, KDAForCausalLM


PROMPTS = [
    "In the beginning",
    "It was a dark night, and",
    "And the king said unto his servants,",
    "She was not at all surprised to see him, for",
    "The old wizard looked at the young prince and",
    "To install a package, you need to",
    "A function is called when",
    "The purpose of a good book is",
]


def tiny_config(tokenizer, smoke: bool = False) -> KDAConfig:
    """Eight layers, every fourth with attention, that fit in 16 MiB of bf16 together with the tokenizer."""
    return KDAConfig(
        vocab_size=len(tokenizer),
        hidden_size=64 if smoke else 256,
        intermediate_size=128 if smoke else 672,
        num_hidden_layers=4 if smoke else 8,
        linear_num_heads=1 if smoke else 2,
        linear_head_dim=64 if smoke else 128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64 if smoke else 128,
        use_qk_norm=True,
        rope_parameters=None,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# --- Optimizers ------------------------------------------------------------------------------------------------------


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """`[N, rows, columns]` with the singular values of each matrix pushed to about one, by Newton-Schulz in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024: steepest at zero among quintics that stay near one
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024), scaled as in Liu et al. 2025 to AdamW's step size.

    Matrices of one shape are orthogonalized together: a small model has many of them, and each alone is a tiny launch.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, params in by_shape.items():
                grads = [parameter.grad for parameter in params]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                updates = orthogonalize(torch.stack(nesterov)).unbind()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def make_optimizers(model, name: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Weight decay on the layers' matrices only: not on embeddings, norms, convolutions, `A_log` and `dt_bias`."""
    matrices, others = [], []
    for key, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in key and "lm_head" not in key
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": others, "weight_decay": 0.0}]
    optimizers = []
    if name == "muon":
        optimizers.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
    else:
        groups.append({"params": matrices, "weight_decay": weight_decay})
    fused = next(model.parameters()).is_cuda
    optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused))
    return optimizers


def learning_rate_at(progress: float, warmup: float = 0.02, decay: float = 0.5) -> float:
    """Share of the peak at a point of the run in [0, 1]: a warmup, a plateau, a straight line to zero."""
    return max(0.0, min(1.0, progress / warmup, (1 - progress) / decay))


# --- Start-up of FLA's Triton kernels --------------------------------------------------------------------------------


def limit_autotuning(keep: int = 4) -> None:
    """Lets each of FLA's kernels choose between `keep` configurations only.

    They come with up to 36, and to compile them all took five of the first eight minutes on a fresh machine. Those with
    4 warps and 3 stages, or nearest to it, are kept.
    """
    import fla.ops.kda  # noqa: F401 - defines the kernels
    from triton.runtime.autotuner import Autotuner

    for tuner in gc.get_objects():
        if issubclass(type(tuner), Autotuner):
            tuner.configs = sorted(
                tuner.configs, key=lambda config: (abs(math.log2(config.num_warps / 4)), abs(config.num_stages - 3))
            )[:keep]


@contextmanager
def compiling_only():
    """Within, FLA's kernels are compiled on all cores, and not launched: their outputs hold anything."""
    from triton.runtime._async_compile import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def compile_all(self, *args, **kwargs):
        for config in self.configs:
            self.fn.run(*args, **(kwargs | config.all_kwargs() | {"warmup": True}))

    # One thread for the backward pass too, as Triton's mode belongs to the thread that enters it.
    with ThreadPoolExecutor() as pool, torch.autograd.set_multithreading_enabled(False):
        Autotuner.run = compile_all
        try:
            with AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            Autotuner.run = run


# --- Data and evaluation ---------------------------------------------------------------------------------------------


def load_tokens(path: Path, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int32)).to(device)


def random_windows(tokens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """`[batch, length]` windows at random places, drawn on the device that holds the tokens."""
    starts = torch.randint(len(tokens) - length, (batch, 1), device=tokens.device)
    return tokens[starts + torch.arange(length, device=tokens.device)].long()


def bytes_per_id(tokenizer) -> torch.Tensor:
    """How many bytes of text each id stands for: a byte-level token has one character a byte, a special token none."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if i in special else len(name) for i, name in enumerate(names)])


@torch.no_grad()
def bits_per_byte(model, tokens: torch.Tensor, sizes: torch.Tensor, length: int, batch: int, autocast) -> float:
    """Held-out bits per byte. Windows overlap by one token, so that each token but the first is predicted once."""
    model.eval()
    windows = tokens.unfold(0, length, length - 1).long()
    nats = 0.0
    for ids in windows.split(batch):
        with autocast():
            nats += model(input_ids=ids, labels=ids, use_cache=False).loss.double() * ids[:, 1:].numel()
    model.train()
    return float(nats / math.log(2) / sizes.to(tokens.device)[windows[:, 1:]].sum())


@torch.no_grad()
def heldout_file_record(model, tokenizer, text: str, window: int = 512, windows: int = 16) -> dict[str, float]:
    """Loss on the first windows of the held-out file, one at a time: what the tests repeat on every backend."""
    model.eval()
    ids = torch.tensor(tokenizer(text)["input_ids"][: window * windows], device=model.device).view(windows, 1, window)
    losses = [model(input_ids=rows, labels=rows, use_cache=False).loss for rows in ids]
    return {"window": window, "windows": windows, "nats_per_token": round(float(torch.stack(losses).mean()), 4)}


@torch.no_grad()
def write_samples(model, tokenizer, tokens: int = 120) -> list[dict[str, str]]:
    model.eval()
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        ids = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=tokens)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text})
        print(f"--- {text}\n", flush=True)
    return samples


# --- The run ---------------------------------------------------------------------------------------------------------


class Clock:
    """How far the run is, by time or by steps. Time that an earlier sitting took counts; start-up time does not.

    The first steps compile kernels, which says nothing about the pace: `progress` spans the time from `start()` to the
    deadline, and the deadline counts from the start of the script.
    """

    def __init__(self, minutes: float | None, steps: int | None, spent: float = 0.0):
        self.begun = time.monotonic()
        self.minutes, self.steps, self.spent = minutes, steps, spent
        self.started = self.begun

    def start(self) -> None:
        self.started = time.monotonic()

    def seconds(self) -> float:
        """Seconds of training so far, this sitting's start-up included."""
        return self.spent + time.monotonic() - self.begun

    def progress(self, step: int) -> float:
        if self.steps:
            return step / self.steps
        startup = self.started - self.begun
        return (self.seconds() - startup) / max(60 * self.minutes - startup, 1e-6)


def save_checkpoint(path: Path, model, optimizers, step: int, seconds: float) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    scratch = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step, "seconds": seconds}, scratch)
    scratch.replace(path)  # an interrupted save leaves the last checkpoint whole


def export(model, tokenizer, out: Path) -> None:
    """bf16 weights, tokenizer and sampling defaults, as `from_pretrained` expects them."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        repetition_penalty=1.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(".data"))
    parser.add_argument("--out", type=Path, required=True, help="where model, tokenizer, training.json and log.csv go")
    parser.add_argument("--minutes", type=float, help="time budget of the whole run, from the start of the script")
    parser.add_argument("--steps", type=int, help="number of steps, in place of --minutes")
    parser.add_argument("--pause-after", type=float, help="save a checkpoint after this many minutes and stop")
    parser.add_argument("--checkpoint", type=Path, help="where the checkpoint goes (default: checkpoint.pt in --data)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: 4e-3 for muon, 2e-3 for adamw)")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--evaluations", type=int, default=20, help="held-out evaluations in the run")
    parser.add_argument("--log-every", type=int, default=20, help="steps between progress lines")
    parser.add_argument(
        "--fast-start", action="store_true", help="let FLA's kernels tune less, and compile on all cores"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the norms and MLPs around the operators")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a toy model and a few steps, to see that all parts work")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.log_every, args.evaluations = 2, 128, 1, 2
        args.steps = args.steps or (None if args.minutes else 6)
    if (args.minutes is None) == (args.steps is None):
        parser.error("give either --minutes or --steps")
    args.lr = args.lr or {"muon": 4e-3, "adamw": 2e-3}[args.optimizer]
    args.checkpoint = args.checkpoint or args.data / "checkpoint.pt"
    return args


def train(args: argparse.Namespace) -> None:
    clock = Clock(args.minutes, args.steps)
    set_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if on_gpu else nullcontext()

    tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
    sizes = bytes_per_id(tokenizer)
    data = {name: load_tokens(args.data / f"{name}.bin", device) for name in ("train", "heldout", "heldout_small")}
    if args.smoke:
        data["heldout"], data["heldout_small"] = data["heldout"][:1024], data["heldout_small"][:1024]
    bytes_per_token = float(sizes[data["train"].cpu()].sum() / len(data["train"]))

    config = tiny_config(tokenizer, args.smoke)
    model = KDAForCausalLM(config).to(device).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    step = 0
    if args.resume:
        checkpoint = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, clock.spent = checkpoint["step"], checkpoint["seconds"]
        torch.manual_seed(args.seed + step)  # other windows than the first sitting drew
    if args.compile:
        torch._dynamo.config.recompile_limit = 64
        for module in model.modules():
            if type(module).__name__ in ("Qwen3MLP", "Qwen3RMSNorm", "KDARMSNormGated"):
                module.compile()

    args.out.mkdir(parents=True, exist_ok=True)
    log_file = open(args.out / "log.csv", "a" if args.resume else "w", newline="")  # noqa: SIM115 - open for the run
    log = csv.writer(log_file)
    if not args.resume:
        log.writerow(["step", "seconds", "tokens", "learning_rate", "train_loss", "train_bpb", "heldout_bpb"])
    print(f"{parameters:,} parameters, {len(data['train']):,} tokens, {bytes_per_token:.2f} bytes a token", flush=True)

    if args.fast_start:
        limit_autotuning()
        try:
            with compiling_only(), autocast():
                ids = random_windows(data["train"], args.batch, args.length)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        except Exception as error:  # it only saves time: what is missing is compiled at the first step
            print(f"could not compile ahead: {error!r}", flush=True)
        model.zero_grad(set_to_none=True)
        print(f"compiled after {clock.seconds():.0f} s", flush=True)

    def evaluate(name: str = "heldout", autocast=autocast) -> float:
        return round(bits_per_byte(model, data[name], sizes, args.length, args.batch, autocast), 4)

    tokens_a_step = args.batch * args.length
    evaluated, logged_step, logged_at = 0, step, time.monotonic()
    first_step = step
    while (progress := clock.progress(step)) < 1:
        if args.pause_after and time.monotonic() - clock.begun > 60 * args.pause_after:
            save_checkpoint(args.checkpoint, model, optimizers, step, clock.seconds())
            print(f"paused at step {step} ({progress:.1%}); go on with --resume", flush=True)
            return
        rate = args.lr * learning_rate_at(progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        ids = random_windows(data["train"], args.batch, args.length)
        with autocast():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1

        if step - first_step == 3:  # kernels are compiled and tuned by now
            loss.item()
            clock.start()
            logged_step, logged_at = step, time.monotonic()
        if step % args.log_every == 0 and step > logged_step:
            nats = loss.item()
            if not math.isfinite(nats):
                raise SystemExit(f"the loss is {nats} at step {step}")
            now = time.monotonic()
            speed = (step - logged_step) * tokens_a_step / (now - logged_at)
            done = clock.progress(step)
            left = (args.steps - step) * tokens_a_step / speed if args.steps else 60 * args.minutes - clock.seconds()
            heldout = ""
            if done * args.evaluations >= evaluated + 1:
                evaluated = int(done * args.evaluations)
                heldout = evaluate()
            bits = nats / math.log(2) / bytes_per_token
            log.writerow([step, round(clock.seconds(), 1), step * tokens_a_step, rate, nats, bits, heldout])
            log_file.flush()
            print(
                f"step {step}  loss {nats:.3f}  bpb {bits:.3f}  lr {rate:.1e}  {speed / 1e3:,.0f}k tokens/s  "
                f"eta {left:.0f}s" + (f"  held-out bpb {heldout}" if heldout else ""),
                flush=True,
            )
            logged_step, logged_at = step, time.monotonic()

    train_seconds = clock.seconds()
    if args.compile:  # saved weights carry no trace of it, and generation need not compile
        torch.compiler.reset()
    heldout_fp32 = evaluate()
    export(model, tokenizer, args.out)
    model = KDAForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(device)
    heldout_bf16, heldout_small = evaluate("heldout", nullcontext), evaluate("heldout_small", nullcontext)
    shutil.copy(args.data / "heldout_small.txt", args.out / "heldout.txt")
    counts = json.loads((args.data / "tokens.json").read_text())
    record = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "parameters": parameters,
        "steps": step,
        "sequences_a_step": args.batch,
        "sequence_length": args.length,
        "tokens": step * tokens_a_step,
        "epochs": round(step * tokens_a_step / len(data["train"]), 1),
        "seconds": round(train_seconds, 1),
        "startup_seconds": round(clock.started - clock.begun, 1),
        "optimizer": args.optimizer,
        "peak_learning_rate": args.lr,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "data": counts,
        # On all sources, as trained and as exported; and as exported on the heldout.txt that ships with the model
        "heldout_bits_per_byte": {"fp32": heldout_fp32, "bf16": heldout_bf16, "heldout.txt": heldout_small},
        "heldout_file": heldout_file_record(model, tokenizer, (args.out / "heldout.txt").read_text()),
        "samples": [],
    }
    training_json = args.out / "training.json"
    training_json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"held-out bits per byte: {record['heldout_bits_per_byte']}", flush=True)
    record["samples"] = write_samples(model, tokenizer, tokens=16 if args.smoke else 120)
    training_json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    train(parse_arguments())
