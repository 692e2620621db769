"""Perplexity on held-out text by length of the context, of any number of models that transformers can load.

    python scripts/eval_ppl.py ORIGINAL healed/stage1 healed/stage2 --text healed/heldout.jsonl --join --json ppl.json

A window of text is given to a model from its beginning, and the loss of each token counts for the length of the context
that stands before it in the window. With a --stride below the longest length windows overlap, so that a token is
predicted from several lengths of context. A model is a directory, a name of the Hub, or a .gguf file.
"""

import argparse
import datetime
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_prefill import commit
from torch.nn.functional import cross_entropy

import kda_hf
from kda_hf.generation import CACHE_NAME
from kda_hf.healing import load_causal_lm
from kda_hf.healing.data import read_documents, tokenize


def windows(documents: list[torch.Tensor], length: int, stride: int) -> list[torch.Tensor]:
    """Pieces of at most `length` tokens that begin every `stride` tokens of a document, and have a token to predict."""
    return [
        document[start : start + length]
        for document in documents
        for start in range(0, max(len(document) - 1, 0), stride)
    ]


@torch.no_grad()
def token_losses(model: Any, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """
    Negative log-probabilities `[B, T - 1]` in fp32 of the tokens `[B, T]` after the first.

    Rows longer than `chunk` go through the model's cache in pieces, so that logits of one piece are alive at a time.
    """
    losses, cache = [], None
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        uses_cache = ids.shape[1] > chunk
        given = {} if cache is None else {CACHE_NAME: cache}
        output = model(input_ids=piece, use_cache=uses_cache, **given)
        cache = getattr(output, CACHE_NAME) if uses_cache else None
        targets = ids[:, start + 1 : start + 1 + piece.shape[1]]
        logits = output.logits[:, : targets.shape[1]].float()
        losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape))
    return torch.cat(losses, dim=1)


def perplexities(
    model: Any, rows: list[torch.Tensor], lengths: list[int], batch_tokens: int, chunk: int
) -> list[dict[str, Any]]:
    """Tokens and perplexity for each range of context lengths, from the one before up to each of `lengths`, then for
    all. The perplexity of a range without tokens is None."""
    sums = torch.zeros(max(lengths), dtype=torch.float64, device=model.device)
    counts = torch.zeros_like(sums)
    by_length: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for length, same in by_length.items():
        batch = max(1, batch_tokens // length)
        for start in range(0, len(same), batch):
            ids = torch.stack(same[start : start + batch]).long().to(model.device)
            losses = token_losses(model, ids, chunk)
            sums[1:length] += losses.sum(0, dtype=torch.float64)
            counts[1:length] += len(ids)

    results = []
    edges = [0, *sorted(lengths)]
    for low, high in [*zip(edges[:-1], edges[1:], strict=True), (0, edges[-1])]:
        tokens, nats = int(counts[low:high].sum()), float(sums[low:high].sum())
        perplexity = math.exp(min(nats / tokens, 700.0)) if tokens else None
        results.append({"from": low, "to": high, "tokens": tokens, "perplexity": perplexity})
    return results


def circumstances(device: torch.device) -> dict[str, Any]:
    """What a result needs to be compared with another."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "kda_hf": kda_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The models, where they run, and where the results go: the same for all evaluations."""
    parser.add_argument("models", nargs="+", help="directories, Hub names or .gguf files; the first is compared with")
    parser.add_argument("--text", nargs="+", required=True, help="text files, JSONL files or directories of them")
    parser.add_argument("--document-separator", help=r"between the documents of a text file, \n for a line end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the models (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the numbers")


def loaded(path: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer, ready to be evaluated."""
    name = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype: {name!r} is no dtype of torch")
    model, tokenizer = load_causal_lm(path, dtype=dtype)
    return model.to(args.device).eval(), tokenizer


def documents_of(args: argparse.Namespace) -> list[Any]:
    separator = args.document_separator
    return read_documents(args.text, separator=separator.replace("\\n", "\n") if separator else None)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048], help="of the context")
    parser.add_argument("--stride", type=int, help="tokens from window to window (default: the longest length)")
    parser.add_argument("--join", action="store_true", help="documents one after the other, to fill long contexts")
    parser.add_argument("--max-tokens", type=int, default=200_000, help="of the text, which is cut there")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of windows that go through together")
    parser.add_argument("--chunk", type=int, default=2048, help="logits of so many positions at a time")
    args = parser.parse_args()
    if min(args.lengths) < 2:
        parser.error("--lengths: at least 2")
    args.stride = max(args.lengths) if args.stride is None else args.stride
    for name in ("stride", "max_tokens", "batch_tokens", "chunk"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1")
    return args


def rows_of(tokenizer: Any, args: argparse.Namespace) -> list[torch.Tensor]:
    corpus = tokenize(documents_of(args), tokenizer)
    bounds = corpus.bounds.clamp(max=args.max_tokens).tolist()
    ids = corpus.ids[: args.max_tokens]
    documents = [ids] if args.join else [ids[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    rows = windows(documents, max(args.lengths), args.stride)
    if not rows:
        raise ValueError("--text: no document has two tokens")
    return rows


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    first_rows = None
    for path in args.models:
        model, tokenizer = loaded(path, args)
        rows = rows_of(tokenizer, args)
        first_rows = first_rows or rows
        same_tokens = len(rows) == len(first_rows) and all(map(torch.equal, rows, first_rows))
        begun = time.perf_counter()
        ranges = perplexities(model, rows, args.lengths, args.batch_tokens, args.chunk)
        result = {
            "model": path,
            "perplexity": ranges[-1]["perplexity"],
            "tokens": ranges[-1]["tokens"],
            "same_tokens_as_first": same_tokens,
            "ranges": ranges[:-1],
            "seconds": round(time.perf_counter() - begun, 2),
        }
        result["to_first"] = result["perplexity"] / (results[0] if results else result)["perplexity"]
        results.append(result)
        print(line(result), flush=True)
    options = {name: value for name, value in vars(args).items() if name != "json"}
    return circumstances(torch.device(args.device)) | {"options": options, "results": results}


def header(lengths: list[int]) -> str:
    edges = [0, *sorted(lengths)]
    columns = [f"{low}-{high - 1}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return f"{'perplexity of':40}" + "".join(f"{column:>12}" for column in [*columns, "all", "to first"])


def line(result: dict[str, Any]) -> str:
    values = [entry["perplexity"] for entry in result["ranges"]] + [result["perplexity"]]
    numbers = "".join(f"{'-':>12}" if value is None else f"{value:12.4g}" for value in values)
    note = "" if result["same_tokens_as_first"] else "  (other tokens: not comparable)"
    return f"{result['model'][-39:]:40}{numbers}{result['to_first']:12.3f}{note}"


def main() -> None:
    args = parse_args()
    print(header(args.lengths), flush=True)
    try:
        result = evaluate(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"eval_ppl: {error}")
    print(f"{result['device']}, commit {result['commit']}, {result['date']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
