"""Whether models carry a fact over a long text: "The pass key of Daniel is 48213", many tokens of other text, and then
the question.

    python scripts/eval_recall.py ORIGINAL healed/stage2 --text healed/heldout.jsonl --lengths 512 2048 --chat

Two scores, and a margin. "exact": the greedy answer is the key. "choice": the key is likelier as an answer than each of
--distractors other numbers; a model that has forgotten the fact gets 1 / (distractors + 1) by chance. The margin, in
nats, is what the key's log-probability has over that of the likeliest other number.
"""

import argparse
import json
import random
import re
import statistics
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from eval_ppl import add_model_arguments, circumstances, documents_of, loaded


NAMES = ["Daniel", "Maria", "Henry", "Sofia", "Peter", "Laura", "Victor", "Emma", "Oscar", "Julia"]


class Case(NamedTuple):
    """One question: the prompt ends where the key is to follow."""

    prompt: str
    key: str
    distractors: list[str]


def make_case(
    tokenizer: Any, filler: torch.Tensor, length: int, depth: float, distractors: int, chat: bool, rng: random.Random
) -> Case:
    """
    A fact at `depth`, from 0 to 1, in a text of about `length` tokens.

    Args:
        filler (`torch.Tensor` of shape `[T]`): tokens of the text around; a piece at a random place is taken.
        chat: the text and the question are a user's message, and the prompt begins the assistant's answer.
    """
    name = rng.choice(NAMES)
    key, *others = (str(number) for number in rng.sample(range(10_000, 100_000), distractors + 1))
    fact = f"\n\nThe pass key of {name} is {key}.\n\n"
    question = f"\n\nWhat is the pass key of {name}?"
    answer = f"The pass key of {name} is"
    around = length - len(tokenizer(fact + question + answer)["input_ids"])
    if around < 2 or around > len(filler):
        raise ValueError(f"--lengths: {length} tokens need a --text of {around}, which must be at least 2")
    start = rng.randrange(len(filler) - around + 1)
    cut = start + round(depth * around)
    before, after = (tokenizer.decode(piece) for piece in (filler[start:cut], filler[cut : start + around]))
    text = f"{before}{fact}{after}{question}"
    if chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return Case(text + answer, key, others)
    return Case(f"{text} {answer}", key, others)


def answer_ids(tokenizer: Any, case: Case, chat: bool) -> tuple[list[int], list[list[int]]]:
    """The tokens of the prompt, and those of the key and of each distractor after it."""
    # A chat template has written the special tokens already
    prompt = tokenizer(case.prompt, add_special_tokens=not chat)["input_ids"]
    answers = [
        tokenizer(f" {number}", add_special_tokens=False)["input_ids"] for number in (case.key, *case.distractors)
    ]
    return prompt, answers


@torch.no_grad()
def log_probabilities(model: Any, prompt: list[int], answers: list[list[int]]) -> list[float]:
    """Of each answer as a whole after the prompt."""
    results = [0.0] * len(answers)
    for length in {len(answer) for answer in answers}:
        places = [i for i, answer in enumerate(answers) if len(answer) == length]
        ids = torch.tensor([prompt + answers[i] for i in places], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        chosen = logits.float().log_softmax(-1).gather(2, ids[:, -length:, None]).squeeze(2).sum(1)
        for i, value in zip(places, chosen.tolist(), strict=True):
            results[i] = value
    return results


@torch.no_grad()
def greedy_text(model: Any, tokenizer: Any, prompt: list[int], new_tokens: int) -> str:
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def says(text: str, key: str) -> bool:
    """Whether the first number of an answer is the key."""
    number = re.match(r"\D*(\d+)", text)
    return number is not None and number[1] == key


def choice_score(values: list[float]) -> float:
    """1 where the first value is the largest, 0 where it isn't; among k equal ones, 1 / k."""
    return (values[0] == max(values)) / values.count(max(values))


def score(model: Any, tokenizer: Any, case: Case, chat: bool) -> dict[str, float]:
    prompt, answers = answer_ids(tokenizer, case, chat)
    values = log_probabilities(model, prompt, answers)
    text = greedy_text(model, tokenizer, prompt, max(map(len, answers)) + 2)
    return {
        "tokens": len(prompt),
        "exact": float(says(text, case.key)),
        "choice": choice_score(values),
        "margin": values[0] - max(values[1:]),
    }


def cells(model: Any, tokenizer: Any, filler: torch.Tensor, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Mean scores for each length and depth. Every model gets the same questions."""
    for length in args.lengths:
        for depth in args.depths:
            rng = random.Random(f"{args.seed} {length} {depth}")
            scores = []
            for _ in range(args.samples):
                case = make_case(tokenizer, filler, length, depth, args.distractors, args.chat, rng)
                scores.append(score(model, tokenizer, case, args.chat))
            means = {name: statistics.fmean(entry[name] for entry in scores) for name in scores[0]}
            yield {"length": length, "depth": depth, "samples": args.samples} | means


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    texts = [document for document in documents_of(args) if isinstance(document, str)]
    if not texts:
        raise ValueError("--text: it has conversations only; text to hide a fact in is plain")
    results = []
    for path in args.models:
        model, tokenizer = loaded(path, args)
        if args.chat and not tokenizer.chat_template:
            raise ValueError(f"--chat: the tokenizer of {path} has no chat template")
        filler = torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
        for cell in cells(model, tokenizer, filler, args):
            results.append({"model": path} | cell)
            print(line(results[-1]), flush=True)
    options = {name: value for name, value in vars(args).items() if name != "json"}
    return circumstances(torch.device(args.device)) | {
        "chance": 1 / (args.distractors + 1),
        "options": options,
        "results": results,
    }


HEADER = f"{'recall of':40}{'tokens':>8}{'depth':>7}{'exact':>8}{'choice':>8}{'margin':>9}"


def line(result: dict[str, Any]) -> str:
    scores = f"{result['exact']:8.0%}{result['choice']:8.0%}{result['margin']:9.2f}"
    return f"{result['model'][-39:]:40}{result['tokens']:8.0f}{result['depth']:7.2f}{scores}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096], help="tokens of the prompts")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="of the fact")
    parser.add_argument("--samples", type=int, default=10, help="questions for each length and depth")
    parser.add_argument("--distractors", type=int, default=4, help="other numbers that the key is compared with")
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat format")
    args = parser.parse_args()
    if not all(0 <= depth <= 1 for depth in args.depths):
        parser.error("--depths: from 0 to 1")
    for name in ("samples", "distractors"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: at least 1")
    return args


def main() -> None:
    args = parse_args()
    print(HEADER, flush=True)
    try:
        result = evaluate(args)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"eval_recall: {error}")
    chance = f"choice by chance {result['chance']:.0%}"
    print(f"{chance}; {result['device']}, commit {result['commit']}, {result['date']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
