"""Times `generate()` of several models beside each other, at several lengths of context.

For what a swap of attention for KDA gives: the original and the swapped model, in one run on one machine. Greedy
decoding after a prompt of random tokens; a call is timed to the end of its prefill, and from there. Models are
directories, names on the Hub or GGUF files.

    python scripts/bench_models.py ORIGINAL SWAPPED --contexts 1024 16384 --json models.json
"""

import argparse
import math
from pathlib import Path
from typing import Any

import bench_generate
import torch

from kda_hf.healing import load_causal_lm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the first one is what the others are compared with")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 16384], help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    return args


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for path in args.models:
        model, _ = load_causal_lm(path, dtype=getattr(torch, args.dtype))
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        args.vocab = model.config.vocab_size
        for context in args.contexts:
            row: dict[str, Any] = {"model": Path(path).name, "context": context}
            try:
                row |= bench_generate.timed(model, args, args.batch, context, args.new)
            except Exception as error:  # memory, or positions that a model has not
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
            print(row, flush=True)
        del model
        bench_generate.release()
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, torch {result['torch']}, transformers {result['transformers']}, commit "
        f"{result['commit']}, {result['date']}",
        f"{'model':32}{'context':>9}{'tokens/s':>10}{'of the first':>14}{'prefill ms':>12}",
    ]
    first = {row["context"]: row for row in reversed(result["rows"])}
    for row in result["rows"]:
        start = f"{row['model'][:31]:32}{row['context']:9}"
        if "error" in row:
            lines.append(f"{start}  {row['error']}")
            continue
        share = first[row["context"]].get("step_s", math.nan) / row["step_s"]
        rate = result["options"]["batch"] / row["step_s"]
        lines.append(f"{start}{rate:10.1f}{share:14.2f}{1e3 * row['first_s']:12.1f}")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    rows = measure(args)
    args.models = [Path(path).name for path in args.models]
    result = bench_generate.about(args) | {"rows": rows}
    bench_generate.report(result, table(result), args.json)


if __name__ == "__main__":
    main()
