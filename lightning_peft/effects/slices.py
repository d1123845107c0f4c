"""Draw one frozen slice of neutral text, on which it is measured what else an adapter changes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_peft.effects.token_batches import padding_of, token_batches
from lightning_peft.files.data_error import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEUTRAL = Path(__file__).with_name("neutral")
# `document_hash` of all its documents: what was measured on them can be compared as long as they are these
NEUTRAL_SHA256 = "1a19b165c95718665af073cf03d2bd7bd0d71072cc3c902d72787222c154d786"
WORD = re.compile(r"\w+|[^\w\s]")  # what is counted: the same for every model, and close to its tokens
_HEADING = re.compile(r"^# .*\n", re.MULTILINE)
_HUB_DOCUMENTS = 2000  # read from the hub, of OpenWebText's 10,000 in that sample


@dataclass(frozen=True)
class Document:
    """A text and its register, the name of the file it stands in."""

    text: str
    register: str


@dataclass(frozen=True)
class TextSlice:
    """The same text for every method and every model.

    Args:
        documents: the texts, each as long as it is used.
        source: where they come from.
        sha256: hash of the texts in their order.
    """

    documents: tuple[str, ...]
    source: str
    sha256: str


@dataclass
class TextSettings:
    """The settings of a slice of neutral text, as a dataclass for a plan or a task of one's own.

    Args:
        tokens: of text in all; 0 for none.
        source, seed, length: see `text_slice`.
    """

    tokens: int = 4096
    source: str = "package"
    seed: int = 0
    length: int = 128

    def text(self) -> TextSlice | None:
        """Draw the slice; None where there is to be none."""
        return text_slice(self.source, self.tokens, self.seed, self.length) if self.tokens else None


def text_slice(source: str | Path = "package", tokens: int = 12_800, seed: int = 0, length: int = 128) -> TextSlice:
    """Draw documents with a seed, each register in proportion, and cut each to its beginning.

    Tokens are counted as words and punctuation marks, so that the slice does not depend on a model's tokenizer. By
    default they are 100 documents of 128, as many as Li et al. 2023 (arXiv:2306.03341) take.

    Args:
        source: `"package"` (prose written for this package), `"hub"` (OpenWebText), or a folder or file: `.txt`, where
            a line beginning with `# ` starts a document, or `.jsonl`, a line an object with a `text`.
        tokens: how many tokens in all.
        seed: of the draw.
        length: how many tokens of each document at most.

    Raises:
        DataError: the source cannot be read or holds less text than asked for.

    Example:
        >>> slice = text_slice(tokens=256, seed=1)
        >>> len(slice.documents), slice == text_slice(tokens=256, seed=1), slice == text_slice(tokens=256, seed=2)
        (2, True, False)
    """
    if tokens < 1 or length < 2:
        raise ValueError(f"A slice has at least 1 token, and documents of at least 2, got {tokens} and {length}.")
    chosen: list[str] = []
    left = tokens
    for document in _in_order(load_documents(source), seed):
        words = list(islice(WORD.finditer(document.text), min(length, left)))
        if len(words) > 1:
            chosen.append(document.text[: words[-1].end()])
            left -= len(words)
        if left < 2:
            return TextSlice(tuple(chosen), str(source), document_hash(chosen))
    raise DataError(f"{source} has {tokens - left} tokens in documents of up to {length}, but {tokens} were asked for.")


def load_documents(source: str | Path = "package") -> list[Document]:
    """Load all documents of a source; see `text_slice`."""
    if source == "hub":
        return _from_hub()
    path = NEUTRAL if source == "package" else Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    documents = [document for file in files for document in _from_file(file)]
    if not documents:
        raise DataError(f"{path} holds no text: it needs .txt or .jsonl files.")
    return documents


def document_hash(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def text_batches(
    text: TextSlice, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Return batches of the slice: `input_ids` and `attention_mask [B, T]`, padded on the right, and `document [B]`."""
    rows = [tokenizer(document)["input_ids"] for document in text.documents]
    return token_batches(rows, padding_of(tokenizer), batch_size)


def _in_order(documents: Iterable[Document], seed: int) -> list[Document]:
    """Shuffle documents so that every beginning of the list holds each register in proportion."""
    by_register: dict[str, list[tuple[str, Document]]] = defaultdict(list)
    for document in documents:
        key = hashlib.sha256(f"{seed} {document.text}".encode()).hexdigest()
        by_register[document.register].append((key, document))
    shares = [
        ((place + 0.5) / len(members), key, document)
        for members in by_register.values()
        for place, (key, document) in enumerate(sorted(members, key=lambda member: member[0]))
    ]
    return [document for _, _, document in sorted(shares, key=lambda share: share[:2])]


def _from_file(path: Path) -> list[Document]:
    if path.suffix not in (".txt", ".jsonl"):
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} cannot be read.") from error
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    texts = _HEADING.split(text) if path.suffix == ".txt" else [_text_of(path, *line) for line in _lines(text)]
    return [Document(text.strip(), path.stem) for text in texts if text.strip()]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip())


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise DataError(f'{path}, line {number}: it must be a JSON object with a "text".')
    return text


def _from_hub() -> list[Document]:
    from datasets import load_dataset

    try:  # the branch of plain tables that the hub keeps: the set itself is a script, which is not run any more
        rows = load_dataset("stas/openwebtext-10k", revision="refs/convert/parquet", split="train", streaming=True)
        return [Document(row["text"], "web") for row in islice(rows, _HUB_DOCUMENTS)]
    except Exception as error:  # the library raises a dozen kinds for the one fact that matters
        raise DataError(
            "OpenWebText could not be had from the Hugging Face hub; name a folder or file of text, or use "
            f'source="package" ({type(error).__name__}).'
        ) from error
