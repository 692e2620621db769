"""What models answer to the same questions, side by side, and how likely the first model finds each answer.

    python scripts/eval_chat.py ORIGINAL healed/stage2 --json chat.json

Greedy answers in the models' chat format. The first model reads each answer after its question: the perplexity that it
gives tells an answer that it might have written itself from one that has lost the thread. Models are directories, names
of the Hub or .gguf files; --prompts is a text file with a question on each line.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from eval_ppl import circumstances, loaded, token_losses


PROMPTS = [
    "What is the capital of France, and what is it known for?",
    "How do I make a cup of tea?",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "Give me three tips for learning a new language.",
    "My sister Anna lives in Oslo and works as a nurse. Where does Anna live?",
    "What is the difference between a list and a tuple in Python?",
    "Write an e-mail to my landlord about a broken window.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the first one judges the answers of all")
    parser.add_argument("--prompts", type=Path, help="a file with a question on each line (default: eight of ours)")
    parser.add_argument("--new", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--repetition-penalty", type=float, default=1.1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the models (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--json", type=Path, help="where to write the answers")
    args = parser.parse_args()
    if args.new < 1:
        parser.error("--new: at least 1")
    return args


def questions(args: argparse.Namespace) -> list[str]:
    lines = args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else PROMPTS
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts: {args.prompts} has no line")
    return prompts


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


@torch.no_grad()
def answer(model: Any, ids: list[int], args: argparse.Namespace) -> list[int]:
    """The tokens of the greedy answer, with the one that ends it."""
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=args.new,
        do_sample=False,
        repetition_penalty=args.repetition_penalty,
    )
    return output[0, len(ids) :].tolist()


@torch.no_grad()
def perplexity(judge: Any, ids: list[int], tokens: list[int]) -> float | None:
    """Of the tokens after `ids`; None where there are none."""
    if not tokens:
        return None
    losses = token_losses(judge, torch.tensor([ids + tokens], device=judge.device), chunk=2048)[0, len(ids) - 1 :]
    return math.exp(min(float(losses.double().mean()), 700.0))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    prompts = questions(args)
    judge: Any = None
    results = []
    for path in args.models:
        model, tokenizer = loaded(path, args)
        judge = judge or model
        for prompt in prompts:
            ids = prompt_ids(tokenizer, prompt)
            tokens = answer(model, ids, args)
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            result = {"model": path, "prompt": prompt, "answer": text, "tokens": len(tokens)}
            results.append(result | {"perplexity": perplexity(judge, ids, tokens)})
            print(f"[{path}] {prompt}\n{text}\n", flush=True)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del options["json"]
    return circumstances(torch.device(args.device)) | {"options": options, "results": results}


def summary(result: dict[str, Any]) -> str:
    lines = [f"{'answers of':40}{'tokens':>8}{'perplexity by the first':>26}"]
    for path in dict.fromkeys(row["model"] for row in result["results"]):
        rows = [row for row in result["results"] if row["model"] == path]
        values = [row["perplexity"] for row in rows if row["perplexity"] is not None]
        median = f"{statistics.median(values):26.3g}" if values else f"{'-':>26}"
        lines.append(f"{path[-39:]:40}{statistics.fmean(row['tokens'] for row in rows):8.0f}{median}")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    try:
        result = evaluate(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"eval_chat: {error}")
    print(summary(result))
    print(f"{result['device']}, commit {result['commit']}, {result['date']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
