"""Lets a model write the text that another is healed on: documents and conversations, as JSONL.

    python scripts/sample_text.py ORIGINAL --documents 4000 --conversations 8000 --out sampled.jsonl
    kda-hf heal --teacher ORIGINAL --layers 3:1 --data sampled.jsonl --out healed

A document is what the model writes after the token that stood between the documents it was trained on. For a
conversation it is given its chat template up to where the user's message begins, writes that message, is given what the
template has next, and answers. What the template puts in front, such as a system prompt, is not stored: the template
puts it there again in healing.

Any special token ends a text, so none is stored. Left out are empty texts, messages that --max-prompt-tokens do not
suffice for or that another token than the template's ends, and messages that were there before. What --max-tokens or
--minutes cut short is kept if it has 64 tokens, or --max-tokens: in a text that long, one wrong end matters little.
So fewer lines are written than --documents and --conversations say.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from eval_ppl import loaded
from tqdm import tqdm
from transformers import DynamicLayer

from kda_hf.generation import CACHE_NAME


DOCUMENT_TOKEN = "<|endoftext|>"
MARKER = "0f5c7e1d"  # stands for a message, to see what a chat template puts around it
LOOK_EVERY = 16  # steps from one look at what is finished to the next: each makes the GPU wait
USEFUL_TOKENS = 64  # of a text that was cut


# --- What is sampled -------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """
    Args:
        prompt: the tokens that all rows begin with.
        message_end: the token that ends the user's message; None where there is no message.
        reply: the tokens from there to where the answer begins.
    """

    prompt: tuple[int, ...]
    message_end: int | None = None
    reply: tuple[int, ...] = ()


class Sampled(NamedTuple):
    """The tokens of a user's message, of a document or an answer, and whether a special token ended the latter."""

    message: list[int]
    text: list[int]
    ended: bool


def special_ids(model: Any, tokenizer: Any) -> set[int]:
    """All tokens that are no text: those that the tokenizer calls special, and the ends of sequence of the model."""
    ends = model.generation_config.eos_token_id
    added = tokenizer.added_tokens_decoder.items()
    ids = {*tokenizer.all_special_ids, *(token for token, content in added if content.special)}
    return ids | ({ends} if isinstance(ends, int) else set(ends or ()))


def document_kind(tokenizer: Any, token: str | None) -> Kind:
    vocabulary = tokenizer.get_vocab()
    if token is None:
        candidates = [DOCUMENT_TOKEN, tokenizer.bos_token, tokenizer.eos_token]
        token = next((candidate for candidate in candidates if candidate in vocabulary), None)
        if token is None:
            raise ValueError("the tokenizer has no token that begins a document: give --document-token")
    elif token not in vocabulary:
        raise ValueError(f"--document-token: {token!r} is no token of the model")
    return Kind((vocabulary[token],))


def conversation_kind(tokenizer: Any, specials: set[int]) -> Kind:
    """From the template itself: what it puts before and after a message that can be told from the rest."""
    if not tokenizer.chat_template:
        raise ValueError("--conversations: the tokenizer has no chat template")
    message = [{"role": "user", "content": MARKER}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, found, after = rendered.partition(MARKER)
    if not found or MARKER in after:
        raise ValueError("--conversations: the chat template does not render a user's message once")
    prompt, reply = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    # What the template may have between the message and the token that ends it, the model writes itself
    end = next((place for place, token in enumerate(reply) if token in specials), None)
    if end is None or not prompt:
        raise ValueError("--conversations: no special token ends the user's message in the chat template")
    return Kind(tuple(prompt), reply[end], tuple(reply[end + 1 :]))


# --- Sampling --------------------------------------------------------------------------------------------------------


class RoomyLayer(DynamicLayer):
    """Keys and values with room for more: a plain `DynamicLayer` copies all of them for each token."""

    STEP = 256

    def __init__(self, layer: DynamicLayer):
        vars(self).update(vars(layer))
        self.room: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self.room or self.room[0].shape[2] < end:
            self.room = tuple(self._moved(old, end + self.STEP) for old in (self.keys, self.values))
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = ()

    @staticmethod
    def _moved(old: torch.Tensor, capacity: int) -> torch.Tensor:
        room = old.new_empty(*old.shape[:2], capacity, old.shape[3])
        room[:, :, : old.shape[2]] = old
        return room


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """
    The probabilities with zeros where a token is not among the likeliest that have `top_p` together.

    The least probability that belongs to them is found by bisection: sorting the vocabulary would cost more than the
    model does. What it is off by can only leave in tokens that are as likely as the last one within 2^-16 of the first.
    """
    low, high = torch.zeros_like(probabilities[:, :1]), probabilities.amax(1, keepdim=True)
    for _ in range(16):
        middle = (low + high) / 2
        enough = torch.where(probabilities >= middle, probabilities, 0).sum(1, keepdim=True) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(probabilities >= low, probabilities, 0)


def pick(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """A token for each row. `torch.multinomial` does the same, but waits for the GPU at each call."""
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)


@torch.inference_mode()
def sample(
    model: Any,
    kind: Kind,
    rows: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
    specials: torch.Tensor,
    max_message: int,
    max_tokens: int,
    deadline: float,
) -> Iterator[list[Sampled]]:
    """
    Samples `rows` texts at once, and gives them back in groups as they are finished.

    All rows have the same prompt, and a row whose message has ended goes on with the reply's tokens while others are
    still at their message: so there is never a padding, nor a mask, and each token is computed once.

    Args:
        choose: samples from logits `[B, V]`.
        specials (`torch.Tensor` of shape `[V]`, bool): the tokens that end a text.
        max_message: tokens of the user's message.
        max_tokens: of the answer, or the document.
        deadline: of `time.monotonic()`; what is not finished then is cut.
    """
    device, reply = model.device, torch.tensor(kind.reply, device=model.device)
    has_message = kind.message_end is not None
    columns = columns_of(kind, max_message, max_tokens)
    written = torch.zeros(rows, columns, dtype=torch.long, device=device)
    begins = torch.full((rows,), columns if has_message else 0, device=device)  # where the answer does, once known
    stops = torch.full((rows,), columns, device=device)  # the last token that counts, once known
    given, cache = torch.tensor(kind.prompt, device=device).expand(rows, -1), None
    for column in range(columns):
        past: dict[str, Any] = {} if cache is None else {CACHE_NAME: cache}
        output = model(input_ids=given, use_cache=True, logits_to_keep=1, **past)
        if cache is None:
            cache = getattr(output, CACHE_NAME)
            cache.layers = [RoomyLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        token = choose(output.logits[:, -1])
        place = column - begins  # in the answer; the reply is at -len(reply) to -1, the message before it
        over = place >= max_tokens - 1
        if has_message:
            in_message = place < -len(reply)
            if len(reply):
                token = torch.where(in_message | (place >= 0), token, reply[place.clamp(-len(reply), -1)])
            ends = in_message & (token == kind.message_end) & (column > 0)
            begins = torch.where(ends, column + 1 + len(reply), begins)
            over |= in_message & ~ends & (specials[token] | (column >= max_message))
        over |= (place >= 0) & specials[token]
        stops = torch.where(over, stops.clamp(max=column), stops)
        written[:, column] = token

        given = token[:, None]
        if (column + 1) % LOOK_EVERY == 0 or column + 1 == columns:
            going = stops > column
            count = int(going.sum())
            if count == 0 or column + 1 == columns or time.monotonic() > deadline:
                yield results(written, begins, stops.clamp(max=column), specials, len(reply))
                return
            if count <= len(going) // 2:
                yield results(written[~going], begins[~going], stops[~going], specials, len(reply))
                kept = going.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                given, written, begins, stops = given[kept], written[kept], begins[kept], stops[kept]


def columns_of(kind: Kind, max_message: int, max_tokens: int) -> int:
    """The most tokens that come after the prompt: the message and its end, the reply, and the answer."""
    return max_tokens + (0 if kind.message_end is None else max_message + 1 + len(kind.reply))


def results(
    written: torch.Tensor, begins: torch.Tensor, stops: torch.Tensor, specials: torch.Tensor, reply_length: int
) -> list[Sampled]:
    """One for each row; those that came to no answer have an empty text."""
    found = []
    ended = specials[written.gather(1, stops[:, None]).squeeze(1)]
    for row, begin, stop, is_ended in zip(
        written.tolist(), begins.tolist(), stops.tolist(), ended.tolist(), strict=True
    ):
        found.append(Sampled(row[: max(begin - reply_length - 1, 0)], row[begin : stop + (not is_ended)], is_ended))
    return found


# --- What is stored --------------------------------------------------------------------------------------------------


class Writer:
    """
    Makes JSONL of what is worth to be stored, each group of it written at once, so that an interruption leaves whole
    lines.

    Attributes:
        documents, conversations, dropped, tokens (`int`): how many there were; the tokens are those of stored texts.
    """

    def __init__(self, file: Any, tokenizer: Any, specials: set[int], max_tokens: int):
        self.file, self.tokenizer, self.useful = file, tokenizer, min(USEFUL_TOKENS, max_tokens)
        self.special_texts = [text for text in tokenizer.convert_ids_to_tokens(sorted(specials)) if text]
        self.messages: set[str] = set()
        self.documents = self.conversations = self.dropped = self.tokens = 0

    def write(self, group: list[Sampled]) -> None:
        lines = [(sampled, self.line(sampled)) for sampled in group]
        stored = [(sampled, line) for sampled, line in lines if line]
        self.file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for _, line in stored))
        self.file.flush()
        self.documents += sum("text" in line for _, line in stored)
        self.conversations += sum("messages" in line for _, line in stored)
        self.dropped += len(lines) - len(stored)
        self.tokens += sum(len(sampled.message) + len(sampled.text) for sampled, _ in stored)

    def line(self, sampled: Sampled) -> dict[str, Any] | None:
        text = self.decoded(sampled.text)
        if not text or not (sampled.ended or len(sampled.text) >= self.useful):
            return None
        if not sampled.message:
            return {"text": text}
        message = self.decoded(sampled.message)
        if not message or message in self.messages:
            return None
        self.messages.add(message)
        return {"messages": [{"role": "user", "content": message}, {"role": "assistant", "content": text}]}

    def decoded(self, ids: list[int]) -> str:
        """The text without white space around it, nor a part of a character where it was cut. Empty if it spells a
        special token, which a tokenizer would read as one."""
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text = text.rstrip("\N{REPLACEMENT CHARACTER}").strip()
        return "" if any(special in text for special in self.special_texts) else text


# --- The script ------------------------------------------------------------------------------------------------------


def batches(wanted: dict[Kind, int], size: int) -> list[tuple[Kind, int]]:
    """Kinds and numbers of rows, as even as can be, and by turns: so time that runs out cuts all kinds alike."""
    turns = []
    for kind, total in wanted.items():
        count = -(-total // size)
        turns += [((i + 1) / count, kind, total * (i + 1) // count - total * i // count) for i in range(count)]
    return [(kind, rows) for _, kind, rows in sorted(turns, key=lambda turn: turn[0])]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, Hub name or .gguf file")
    parser.add_argument("--documents", type=int, default=4000, help="to sample")
    parser.add_argument("--conversations", type=int, help="to sample (default: 8000 if there is a chat template)")
    parser.add_argument("--out", type=Path, required=True, help="where to write the JSONL")
    parser.add_argument("--overwrite", action="store_true", help="what --out has")
    parser.add_argument("--batch", type=int, default=1024, help="texts that are sampled at once")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a document, and of an answer")
    parser.add_argument("--max-prompt-tokens", type=int, default=256, help="of a user's message")
    parser.add_argument("--minutes", type=float, help="to sample for, from when the model is loaded")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.95, help="1 samples from all tokens")
    parser.add_argument(
        "--document-token", help=f"what a document begins with (default: {DOCUMENT_TOKEN}, or else bos, or else eos)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the model (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument(
        "--seed", type=int, default=0, help="with --minutes, how far it comes still depends on the time"
    )
    args = parser.parse_args()
    for name in ("batch", "max_tokens", "max_prompt_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1")
    if min(args.documents, args.conversations or 0) < 0 or args.documents == args.conversations == 0:
        parser.error("--documents, --conversations: none is below 0, and one above")
    if args.temperature <= 0 or not 0 < args.top_p <= 1 or (args.minutes is not None and args.minutes <= 0):
        parser.error("--temperature and --minutes: above 0; --top-p: above 0, and at most 1")
    return args


def run(args: argparse.Namespace) -> str:
    """Samples, writes, and says what it did."""
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"--out: {args.out} is there already; --overwrite replaces it")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out: no such directory: {args.out.parent}")
    model, tokenizer = loaded(args.model, args)
    specials = special_ids(model, tokenizer)
    if args.conversations is None:
        args.conversations = 8000 if tokenizer.chat_template else 0
    wanted = {}
    if args.documents:
        documents = document_kind(tokenizer, args.document_token)
        wanted[documents] = args.documents
        specials.add(documents.prompt[0])
    if args.conversations:
        wanted[conversation_kind(tokenizer, specials)] = args.conversations
    if not wanted:
        raise ValueError("nothing to sample: no --documents, and the tokenizer has no chat template")
    config = model.config.get_text_config()
    longest = max(len(kind.prompt) + columns_of(kind, args.max_prompt_tokens, args.max_tokens) for kind in wanted)
    if longest > getattr(config, "max_position_embeddings", longest):
        raise ValueError(
            f"--max-tokens, --max-prompt-tokens: {longest} tokens in all, and the model is made for "
            f"{config.max_position_embeddings}"
        )
    # Tokens that a model has beyond the tokenizer's are as little text as special ones
    is_special = torch.arange(config.vocab_size, device=args.device) >= len(tokenizer)
    is_special[list(specials)] = True
    generator = torch.Generator(args.device).manual_seed(args.seed)

    start = time.monotonic()
    deadline = start + 60 * args.minutes if args.minutes else float("inf")
    with args.out.open("w", encoding="utf-8") as file, tqdm(total=sum(wanted.values()), unit="text") as bar:
        writer = Writer(file, tokenizer, specials, args.max_tokens)
        for kind, rows in batches(wanted, args.batch):
            if time.monotonic() > deadline:
                break
            for group in sample(
                model,
                kind,
                rows,
                lambda logits: pick(logits, args.temperature, args.top_p, generator),
                is_special,
                args.max_prompt_tokens,
                args.max_tokens,
                deadline,
            ):
                writer.write(group)
                bar.update(len(group))
                bar.set_postfix_str(f"{writer.tokens / (time.monotonic() - start):,.0f} tokens/s")
    seconds = time.monotonic() - start
    return (
        f"{writer.documents} documents, {writer.conversations} conversations, {writer.dropped} left out, "
        f"{writer.tokens:,} tokens in {seconds:.0f} s, {writer.tokens / seconds:,.0f} tokens/s"
    )


def main() -> None:
    args = parse_args()
    try:
        print(run(args))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"sample_text: {error}")


if __name__ == "__main__":
    main()
