"""Measures how near to the original KDA layers start: the loss on held-out text right after a swap, for variants of the
start.

    python scripts/train/prepare_corpus.py --out .data --only anarchism debian-history jargon-text r-cran-janeaustenr
    python scripts/compare_inits.py --base SmolLM2-135M-Instruct.Q4_1.gguf --calibration .data/train.txt \\
        --text .data/heldout.txt --json docs/benchmarks/swap_inits.json

The losses are means over the tokens of rows of text, in bf16.
"""

import argparse
import datetime
import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_prefill import commit
from transformers import AutoTokenizer

from kda_hf import KDAForCausalLM, KimiDeltaAttention, swap, swap_attention
from kda_hf.modeling_kda import KDADecoderLayer


Change = Callable[[KimiDeltaAttention], None]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="directory or hub name of the original, or its GGUF file")
    parser.add_argument("--layers", default="3:1")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="text to measure the loss on, none of it above")
    parser.add_argument("--calibration-rows", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--only", nargs="*", help="regular expressions for the names of variants")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser.parse_args()


def kda_layers(model: KDAForCausalLM) -> Iterator[tuple[int, KimiDeltaAttention]]:
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, KDADecoderLayer)
        if layer.layer_type == "linear_attention":
            yield index, layer.linear_attn


def taps(layer: KimiDeltaAttention, names: str, factor: float) -> None:
    for name in names:
        layer.get_parameter(f"{name}_conv1d.weight").mul_(factor)


def smooth(layer: KimiDeltaAttention, name: str) -> None:
    """Half of the weight goes to the token before."""
    weight = layer.get_parameter(f"{name}_conv1d.weight")
    weight[..., -1] /= 2
    weight[..., -2] = weight[..., -1]


def decays(layer: KimiDeltaAttention, slow: float, fast: float) -> None:
    """Log-decays of the heads, evenly spread between two on a logarithmic scale."""
    for head, decay in enumerate(torch.logspace(math.log10(fast), math.log10(slow), layer.num_value_heads).tolist()):
        swap._set_decay(layer, decay, head)


def rope_decays(layer: KimiDeltaAttention, theta: float) -> None:
    """Each channel forgets in the time in which RoPE turns it by five radians."""
    swap._set_decay(layer, 1.0)
    frequencies = theta ** -torch.arange(0, 1, 2 / layer.head_dim)
    share = (0.2 * frequencies / 5).clamp_min(1e-5)
    bias = (share / (1 - share)).log().repeat(2)
    layer.dt_bias.view(layer.num_value_heads, -1).copy_(bias)


def plain(layer: KimiDeltaAttention) -> None:
    """The identity as convolution, the attention's `o_proj` as it is, and gates that forget slowly."""
    size = 2 * swap._SHRINKAGE * swap._VALUE_ACTIVATION
    layer.o_proj.weight.mul_(layer.v_conv1d.weight[:, 0, -1] / size)
    for name in "qkv":
        layer.get_parameter(f"{name}_conv1d.weight")[..., -1] = 1.0
    decays(layer, 0.01, 0.01)


def variants(theta: float) -> dict[str, Change]:
    """Changes of the start that ships without a calibration."""
    return {
        "no attention (o_proj zero)": lambda layer: layer.o_proj.weight.zero_(),
        "taps of 1, attention's o_proj, decay 0.01": plain,
        "default": lambda layer: None,
        "q and k at 0.2, where SiLU is nearly linear": lambda layer: taps(layer, "qk", 0.05),
        "q and k at 16, where it is nearly ReLU": lambda layer: taps(layer, "qk", 4.0),
        "v at 1": lambda layer: taps(layer, "v", 1 / swap._VALUE_ACTIVATION),
        "one decay, 0.01": lambda layer: decays(layer, 0.01, 0.01),
        "one decay, 0.03": lambda layer: decays(layer, 0.03, 0.03),
        "one decay, 0.1": lambda layer: decays(layer, 0.1, 0.1),
        "decays 0.003 to 1": lambda layer: decays(layer, 0.003, 1.0),
        "decays by channel, from RoPE": lambda layer: rope_decays(layer, theta),
        "k smoothed over two tokens": lambda layer: smooth(layer, "k"),
        "v smoothed over two tokens": lambda layer: smooth(layer, "v"),
        "outputs half as large": lambda layer: layer.o_proj.weight.mul_(0.5),
        "outputs twice as large": lambda layer: layer.o_proj.weight.mul_(2.0),
    }


@torch.no_grad()
def mean_loss(model: Any, rows: torch.Tensor) -> float:
    losses = [model(row, labels=row, use_cache=False).loss.item() for row in rows.split(1)]
    return sum(losses) / len(losses)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    args = parse_args()
    directory, gguf_file = swap._parts(args.base, None)
    tokenizer = AutoTokenizer.from_pretrained(directory, **({"gguf_file": gguf_file} if gguf_file else {}))

    def rows_of(path: Path, count: int) -> torch.Tensor:
        text = path.read_text().replace("<|endoftext|>", "\n\n")
        return swap.calibration_rows(text, tokenizer, count, args.length)

    rows, calibration = rows_of(args.text, args.rows), rows_of(args.calibration, args.calibration_rows)
    more = rows_of(args.calibration, 2 * args.calibration_rows)
    source = swap.load_source(args.base, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []

    def measure(name: str, make: Callable[[], Any]) -> None:
        if args.only and not any(re.search(pattern, name) for pattern in args.only):
            return
        start = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - start
        results.append({"variant": name, "loss": mean_loss(model, rows), "seconds_to_make": round(seconds, 1)})
        print(f"{name:48}{results[-1]['loss']:8.3f}  made in {seconds:.0f} s", flush=True)

    def changed(change: Change) -> KDAForCausalLM:
        model = swap_attention(source, args.layers)
        with torch.no_grad():
            for _, layer in kda_layers(model):
                change(layer)
        return model

    def fitted(memories: list, ids: torch.Tensor) -> KDAForCausalLM:
        ship = swap._MEMORIES
        swap._MEMORIES = memories
        try:
            return swap_attention(source, args.layers, calibration_ids=ids)
        finally:
            swap._MEMORIES = ship

    def own_text() -> torch.Tensor:
        first = torch.full((args.calibration_rows, 1), source.config.bos_token_id)
        return source.generate(first, do_sample=True, max_new_tokens=args.length - 1, min_new_tokens=args.length - 1)

    measure("original", lambda: source)
    for name, change in variants(source.config.rope_parameters["rope_theta"]).items():
        measure(name, lambda change=change: changed(change))  # type: ignore[misc]
    groups = source.config.num_key_value_heads
    measure("a KDA head for each KV head", lambda: swap_attention(source, args.layers, linear_num_heads=groups))
    one = [swap._Memory(0.01, 0.5)]
    measure("o_proj fitted, one decay, 0.01", lambda: fitted(one, calibration))
    measure("calibrated", lambda: fitted(swap._MEMORIES, calibration))
    measure("calibrated on twice as much", lambda: fitted(swap._MEMORIES, more))
    measure("calibrated on text that the model writes", lambda: fitted(swap._MEMORIES, own_text()))

    if args.json:
        result = {
            "device": f"{processor()}, {torch.get_num_threads()} threads",
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "base": Path(args.base).name,
            "layers": args.layers,
            "rows": list(rows.shape),
            "calibration_rows": list(calibration.shape),
            "results": results,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
