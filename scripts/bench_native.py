"""Times `generate()` of transformers' `kimi_linear` as it is, and after `kda_hf.accelerate`.

Of a model with 12 layers and 8 experts by default, with random weights: the tokens mean nothing. A call is timed to the
end of its prefill, and from there. What runs without us is FLA's kernels where FLA is installed, else PyTorch; the
output says which. Without a GPU all is small.

    python scripts/bench_native.py --json native.json
"""

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

import bench_generate
import torch
from transformers import KimiLinearConfig, KimiLinearForCausalLM

import kda_hf


SMALL = {"hidden": 256, "layers": 4, "heads": 2, "intermediate": 512, "expert_intermediate": 128}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--hidden", type=int, default=2304)
    parser.add_argument("--layers", type=int, default=12, help="of which every fourth one has attention")
    parser.add_argument("--heads", type=int, default=32, help="of KDA and attention layers, 128 wide")
    parser.add_argument("--intermediate", type=int, default=9216, help="of the first layer's MLP")
    parser.add_argument("--expert-intermediate", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=163840)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--long-prompt", type=int, default=16384, help="of which the prefill alone is of interest")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    if not torch.cuda.is_available():
        parser.set_defaults(**SMALL, vocab=4096, batches=[1], prompt=64, long_prompt=256, new=16, dtype="float32")
    return parser.parse_args()


def model_of(args: argparse.Namespace) -> Any:
    config = KimiLinearConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        moe_intermediate_size=args.expert_intermediate,
        num_hidden_layers=args.layers,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(args.layers)],
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        linear_num_heads=args.heads,
        linear_head_dim=128,
        num_local_experts=args.experts,
        num_experts_per_tok=args.experts_per_token,
        n_shared_experts=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype=args.dtype,
    )
    return bench_generate.made(KimiLinearForCausalLM, config, args)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    model, rows = model_of(args), []
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters")
    cases = [(batch, args.prompt, args.new) for batch in args.batches] + [(1, args.long_prompt, 4)]
    for name in ("transformers", "accelerated"):
        if name == "accelerated":
            kda_hf.accelerate(model)
        for batch, prompt, new in cases:
            row: dict[str, Any] = {"case": name, "batch": batch, "prompt": prompt}
            try:
                row |= bench_generate.timed(model, args, batch, prompt, new)
            except Exception as error:  # memory, or a kernel that refuses
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
            print(row, flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, torch {result['torch']}, transformers {result['transformers']}, FLA "
        f"{'installed' if result['fla'] else 'not installed'}, commit {result['commit']}, {result['date']}",
        f"{'case':16}{'B':>4}{'prompt':>8}{'ms/step':>9}{'faster':>8}{'prefill ms':>12}{'faster':>8}{'warm-up s':>11}",
    ]
    before = {(row["batch"], row["prompt"]): row for row in result["rows"] if row["case"] == "transformers"}
    for row in result["rows"]:
        start = f"{row['case']:16}{row['batch']:4}{row['prompt']:8}"
        if "error" in row:
            lines.append(f"{start}  {row['error']}")
            continue
        other = before[row["batch"], row["prompt"]]
        step, first = (
            f"{1e3 * row[name]:{width}.{digits}f}{other.get(name, math.nan) / row[name]:8.1f}"
            for name, width, digits in (("step_s", 9, 2), ("first_s", 12, 1))
        )
        lines.append(f"{start}{step}{first}{row['warm_up_s']:11.1f}")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    has_fla = importlib.util.find_spec("fla") is not None
    result = bench_generate.about(args) | {"fla": has_fla, "rows": measure(args)}
    bench_generate.report(result, table(result), args.json)


if __name__ == "__main__":
    main()
