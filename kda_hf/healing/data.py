"""Text to heal a model on: read, split, tokenized once, and packed into rows."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file


TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSON_SUFFIXES = (".jsonl", ".json")
# A document is a string, or the messages of a conversation, as a chat template takes them.
Document = str | list[dict[str, Any]]


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_documents(
    sources: Sequence[str | Path],
    *,
    separator: str | None = None,
    text_field: str = "text",
    dataset_split: str = "train",
    max_documents: int | None = None,
) -> list[Document]:
    """
    The documents of text files, JSONL files, directories of both, and datasets of the Hugging Face Hub.

    Args:
        sources: a path; or the name of a dataset, `owner/name` or `owner/name:configuration`. A directory stands for
            its text and JSONL files, in the order of their paths.
        separator: what stands between the documents of a text file. Default: a text file is one document.
        text_field: where a JSONL line or a dataset's row has its text. One that has `messages` is a conversation.
        dataset_split: of a dataset.
        max_documents: where to stop.

    Raises:
        ValueError: a source that is neither a path nor a dataset, a file that cannot be read, or no document at all.
        ImportError: a dataset without the package `datasets`.
    """
    documents: list[Document] = []
    for source in sources:
        for document in _source_documents(source, separator, text_field, dataset_split):
            if max_documents is not None and len(documents) >= max_documents:
                return documents
            if not isinstance(document, str) or document.strip():
                documents.append(document)
    if not documents:
        raise ValueError(f"`data` has no text: {', '.join(map(str, sources))}")
    return documents


def _source_documents(source: str | Path, separator: str | None, field: str, split: str) -> Iterator[Document]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES + JSON_SUFFIXES)
        if not files:
            raise ValueError(f"`data`: {path} has no file that ends in {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}")
        for file in files:
            yield from _file_documents(file, separator, field)
    elif path.exists():
        yield from _file_documents(path, separator, field)
    elif path.is_absolute() or str(source).startswith(".") or path.suffix in TEXT_SUFFIXES + JSON_SUFFIXES:
        raise ValueError(f"`data`: no such file or directory: {source}")
    else:
        yield from _dataset_documents(str(source), field, split)


def _file_documents(path: Path, separator: str | None, field: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`data`: {path} is not UTF-8 text: {error}") from error
    if path.suffix not in JSON_SUFFIXES:
        yield from text.split(separator) if separator else [text]
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _row_document(json.loads(line), field)
            except ValueError as error:
                raise ValueError(f"`data`: {path}, line {number}: {error}") from error


def _row_document(row: Any, field: str) -> Document:
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list) and row["messages"]:
            return row["messages"]
        if isinstance(row.get(field), str):
            return row[field]
    raise ValueError(f"neither a string {field!r} nor a list 'messages' in {str(row)[:80]!r}")


def _dataset_documents(name: str, field: str, split: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"`data`: {name} is no file or directory here, and to read it as a dataset of the Hub needs the package "
            "datasets: pip install datasets"
        ) from error
    dataset, _, configuration = name.partition(":")
    for row in load_dataset(dataset, configuration or None, split=split, streaming=True):
        yield _row_document(row, field)


def hold_out(documents: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """
    Splits off about `fraction` of the characters: whole documents, picked by a hash of their text, once each, however
    often they are there. A text that is longer than what is still to be held out is cut at white space, and only its
    end is held out: so a corpus of one long text is split too.

    Returns:
        The documents to train on and the ones held out.
    """
    copies: dict[bytes, list[Document]] = {}
    for document in documents:
        digest = hashlib.blake2b(_as_text(document).encode(errors="surrogatepass")).digest()
        copies.setdefault(digest, []).append(document)
    wanted = fraction * sum(len(_as_text(same[0])) for same in copies.values())
    train: list[Document] = []
    held_out: list[Document] = []
    for _, same in sorted(copies.items(), key=lambda item: item[0]):
        document, size = same[0], len(_as_text(same[0]))
        if size <= wanted:
            held_out.append(document)
            wanted -= size
        elif isinstance(document, str) and wanted >= 1:
            cut = _word_end(document, size - int(wanted))
            train += [document[:cut]] * len(same)
            if document[cut:].strip():
                held_out.append(document[cut:])
            wanted = 0
        else:
            train += same
    return train, held_out


def _as_text(document: Document) -> str:
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True)


def _word_end(text: str, start: int) -> int:
    for end in range(start, len(text)):
        if text[end].isspace():
            return end
    return start


def write_documents(documents: Iterable[Document], path: Path) -> None:
    """As JSONL, which `read_documents` reads."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {"text": document} if isinstance(document, str) else {"messages": document}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- Tokens ----------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Tokenized documents one after the other.

    Args:
        ids (`torch.Tensor` of shape `[T]`, int32): all tokens.
        bounds (`torch.Tensor` of shape `[N + 1]`, int64): document i is `ids[bounds[i] : bounds[i + 1]]`.
    """

    ids: torch.Tensor
    bounds: torch.Tensor


def tokenize(documents: Sequence[Document], tokenizer: Any, batch: int = 512) -> Corpus:
    """Texts get the special tokens that the tokenizer adds, conversations those of its chat template. Documents that
    come out empty are left out.

    Raises:
        ValueError: a conversation, and the tokenizer has no chat template.
    """
    pieces = [torch.empty(0, dtype=torch.int32)]
    for start in range(0, len(documents), batch):
        for document in _tokenized(documents[start : start + batch], tokenizer):
            if document:
                pieces.append(torch.tensor(document, dtype=torch.int32))
    bounds = torch.tensor([len(piece) for piece in pieces]).cumsum(0)  # the empty piece in front gives the zero
    return Corpus(torch.cat(pieces), bounds)


def _tokenized(documents: Sequence[Document], tokenizer: Any) -> list[list[int]]:
    texts = [document for document in documents if isinstance(document, str)]
    conversations = [document for document in documents if not isinstance(document, str)]
    if conversations and not tokenizer.chat_template:
        raise ValueError("`data` has conversations (`messages`), and the tokenizer has no chat template")
    # verbose=False: a text longer than the model's context is cut later on, and no reason for a warning
    rows = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    chats = iter(tokenizer.apply_chat_template(conversations, return_dict=False) if conversations else [])
    return [next(rows if isinstance(document, str) else chats) for document in documents]


def fingerprint(documents: Iterable[Document], tokenizer: Any) -> str:
    """A hash of the documents and of what the tokenizer makes of them."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokenizer_state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    for text in (tokenizer_state, str(tokenizer.chat_template)):
        digest.update(text.encode() + b"\0")
    for document in documents:
        digest.update(_as_text(document).encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def cached_tokens(documents: Sequence[Document], tokenizer: Any, path: Path) -> tuple[Corpus, str]:
    """The corpus out of the file, if it was made of these documents with this tokenizer, else made and written there.

    Returns:
        The corpus and the fingerprint of what it was made of.
    """
    made_of = fingerprint(documents, tokenizer)
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_of") == made_of:
                return Corpus(file.get_tensor("ids"), file.get_tensor("bounds")), made_of
    corpus = tokenize(documents, tokenizer)
    scratch = path.with_name(path.name + ".tmp")
    save_file(corpus._asdict(), scratch, metadata={"made_of": made_of})
    scratch.replace(path)
    return corpus, made_of


# --- Packing ---------------------------------------------------------------------------------------------------------


class PackedRow:
    """
    Documents one after the other in a row of T tokens, and what models need to keep them apart.

    Attributes:
        tokens (`int` or `torch.Tensor`, a scalar): how many of the T there are.
        valid (`torch.Tensor` of shape `[T]`, bool, *optional*): which of them; None for all.
        input_ids (`torch.Tensor` of shape `[1, T]`, int64).
        position_ids (`torch.Tensor` of shape `[1, T]`, int64): starts at zero in each document.
        cu_seqlens (`torch.Tensor` of shape `[N + 1]`, int64): the boundaries.
        lengths (`list[int]`): of the N documents.
    """

    valid: torch.Tensor | None = None
    tokens: int | torch.Tensor

    def __init__(self, documents: Sequence[torch.Tensor], device: torch.device | str = "cpu"):
        self.lengths = [len(document) for document in documents]
        self.input_ids = torch.cat(list(documents)).long()[None].to(device)
        self.position_ids = torch.cat([torch.arange(length) for length in self.lengths])[None].to(device)
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(device)
        self.tokens = len(self)

    def __len__(self) -> int:
        return self.input_ids.shape[1]


class FixedRow(PackedRow):
    """
    A row at a fixed place, of one shape whatever documents it holds, so that a CUDA graph can read it: tokens of no
    document fill it up at its end, and empty documents `cu_seqlens`.

    Args:
        tokens: T.
        documents: the most that it can hold, N.
        max_length: of a document.
    """

    valid: torch.Tensor
    tokens: torch.Tensor

    def __init__(self, tokens: int, documents: int, max_length: int, device: torch.device | str = "cpu"):
        super().__init__([torch.zeros(tokens, dtype=torch.int64)], device)
        self.documents, self.max_length = documents, max_length
        self.cu_seqlens = torch.zeros(documents + 1, dtype=torch.int64, device=device)
        self.valid = torch.zeros(tokens, dtype=torch.bool, device=device)
        self.tokens = torch.zeros((), device=device)

    def holds(self, documents: Sequence[torch.Tensor]) -> bool:
        """Whether there is room for these."""
        lengths = [len(document) for document in documents]
        return len(lengths) <= self.documents and sum(lengths) <= len(self) and max(lengths) <= self.max_length

    def fill(self, documents: Sequence[torch.Tensor]) -> None:
        """Puts these documents in place of those before."""
        row = PackedRow(documents)
        size, spare = len(row), len(self) - len(row)
        self.lengths = [*row.lengths, spare] if spare else row.lengths
        pad = torch.nn.functional.pad
        self.input_ids.copy_(pad(row.input_ids, (0, spare)))
        self.position_ids.copy_(pad(row.position_ids, (0, spare)))
        self.cu_seqlens.copy_(pad(row.cu_seqlens, (0, len(self.cu_seqlens) - len(row.cu_seqlens)), value=size))
        self.valid.copy_(torch.arange(len(self)) < size)
        self.tokens.fill_(size)


def pack(
    corpus: Corpus, max_length: int, tokens_per_row: int, generator: torch.Generator | None = None
) -> list[list[tuple[int, int]]]:
    """
    Rows of at most `tokens_per_row` tokens: each is a list of (start, end) in `corpus.ids`. Documents are cut into
    pieces of at most `max_length`, and no piece is cut by the end of a row. With a generator, the pieces are shuffled.
    """
    pieces = []
    for start, end in zip(corpus.bounds[:-1].tolist(), corpus.bounds[1:].tolist(), strict=True):
        pieces += [(place, min(place + max_length, end)) for place in range(start, end, max_length)]
    if generator is not None:
        pieces = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
    rows: list[list[tuple[int, int]]] = []
    room = 0
    for start, end in pieces:
        if not rows or end - start > room:
            rows.append([])
            room = tokens_per_row
        rows[-1].append((start, end))
        room -= end - start
    return rows


class RowStream:
    """The rows of a corpus epoch after epoch, each in an order of its own that follows from seed and epoch alone."""

    def __init__(self, corpus: Corpus, max_length: int, tokens_per_row: int, seed: int):
        self.corpus, self.max_length, self.tokens_per_row, self.seed = corpus, max_length, tokens_per_row, seed
        self.seek(0, 0)

    def seek(self, epoch: int, row: int) -> None:
        self.epoch, self.row = epoch, row
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        self.rows = pack(self.corpus, self.max_length, self.tokens_per_row, generator)

    def take(self, count: int) -> list[list[tuple[int, int]]]:
        taken = []
        for _ in range(count):
            if self.row == len(self.rows):
                self.seek(self.epoch + 1, 0)
            taken.append(self.rows[self.row])
            self.row += 1
        return taken
