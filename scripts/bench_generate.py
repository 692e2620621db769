"""Times `model.generate()` in floors, beside the same model by its modules, with torch.compile in place of our kernels,
and transformers' `kimi_linear` of its size.

A step's floor is reading the weights, reading and writing the recurrent states, and reading keys and values, at the
copy bandwidth measured in the same run. The first token's floor is the matrix products at 700 TFLOP/s, and of the KDA
layers reading the inputs and writing the outputs. A call is timed to the end of its prefill, and from there; prompts
above 16384 tokens are timed once, after a first call. Warm-up is what that first call takes longer, with captures and
compilers. Random weights: the tokens mean nothing. Without a GPU all is small, and there are no compiled steps.

    python scripts/bench_generate.py --json generate.json
"""

import argparse
import contextlib
import datetime
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_prefill as bench
import torch
import transformers
from transformers import KimiLinearConfig, KimiLinearForCausalLM

from kda_hf import KDACache, KDAConfig, KDAForCausalLM, decode_graph, decoding, generation


PRODUCTS = 700e12  # operations a second that a large product of bf16 matrices reaches
LAUNCH = 5e-6  # of a KDA layer's prefill, as in bench_prefill.py
SMALL = {"hidden": 256, "layers": 8, "heads": 2, "attention_heads": 2, "kv_heads": 1, "intermediate": 672}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24, help="of which every fourth one has attention")
    parser.add_argument("--heads", type=int, default=16, help="of KDA layers, 128 wide")
    parser.add_argument("--attention-heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=256, help="tokens")
    parser.add_argument("--new-beside", type=int, default=32, help="tokens of what is measured beside")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096, 16384, 65536])
    parser.add_argument(
        "--contexts-alone",
        type=int,
        nargs="*",
        help="of a model of KDA layers alone; by default --contexts and 1048576",
    )
    parser.add_argument("--compiled", type=int, nargs="*", default=[1, 8, 32], help="batches of torch.compile's step")
    parser.add_argument("--repeats", type=int, default=3)
    if not torch.cuda.is_available():
        parser.set_defaults(**SMALL, vocab=4096, batches=[1], prompt=64, new=32, contexts=[], contexts_alone=[])
    args = parser.parse_args()
    if args.contexts_alone is None:
        args.contexts_alone = sorted({*args.contexts, 2**20})
    return args


# -------------------------------------------------------------------------------------------------------------- models


def ours(args: argparse.Namespace, pure: bool = False) -> Any:
    kinds = ["linear_attention" if pure or i % 4 != 3 else "full_attention" for i in range(args.layers)]
    config = KDAConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        layer_types=kinds,
        linear_num_heads=args.heads,
        linear_head_dim=128,
        num_attention_heads=args.attention_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=128,
        max_position_embeddings=2**21,
        dtype=args.dtype,
    )
    return made(KDAForCausalLM, config, args)


def native(args: argparse.Namespace) -> Any:
    """transformers' model with the same widths; its attention layers are of another kind, with a latent for keys."""
    config = KimiLinearConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(args.layers)],
        mlp_layer_types=["dense"] * args.layers,
        num_attention_heads=args.attention_heads,
        num_key_value_heads=args.attention_heads,
        linear_num_heads=args.heads,
        linear_head_dim=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype=args.dtype,
    )
    return made(KimiLinearForCausalLM, config, args)


def made(kind: Any, config: Any, args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = kind(config).to(getattr(torch, args.dtype)).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    release()  # so that what making it takes is not in a peak
    return model


@contextlib.contextmanager
def by_modules() -> Iterator[None]:
    own, generation.decode_program = generation.decode_program, contextlib.nullcontext  # type: ignore[assignment]
    try:
        yield
    finally:
        generation.decode_program = own


def compile_step(model: Any) -> None:
    """Has `generate()` capture what torch.compile makes of the step of a new model, with PyTorch's operations for
    products, norms, SwiGLU and attention. `kda_decode_step` is a node in it."""
    own, decoding.rows.refusal = decoding.rows.refusal, lambda *_: "torch.compile is asked for"
    try:
        program: Any = decoding.program_of(model)
    finally:
        decoding.rows.refusal = own
    program.step = torch.compile(program.step, fullgraph=True, dynamic=False)


# -------------------------------------------------------------------------------------------------------------- floors


def bandwidth() -> float:
    """Bytes read and written a second."""
    if torch.cuda.is_available():
        return bench.copy_bandwidth(20)
    source = torch.empty(2**28, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def step_bytes(model: Any, batch: int, context: int) -> int:
    """Of our model: weights but for the embeddings of other tokens, states, keys and values of `context` tokens."""
    config, size = model.config, model.lm_head.weight.element_size()
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    kda = config.layer_types.count("linear_attention")
    state = config.linear_num_value_heads * config.linear_head_dim * config.linear_value_head_dim * 4
    keys = 2 * config.num_key_value_heads * config.head_dim * size * context
    return weights + batch * (kda * 2 * state + (len(config.layer_types) - kda) * keys)


def first_token_floor(model: Any, tokens: int, rate: float) -> float:
    """Seconds, of one prompt."""
    config, size = model.config, model.lm_head.weight.element_size()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    kda = config.layer_types.count("linear_attention")
    pairs = (len(config.layer_types) - kda) * tokens * tokens / 2 * config.num_attention_heads * config.head_dim
    inputs = config.linear_num_value_heads * (3 * config.linear_head_dim + 2 * config.linear_value_head_dim) * size
    return (2 * layers * tokens + 4 * pairs) / PRODUCTS + kda * (inputs * tokens / rate + LAUNCH)


# -------------------------------------------------------------------------------------------------------- measurements


def now() -> float:
    """Seconds, when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    start = now()
    call()
    return now() - start


def timed(
    model: Any, args: argparse.Namespace, batch: int, prompt: int, new: int, keeps_history: bool = False, **options: Any
) -> dict[str, float]:
    """Seconds of the prefill, of a step, and what the first call of these shapes takes longer.

    Args:
        keeps_history: whether calls get a cache that `crop` can take tokens from.
    """
    ids = torch.randint(1, args.vocab, (batch, prompt), device=model.device)
    options = {"do_sample": False, "max_new_tokens": new} | options
    prefill, ends = model._prefill, []

    def watched_prefill(*others: Any, **kwargs: Any) -> Any:
        outputs = prefill(*others, **kwargs)
        ends.append(now())
        return outputs

    def run() -> tuple[float, float]:
        """Seconds of the prefill and of the rest, in one call: a long prefill varies by more than steps take."""
        cache = {"past_key_values": KDACache(model.config)} if keeps_history else {}
        start = now()
        model.generate(ids, **options, **cache)
        return ends[-1] - start, now() - ends[-1]

    model._prefill = watched_prefill
    try:
        warm_up = sum(run())
        runs = [run() for _ in range(args.repeats if prompt <= 16384 else 1)]
    finally:
        del model._prefill
    first, rest = (statistics.median(times) for times in zip(*runs, strict=True))
    return {"first_s": first, "step_s": rest / (new - 1), "warm_up_s": warm_up - first - rest}


def measure(args: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(
        name: str, model: Any, batch: int, prompt: int, new: int = args.new, has_floor: bool = True, **options: Any
    ) -> None:
        row: dict[str, Any] = {"case": name, "batch": batch, "prompt": prompt}
        try:
            row |= timed(model, args, batch, prompt, new, **options)
        except Exception as error:  # of another's model, or memory
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        if has_floor:
            row["step_floor_s"] = step_bytes(model, batch, prompt + new // 2) / rate
        if torch.cuda.is_available():
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        rows.append(row)
        print(row, flush=True)

    model = ours(args)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters")
    for batch in args.batches:
        add("greedy", model, batch, args.prompt)
    add("greedy, end of text", model, args.batches[0], args.prompt, eos_token_id=args.vocab + 1)
    some = sorted({1, max((batch for batch in args.batches if batch <= 32), default=1)})
    for batch in some:
        add("sampled", model, batch, args.prompt, do_sample=True)  # of the 50 best, by default
        add("sampled, top k and p", model, batch, args.prompt, do_sample=True, top_p=0.9, temperature=0.8)
    add("sampled from all", model, args.batches[0], args.prompt, do_sample=True, top_k=0)
    for batch in some:
        add("greedy, cache with a history", model, batch, args.prompt, keeps_history=True)
    for context in args.contexts:
        add("greedy, longer", model, 1, context)
        rows[-1]["first_floor_s"] = first_token_floor(model, context, rate)
    with by_modules():
        add("greedy, by modules", model, args.batches[0], args.prompt, args.new_beside)
    del model
    release()
    if args.contexts_alone:
        model = ours(args, pure=True)
        for context in args.contexts_alone:
            add("KDA alone", model, 1, context, prefill_chunk_size=min(context, 16384))
            rows[-1]["first_floor_s"] = first_token_floor(model, context, rate)
        del model
        release()
    kimi = native(args)
    add("transformers' kimi_linear", kimi, args.batches[0], args.prompt, args.new_beside, has_floor=False)
    del kimi
    release()
    # The last one, since an error within a capture may leave a GPU that does nothing more.
    model = ours(args)
    if decode_graph.has_graphs(model.device):
        compile_step(model)
        for batch in args.compiled:
            add("torch.compile of the step", model, batch, args.prompt)
    return rows


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, torch {result['torch']}, transformers {result['transformers']}, commit "
        f"{result['commit']}, {result['date']}: copies at {result['bandwidth'] / 1e9:.0f} GB/s",
        f"{'case':28}{'B':>4}{'prompt':>8}{'ms/step':>9}{'floors':>8}{'tokens/s':>10}{'first ms':>10}{'warm-up s':>11}"
        f"{'peak GB':>9}",
    ]
    for row in result["rows"]:
        start = f"{row['case']:28}{row['batch']:4}{row['prompt']:8}"
        if "error" in row:
            lines.append(f"{start}  {row['error']}")
            continue
        floors = row["step_s"] / row.get("step_floor_s", math.nan)
        first = f"{1e3 * row['first_s']:10.1f}{row['warm_up_s']:11.1f}{row.get('peak_bytes', math.nan) / 1e9:9.2f}"
        if "first_floor_s" in row:
            first += f"   first token: {row['first_s'] / row['first_floor_s']:.2f} floors"
        lines.append(f"{start}{1e3 * row['step_s']:9.2f}{floors:8.2f}{row['batch'] / row['step_s']:10.0f}{first}")
    return "\n".join(lines)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What was run where and when."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": bench.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": {name: value for name, value in vars(args).items() if name != "json"},
    }


def report(result: dict[str, Any], lines: str, path: Path | None) -> None:
    """Writes the numbers, if they are asked for, and prints the table."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(lines)


def main() -> None:
    args = parse_args()
    rate = bandwidth()
    result = about(args) | {"bandwidth": rate, "rows": measure(args, rate)}
    report(result, table(result), args.json)


if __name__ == "__main__":
    main()
