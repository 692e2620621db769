#!/usr/bin/env python3
"""Train the tokenizer of `kda-hf-tiny` and turn the corpus into token ids.

    python scripts/train/train_tokenizer.py --data .data --out .data/tokenizer

A byte-level BPE: every string round-trips exactly, whatever it contains. `<|endoftext|>` separates documents and is
both the beginning and the end of a text; `<|pad|>` only pads. Next to the tokenizer, `--data` receives `train.bin`,
`heldout.bin` and `heldout_small.bin` (uint16 ids, each document followed by `<|endoftext|>`) and `tokens.json` with
the number of bytes that they stand for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

# The model is a base model: it continues text. The template only lets chat tools hand it a conversation, as paragraphs.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last or add_generation_prompt and message['role'] != 'assistant' %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)


def train(text: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over words with their leading space; digits stand alone, so that numbers are spelled regularly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Ids of all documents end to end, each followed by `<|endoftext|>`."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = []
    for start in range(0, len(documents), 1_000):
        batch = tokenizer.encode_batch_fast(documents[start : start + 1_000], add_special_tokens=False)
        parts += [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in batch]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(".data"), help="where prepare_corpus.py wrote")
    parser.add_argument("--out", type=Path, default=Path(".data/tokenizer"), help="where the tokenizer goes")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=8192, help="context length noted for users of the tokenizer")
    args = parser.parse_args()

    names = ("train", "heldout", "heldout_small")
    splits = {name: (args.data / f"{name}.txt").read_text().split(END_OF_TEXT) for name in names}
    tokenizer = train(splits["train"], args.vocab_size)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=args.max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(args.out)

    counts = {"vocab_size": tokenizer.get_vocab_size()}
    for name, documents in splits.items():
        ids = encode(tokenizer, documents)
        ids.tofile(args.data / f"{name}.bin")
        size = sum(len(document.encode()) for document in documents)
        counts[name] = {"tokens": len(ids), "bytes": size, "documents": len(documents)}
        print(f"{name}: {len(ids):,} tokens for {size:,} bytes: {size / len(ids):.2f} bytes per token", flush=True)
    (args.data / "tokens.json").write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
