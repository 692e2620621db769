"""Which layers lose least when their attention is swapped for KDA.

    kda-hf heal --teacher ORIGINAL --layers all --data TEXT --stages 1 --out all
    python scripts/choose_layers.py ORIGINAL all/stage1 --text all/heldout.jsonl --count 22 --out swapped

Stage 1 of healing trains each layer by itself, so one run of it serves for any choice of layers. Here each of them in
turn replaces the attention of the original, which else stays what it is: the divergence of the logits, KL(original ‖
with this layer), in nats a token, is what the layer loses. --out gets the original with the --count layers that lose
least, healed as far as they were, for stage 2.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from eval_ppl import circumstances, documents_of, loaded
from tqdm import tqdm

from kda_hf import KDAForCausalLM, swap_attention
from kda_hf.files import appearing, check_target
from kda_hf.healing import load_causal_lm
from kda_hf.healing.attention import packs_rows
from kda_hf.healing.data import PackedRow, pack, tokenize
from kda_hf.healing.losses import logit_matching, swapped_layers
from kda_hf.swap import parse_layers


def with_layers(original: Any, healed: KDAForCausalLM, layers: list[int]) -> KDAForCausalLM:
    """The original with these layers of the healed model in place of its own."""
    model = swap_attention(original, layers)
    for index in layers:
        own, other = model.model.layers[index].linear_attn, healed.model.layers[index].linear_attn
        own.load_state_dict(other.state_dict())
    return model.eval()


@torch.no_grad()
def divergence(original: Any, model: KDAForCausalLM, rows: list[PackedRow]) -> float:
    """KL(original ‖ model) in nats, the mean over the tokens of all rows."""
    with packs_rows(original, model):
        losses = [float(logit_matching(original, model, row)) for row in rows]
    return sum(loss * len(row) for loss, row in zip(losses, rows, strict=True)) / sum(map(len, rows))


def ranked(original: Any, healed: KDAForCausalLM, rows: list[PackedRow]) -> list[tuple[int, float]]:
    """The healed model's KDA layers and what each loses, the least first."""
    losses = {i: divergence(original, with_layers(original, healed, [i]), rows) for i in tqdm(swapped_layers(healed))}
    return sorted(losses.items(), key=lambda item: item[1])


def write(original: str, healed: str, layers: list[int], out: Path) -> None:
    """The model with these layers and its tokenizer, in the dtype that both are stored in."""
    model, tokenizer = load_causal_lm(original, dtype="auto")
    with appearing(out) as scratch:
        with_layers(model, load_causal_lm(healed, dtype="auto")[0], layers).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", help="directory, Hub name or .gguf file")
    parser.add_argument("healed", help="the original with many layers swapped, after stage 1")
    parser.add_argument("--text", nargs="+", required=True, help="text files, JSONL files or directories of them")
    parser.add_argument("--document-separator", help=r"between the documents of a text file, \n for a line end")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of the text, which is cut there")
    parser.add_argument("--max-length", type=int, default=2048, help="longer documents are cut into pieces")
    parser.add_argument("--count", type=int, help="how many layers to swap (default: those of the healed model)")
    parser.add_argument("--beside", nargs="*", default=[], help="other choices to measure, as 3:1, all or 0,1,2")
    parser.add_argument("--out", type=Path, help="directory for the model with these layers")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is not empty")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the models (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    for name in ("max_tokens", "max_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1")
    return args


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    if args.out is not None:
        check_target(args.out.resolve(), Path(args.healed).resolve(), "healed", args.overwrite)
    original, tokenizer = loaded(args.original, args)
    healed, _ = loaded(args.healed, args)
    if not isinstance(healed, KDAForCausalLM):
        raise ValueError(f"{args.healed} is a {type(healed).__name__}, not a swapped model")
    count = len(swapped_layers(healed)) if args.count is None else args.count
    if not 1 <= count <= len(swapped_layers(healed)):
        raise ValueError(f"--count: {args.healed} has {len(swapped_layers(healed))} swapped layers, got {count}")
    others = {name: parse_layers(name, healed.config.num_hidden_layers) for name in args.beside}
    for name, other in others.items():
        if not set(other) <= set(swapped_layers(healed)):
            raise ValueError(f"--beside: not all layers of {name} are swapped in {args.healed}")
    corpus = tokenize(documents_of(args), tokenizer)
    corpus = corpus._replace(ids=corpus.ids[: args.max_tokens], bounds=corpus.bounds.clamp(max=args.max_tokens))
    length = args.max_length
    rows = [
        PackedRow([corpus.ids[start:end] for start, end in row], args.device)
        for row in pack(corpus, length, 4 * length)
    ]
    if not rows:
        raise ValueError("--text: there are no tokens")

    ranking = ranked(original, healed, rows)
    for index, loss in ranking:
        print(f"layer {index:3}: {loss:.4f} nats")
    layers = sorted(index for index, _ in ranking[:count])
    model = with_layers(original, healed, layers)
    together = divergence(original, model, rows)
    print(f"--layers {','.join(map(str, layers))}: {together:.4f} nats together")
    beside = {name: divergence(original, with_layers(original, healed, other), rows) for name, other in others.items()}
    for name, loss in beside.items():
        print(f"--layers {name}: {loss:.4f} nats")
    if args.out is not None:
        write(args.original, args.healed, layers, args.out.resolve())
    options = {name: value for name, value in vars(args).items() if name not in ("json", "out")}
    return circumstances(torch.device(args.device)) | {
        "options": options,
        "tokens": sum(map(len, rows)),
        "layers": [{"layer": index, "nats": loss} for index, loss in ranking],
        "chosen": layers,
        "nats": together,
        "beside": beside,
    }


def main() -> None:
    args = parse_args()
    try:
        result = evaluate(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"choose_layers: {error}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
