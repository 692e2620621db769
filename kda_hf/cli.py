"""The command `kda-hf`: generate, chat, convert, swap, heal, info."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

import kda_hf
from kda_hf.convert import convert_checkpoint
from kda_hf.healing import HealInterrupted, HealSettings
from kda_hf.healing import heal as run_healing
from kda_hf.healing.settings import add_arguments as add_heal_arguments
from kda_hf.integrations.native import can_accelerate
from kda_hf.layer import KDALayer
from kda_hf.swap import swap_checkpoint


class TimedStreamer(TextStreamer):
    """Prints text as its tokens come, and notes when they came."""

    def __init__(self, tokenizer, **kwargs):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, **kwargs)
        self.times = [time.perf_counter()]

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def summary(self, prompt_length: int) -> str:
        """Speeds in tokens per second: of the prompt up to the first new token, and of the tokens after it."""
        new_tokens = len(self.times) - 1
        if new_tokens == 0:
            return f"prompt {prompt_length} tokens, no new token"
        prefill = prompt_length / (self.times[1] - self.times[0])
        text = f"prefill {prompt_length} tokens at {prefill:.0f} tokens/s"
        if new_tokens > 1:
            decode = (new_tokens - 1) / (self.times[-1] - self.times[1])
            text += f", decode {new_tokens} tokens at {decode:.1f} tokens/s"
        return text


def load(args):
    """The model and its tokenizer, on the device and in the dtype that the arguments ask for."""
    path = Path(args.model)
    if not path.exists() and (path.is_absolute() or args.model.startswith(".")):
        raise SystemExit(f"kda-hf: --model: no such directory: {args.model}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"kda-hf: --device: torch finds no GPU for {device!r}")
    if args.dtype not in (None, "auto") and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise SystemExit(f"kda-hf: --dtype: {args.dtype!r} is no dtype of torch")
    # bf16 arithmetic is slow on most CPUs, and a model that fits in bf16 usually fits in fp32
    dtype = args.dtype or ("float32" if device == "cpu" else "auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    if can_accelerate(model):
        kda_hf.accelerate(model)
    return model, tokenizer


def sampling(args) -> dict:
    if args.seed is not None:
        set_seed(args.seed)
    chosen = {"max_new_tokens": args.max_new_tokens, "repetition_penalty": args.repetition_penalty}
    if args.greedy:
        return chosen | {"do_sample": False}
    return chosen | {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}


def backend_in_use(model) -> str:
    """The backend that KDA calls of this model get, or what kind of model it is where it has none of ours."""
    layer = next((module for module in model.modules() if isinstance(module, KDALayer)), None)
    if layer is None:
        return f"{model.config.model_type}, on its own operators"
    report = kda_hf.ops.backend_report(device=model.device, dtype=model.dtype, K=layer.head_dim, V=layer.value_head_dim)
    return next(row["backend"] for row in report if row["usable"])


def generate(args):
    """Writes a continuation of the prompt, as it is made."""
    model, tokenizer = load(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise SystemExit("kda-hf: --prompt: it has no tokens")
    print(prompt, end="", flush=True)
    streamer = TimedStreamer(tokenizer)
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        streamer=streamer,
        prefill_chunk_size=args.prefill_chunk_size,
        **sampling(args),
    )
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    print(f"\n[{streamer.summary(inputs['input_ids'].shape[1])}; backend {backend_in_use(model)} on {where}]")


def chat(args):
    """A conversation. With `--session FILE` it can stop, and go on later from the same state."""
    model, tokenizer = load(args)
    cache, history = kda_hf.KDACache(model.config, max_rollback=0), []
    session = Path(args.session) if args.session else None
    if session and session.exists():
        cache = kda_hf.KDACache.load(session, model.config, device=model.device)
        history = _saved_tokens(session.with_suffix(".json"), cache)
        print(f"[goes on after {len(history)} tokens]")
    print("[an empty line ends the conversation]")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            break
        if not text:
            break
        turn = _turn(tokenizer, text, first=not history)
        input_ids = torch.tensor([history + turn], device=model.device)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            streamer=TimedStreamer(tokenizer),
            **sampling(args),
        )
        history = output[0].tolist()
    if session and history:
        cache.save(session)
        tokens = session.with_suffix(".json")
        tokens.write_text(json.dumps({"input_ids": history}))
        print(f"[saved: {session}, {tokens}]")


def _saved_tokens(path: Path, cache: kda_hf.KDACache) -> list[int]:
    """The tokens of a saved conversation; the last of them was never fed to the model."""
    try:
        history = json.loads(path.read_text())["input_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold the tokens of a conversation: {error!r}") from error
    if len(history) != int(cache.get_seq_length()) + 1:
        raise ValueError(
            f"{path} holds {len(history)} tokens, which does not go with a state after {int(cache.get_seq_length())}: "
            "the two files are from different conversations"
        )
    return history


def _turn(tokenizer, text: str, first: bool) -> list[int]:
    """The tokens that one message of the user adds to the conversation."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    return tokenizer(text if first else "\n" + text, add_special_tokens=first)["input_ids"]


def convert(args):
    """A checkpoint of flash-linear-attention (`model_type: kda`) to one of kda_hf, or back, without a loss."""
    target = convert_checkpoint(
        args.source, args.target, args.to, max_shard_size=args.max_shard_size, overwrite=args.overwrite
    )
    print(f"[written: {target}]")


def heal(args):
    """Trains a model whose attention was swapped for KDA to do what the original does: each layer's output, then the
    logits."""
    settings = HealSettings(**{name: getattr(args, name) for name in HealSettings.__dataclass_fields__})
    try:
        print(f"[written: {run_healing(settings)}]")
    except HealInterrupted as interruption:
        print(f"kda-hf: {interruption}", file=sys.stderr)
        sys.exit(128 + interruption.signum)
    except ImportError as error:  # of a package that only these settings need
        sys.exit(f"kda-hf: {error}")


def swap(args):
    """A dense Llama, Mistral, SmolLM2, Qwen2 or Qwen3 with KDA in place of the attention of some layers."""
    table = swap_checkpoint(
        args.base,
        args.out,
        args.layers,
        gguf_file=args.gguf_file,
        dtype=args.dtype,
        calibration_text=args.calibrate.read_text() if args.calibrate else None,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        **dict(args.set),
    )
    print(f"{table}\n[written: {args.out}]")


def _field(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value in JSON."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def info(args):
    """Versions, device, and which backend a call would get."""
    print(f"kda_hf {kda_hf.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    cuda = torch.cuda.is_available()
    print("device: " + (torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"))
    print(f"{kda_hf.ops.cuda.status()}; {kda_hf.ops.cpu.status()}")
    for row in kda_hf.ops.backend_report():
        state = "usable" if row["usable"] else "refused"
        print(f"  {row['backend']:6} {state:8} {row['reason']}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kda-hf", description="Kimi Delta Attention for Hugging Face transformers")
    commands = top.add_subparsers(dest="command", required=True)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, help="directory or hub name of a checkpoint")
    model.add_argument("--device", help="cuda, cpu, ... (default: the GPU if there is one)")
    model.add_argument("--dtype", help="float32, bfloat16, ... (default: the checkpoint's; float32 on a CPU)")
    model.add_argument("--max-new-tokens", type=int, default=200)
    model.add_argument("--temperature", type=float, default=0.7)
    model.add_argument("--top-p", type=float, default=0.9)
    model.add_argument("--repetition-penalty", type=float, default=1.1)
    model.add_argument("--greedy", action="store_true", help="the likeliest token each time")
    model.add_argument("--seed", type=int, help="for the same sample each time")

    command = commands.add_parser("generate", parents=[model], help="continue a prompt", description=generate.__doc__)
    command.add_argument("--prompt", default="In the beginning", help="the text to continue; - reads standard input")
    command.add_argument("--prefill-chunk-size", type=int, help="process the prompt in pieces of so many tokens")
    command.set_defaults(run=generate)

    command = commands.add_parser("chat", parents=[model], help="a conversation", description=chat.__doc__)
    command.add_argument("--session", help="file that keeps the conversation's state between runs")
    command.set_defaults(run=chat)

    command = commands.add_parser("convert", help="from FLA's checkpoints, or back", description=convert.__doc__)
    command.add_argument("source", help="directory or hub name of a checkpoint")
    command.add_argument("target", help="directory for the other one")
    command.add_argument("--to", choices=["fla", "kda_hf"], help="its format (default: the one that SOURCE is not)")
    command.add_argument("--max-shard-size", default="5GB", help="size of a file of weights (default: 5GB)")
    command.add_argument("--overwrite", action="store_true", help="replace TARGET where it is not empty")
    command.set_defaults(run=convert)

    command = commands.add_parser("heal", help="train a swapped model to be as the original", description=heal.__doc__)
    add_heal_arguments(command)
    command.set_defaults(run=heal)

    command = commands.add_parser("swap", help="KDA in place of a model's attention", description=swap.__doc__)
    command.add_argument("--base", required=True, help="directory or hub name of the original, or its GGUF file")
    command.add_argument("--gguf-file", help="the name of a GGUF file in BASE")
    command.add_argument("--layers", default="3:1", help="3:1, 1:1, ..., all, or indices: 0,1,2 (default: 3:1)")
    command.add_argument("--out", required=True, help="directory for the new model")
    command.add_argument("--calibrate", type=Path, metavar="FILE", help="ordinary text to fit the KDA layers on")
    command.add_argument("--dtype", default="auto", help="of the weights (default: as stored; float32 for GGUF)")
    command.add_argument(
        "--set",
        type=_field,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of KDAConfig, in JSON: linear_lower_bound=null",
    )
    command.add_argument("--max-shard-size", default="5GB", help="size of a file of weights (default: 5GB)")
    command.add_argument("--overwrite", action="store_true", help="replace OUT where it is not empty")
    command.set_defaults(run=swap)

    command = commands.add_parser("info", help="versions, device, backends", description=info.__doc__)
    command.set_defaults(run=info)
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"kda-hf: {error}")


if __name__ == "__main__":
    main()
