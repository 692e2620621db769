#!/usr/bin/env python3
"""Write the model card of `kda-hf-tiny` from what the training recorded.

    python scripts/train/write_card.py --model models/kda-hf-tiny --sources .data/sources.json

Copies `sources.json` next to the model, so that the card can be written again without the corpus.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path


CARD = Path(__file__).parent / "card.md"  # the text, with {fields} to fill


def render(model: Path, sources: list[dict]) -> str:
    """The card's text, from `training.json` and `config.json` in the model's folder and the list of sources."""
    training = json.loads((model / "training.json").read_text())
    config = json.loads((model / "config.json").read_text())
    kinds = {"linear_attention": "KDA", "full_attention": "attention"}
    heldout = training["heldout_bits_per_byte"]
    sources = sorted((s for s in sources if s["train_bytes"]), key=lambda source: -source["train_bytes"])
    rows = [
        f"| {s['package']} | {s['version']} | {s['licence'].replace('|', '/')} | {s['train_bytes'] / 1e3:,.0f} |"
        for s in sources
    ]
    fields = config | training
    fields.update(
        megabytes=(model / "model.safetensors").stat().st_size / 1e6,
        layers=config["num_hidden_layers"],
        kinds=", ".join(kinds[kind] for kind in config["layer_types"]),
        tokens_m=training["tokens"] / 1e6,
        optimizer={"muon": "Muon", "adamw": "AdamW"}[training["optimizer"]],
        minutes=training["seconds"] / 60,
        heldout_bytes=training["data"]["heldout"]["bytes"],
        small_bytes=training["data"]["heldout_small"]["bytes"],
        bpb_fp32=heldout["fp32"],
        bpb_bf16=heldout["bf16"],
        bpb_small=heldout["heldout.txt"],
        train_mb=training["data"]["train"]["bytes"] / 1e6,
        packages=len(sources),
        sources="\n".join(rows),
        samples="\n\n".join("> " + sample["text"].replace("\n", "\n> ") for sample in training["samples"]),
    )
    return CARD.read_text().format(**fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--sources", type=Path, help="sources.json of the corpus (default: the copy beside the model)")
    args = parser.parse_args()
    copy = args.model / "sources.json"
    if args.sources:
        shutil.copy(args.sources, copy)
    (args.model / "README.md").write_text(render(args.model, json.loads(copy.read_text())))


if __name__ == "__main__":
    main()
