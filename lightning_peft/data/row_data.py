"""The base of the data modules that read rows of a file: split by group, encoded, padded into batches."""

from __future__ import annotations

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NotRequired, Protocol, Self, TypedDict, Unpack

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.data.batches import LengthGroupedSampler, as_dataset, padded, tokenizer_of
from lightning_peft.data.chat_template import encode_turn
from lightning_peft.data.continuations import as_user_turn, encode_continuation
from lightning_peft.data.files import Row, check_columns, read_rows
from lightning_peft.data.row_options import RowOptions, checked_options
from lightning_peft.files.data_error import DataError
from lightning_peft.fitting.edit import Edit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["answers", "statements"]


class Example(TypedDict):
    """A row of a batch before it is padded; integers of other names become columns of the batch too.

    Args:
        input_ids: token ids.
        labels: of each token, -100 outside what is learnt; or the class of the whole text.
        prompt_end: the position id of the last prompt token.
        label: 1 for a text that is wanted, 0 for one that is not.
        unit: the number of the row, where rows are what is tested.
        group: the same number for texts that belong together.
    """

    input_ids: list[int]
    group: int
    labels: NotRequired[list[int] | int]
    prompt_end: NotRequired[int]
    label: NotRequired[int]
    unit: NotRequired[int]


class FoldSplit(Protocol):
    """Which groups are learnt from and which are tested, as `lightning_peft.tasks.Split`."""

    fold: int
    folds: int
    seed: int
    size: int | None
    inner: bool


class RowData(L.LightningDataModule, ABC):
    """Base of the data modules over rows of a file.

    A subclass says which columns it reads (`columns`), which rows belong together (`groups`) and how a row is encoded
    (`encode`). Groups stay whole: a share of them, `val_fraction`, is held out for validation, which `test` measures
    too unless `use_split` names a fold to test.

    Batches are dicts of tensors, padded on the right: `input_ids`, `attention_mask [B, T]`, `group [B]`, and what else
    the examples have: `labels [B, T]`, `prompt_end`, `label [B]`.

    Args:
        path: what `read_rows` reads: a `.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet` file, the name of a hub dataset,
            or `"package:NAME"`.
        tokenizer: a tokenizer, or its name or folder; default the LightningModule's `tokenizer`.
        **options: see `RowOptions`.

    Attributes:
        rows: the rows that are used, after `prepare_data` or `setup`.

    Raises:
        DataError: in one sentence, with file and row, by `prepare_data` or `setup`.
    """

    cuts_long_texts: ClassVar[bool] = False  # at their end, with `max_length`; else such rows are left out

    def __init__(
        self,
        path: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        **options: Unpack[RowOptions],
    ) -> None:
        given = checked_options(type(self), options)
        super().__init__()
        self.path, self.split = str(path), given["split"]
        self.tokenizer, self.batch_size, self.num_workers = tokenizer, given["batch_size"], given["num_workers"]
        self.val_fraction, self.seed = given["val_fraction"], given["seed"]
        self.limit, self.max_length = given["limit"], given["max_length"]
        self.kind: Kind | None = None  # what training batches hold, where an argument says
        self.rows: list[Row] = []
        self._fold: FoldSplit | None = None
        self._group: list[int] = []  # of each row
        self._parts: dict[str, list[int]] = {}  # numbers of rows: "train", "val", "test"
        self._set_up_tokenizer: PreTrainedTokenizerBase | None = None
        self._long: dict[int, int] = {}  # tokens of rows that were left out or cut, by number
        self._warned: set[str] = set()  # the parts whose such rows were told

    # -- what a subclass says ----------------------------------------------------------------------------------------

    @abstractmethod
    def columns(self) -> Sequence[str]:
        """Return the columns that the file must have."""

    def check(self) -> None:
        """Raise `DataError`, with the row, for rows that cannot be used; before anything is encoded."""

    def groups(self) -> list[int]:
        """Return the group of each row, counted from 0; by default each row is its own."""
        return list(range(len(self.rows)))

    def has(self, column: str) -> bool:
        """Return whether any row has a column."""
        return any(column in row.values for row in self.rows)

    @abstractmethod
    def encode(self, row: Row, kind: Kind) -> list[Example]:
        """Return a row's examples, without `group`'s number, which is put in afterwards (any number will do).

        Args:
            row: one of `rows`.
            kind: `"answers"` to tune on and to measure losses, `"statements"` for edits, which read labelled texts.
        """

    def prompt(self, row: Row) -> str | None:
        """Return the text that the model is to answer; None where a row has none."""
        return None

    # -- rows --------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read and check the rows."""
        self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read, check and split the rows, once, and take the tokenizer."""
        self._read()
        self._set_up_tokenizer = tokenizer_of(self, self.tokenizer)

    def use_split(self, split: FoldSplit) -> Self:
        """Test a fold of the groups and learn from the others, as a comparison does; call it before `setup`.

        Args:
            split: a `lightning_peft.tasks.Split`.
        """
        self._fold, self.rows = split, []
        return self

    def prompts(self) -> list[str]:
        """Return the prompts of held-out rows, each once, as texts that the tokenizer takes, after `setup`.

        They are those of all rows where none is held out, and none where rows have no prompt.
        """
        held_out = self._parts.get("test") or self._parts.get("val") or range(len(self.rows))
        prompts = (self.prompt(self.rows[number]) for number in held_out)
        return list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))

    def read_rows(self) -> list[Row]:
        """Return all rows, as they stand in the file."""
        return read_rows(self.path, self.split)

    def _read(self) -> None:
        if self.rows:
            return
        self.rows = rows = self.read_rows()
        try:
            check_columns(rows, self.columns(), self.path)
            self.check()
            self._group = self.groups()
            if self.limit is not None:
                kept = set(self._shuffled(sorted(set(self._group)), self.seed)[: self.limit])
                self.rows = [row for row, group in zip(rows, self._group, strict=True) if group in kept]
                self._group = [group for group in self._group if group in kept]
            self._parts = self._divided()
        except BaseException:
            self.rows = []
            raise

    def _divided(self) -> dict[str, list[int]]:
        groups = list(dict.fromkeys(self._group))
        if self._fold is None:
            test, seed, rest = set[int](), self.seed, groups
        else:
            seed, folds = self._fold.seed, self._fold.folds
            if folds > len(groups):
                raise DataError(f"{self.path} has {len(groups)} groups of rows, too few for {folds} folds.")
            test = set(self._shuffled(groups, seed)[self._fold.fold :: folds])
            rest = [group for group in groups if group not in test]
        shuffled = self._shuffled(rest, seed + 1)
        count = max(1, round(self.val_fraction * len(rest))) if self.val_fraction else 0
        if count >= len(rest):
            raise DataError(
                f"{self.path} has {len(rest)} {'group' if len(rest) == 1 else 'groups'} of rows to learn from, of "
                f"which {count} would be held out: give more, or set val_fraction to 0."
            )
        val, train = set(shuffled[:count]), shuffled[count:]
        if self._fold is not None and self._fold.size is not None:
            train = train[: self._fold.size]
        if self._fold is not None and self._fold.inner:
            test = val
        parts = {"train": set(train), "val": val, "test": test if self._fold is not None else val}
        return {
            name: [number for number, group in enumerate(self._group) if group in chosen]
            for name, chosen in parts.items()
        }

    @staticmethod
    def _shuffled(groups: Sequence[int], seed: int) -> list[int]:
        return random.Random(seed).sample(list(groups), len(groups))

    # -- batches -----------------------------------------------------------------------------------------------------

    def train_kind(self) -> Kind:
        """Return what training batches hold: as `kind` says, or statements where the Trainer computes an edit."""
        if self.kind is not None:
            return self.kind
        callbacks = [] if self.trainer is None else vars(self.trainer)["callbacks"]
        return "statements" if any(isinstance(callback, Edit) for callback in callbacks) else "answers"

    def examples(self, part: Literal["train", "val", "test"], kind: Kind) -> list[Example]:
        """Return the encoded examples of a part of the rows, each with its group.

        Raises:
            DataError: a row cannot be encoded, or none is left.
        """
        made = [example for number in self._parts[part] for example in self._encoded(number, kind)]
        self._warn_of_long(part)
        if self._parts[part] and not made and part == "train":
            raise DataError(f"{self.path} has no row to train on: of {len(self._parts[part])} none is left.")
        return made

    def train_dataloader(self) -> DataLoader:
        kind = self.train_kind()
        examples = self.examples("train", kind)
        lengths = [len(example["input_ids"]) for example in examples]
        if kind == "statements":  # sorted by length, so that a batch holds little padding, whatever sampler is put in
            return self._loader(sorted(examples, key=lambda example: len(example["input_ids"])))
        return self._loader(examples, LengthGroupedSampler(lengths, self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._held_out("test")

    def predict_dataloader(self) -> DataLoader:
        prompts = self.prompts()
        if not prompts:
            raise DataError(f"{self.path} has no prompts, so there is nothing to predict.")
        return self._loader([self._asked(prompt, number) for number, prompt in enumerate(prompts)])

    def _asked(self, prompt: str, number: int) -> Example:
        """Return a prompt alone, to be answered."""
        begins = self.encoder.bos_token and prompt.startswith(self.encoder.bos_token)
        ids = list(self.encoder(prompt, add_special_tokens=not begins)["input_ids"])
        return {"input_ids": ids, "prompt_end": len(ids) - 1, "group": number}

    def _held_out(self, part: Literal["val", "test"]) -> DataLoader | list[DataLoader]:
        examples = self.examples(part, "answers")
        return self._loader(examples) if examples else []

    def _loader(self, examples: Sequence[Example], sampler: LengthGroupedSampler | None = None) -> DataLoader:
        return DataLoader(
            as_dataset(list(examples)),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Put examples into one batch, padded on the right."""
        sequences = [{n: v for n, v in example.items() if isinstance(v, list)} for example in examples]
        numbers: list[Mapping[str, object]] = [dict(example) for example in examples]
        columns = [name for name, value in numbers[0].items() if isinstance(value, int)]
        return padded(sequences, self.encoder) | {
            name: torch.tensor([number[name] for number in numbers]) for name in columns
        }

    # -- encoding ----------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was set up."""
        if self._set_up_tokenizer is None:
            raise RuntimeError(f"{type(self).__name__} has no tokenizer before setup: call setup() first.")
        return self._set_up_tokenizer

    @property
    def encoder_decoder(self) -> bool:
        """Whether batches are for an encoder-decoder, as the LightningModule's backbone is one."""
        backbone = getattr(getattr(self.trainer, "lightning_module", None), "backbone", None)
        return bool(getattr(getattr(backbone, "config", None), "is_encoder_decoder", False))

    def chat_prompt(self, prompt: str, chat: bool | None) -> str:
        """Return a prompt as a user's turn.

        Args:
            prompt: the text.
            chat: whether to use the tokenizer's chat template; default, if it has one.
        """
        has = bool(self.encoder.chat_template)
        if chat and not has:
            raise ValueError("chat is True, but the tokenizer has no chat template: leave it out, or set it to False.")
        return as_user_turn(self.encoder, prompt) if has and chat is not False else prompt

    def continued(self, prompt: str, answer: str, learnt: bool = True) -> Example:
        """Return a prompt with an answer behind it, whose tokens are the labels.

        Args:
            prompt: the text before the answer, `""` for none.
            answer: the text behind it, with the space between the two, if any.
            learnt: whether `labels` are the answer's tokens; else all are -100.

        Raises:
            ValueError: the answer adds no token.
        """
        if self.encoder_decoder:
            ids = list(self.encoder(prompt)["input_ids"])
            target = list(self.encoder(text_target=answer.strip())["input_ids"])
            return {"input_ids": ids, "labels": target if learnt else [-100] * len(target), "group": 0}
        ids, count = encode_continuation(self.encoder, prompt, answer)
        count = max(count, 1)  # the first token of all is predicted from nothing
        labels = [-100] * count + ids[count:] if learnt else [-100] * len(ids)
        return {"input_ids": ids, "labels": labels, "prompt_end": count - 1, "group": 0}

    def as_turn(self, question: str, answer: str, learnt: bool = True, end: bool = True) -> Example:
        """Return an answer as the assistant's turn in a chat, whose tokens are the labels.

        Args:
            question: the user's turn.
            answer: the assistant's.
            learnt: whether `labels` are the answer's tokens; else all are -100.
            end: with the token that ends the turn, which is to be learnt but is no part of an answer that is scored.

        Raises:
            ValueError: the tokenizer has no chat template, or it cannot write the answer; see `encode_turn`.
        """
        ids, count = encode_turn(self.encoder, [{"role": "user", "content": question}], answer, end)
        labels = [-100] * count + ids[count:] if learnt else [-100] * len(ids)
        return {"input_ids": ids, "labels": labels, "prompt_end": count - 1, "group": 0}

    def _encoded(self, number: int, kind: Kind) -> list[Example]:
        row = self.rows[number]
        try:
            examples = self.encode(row, kind)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{row.where}: {error}") from error
        for example in examples:
            example["group"] = self._group[number]
        long = [example for example in examples if len(example["input_ids"]) > (self.max_length or float("inf"))]
        if not long:
            return examples
        self._long[number] = max(len(example["input_ids"]) for example in long)
        return [self._cut(example) for example in examples] if self.cuts_long_texts else []

    def _warn_of_long(self, part: str) -> None:
        """Say once how many rows of a part were left out or cut."""
        long = [number for number in self._parts[part] if number in self._long]
        if not long or part in self._warned:
            return
        self._warned.add(part)
        number = max(long, key=self._long.__getitem__)
        done = "cut at their end" if self.cuts_long_texts else "left out"
        warnings.warn(
            f"{len(long)} of {len(self._parts[part])} {part} rows of {self.path} have more tokens than "
            f"max_length={self.max_length} and are {done}; the longest is {self.rows[number].where}, of "
            f"{self._long[number]} tokens.",
            stacklevel=3,
        )

    def _cut(self, example: Example) -> Example:
        example["input_ids"] = example["input_ids"][: self.max_length]
        if isinstance(labels := example.get("labels"), list):
            example["labels"] = labels[: self.max_length]
        return example


def numbered(keys: Sequence[object]) -> list[int]:
    """Return the number of each key, equal ones alike, counted in the order in which they come.

    Example:
        >>> numbered(["b", "a", "b"])
        [0, 1, 0]
    """
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def normal(text: str) -> str:
    """Return a text as it is compared with others: without regard to case and spaces."""
    return " ".join(text.split()).casefold()


def check_kind(kind: str | None) -> None:
    """Raise `ValueError` for an argument `train` that there is not."""
    if kind not in (None, "answers", "statements"):
        raise ValueError(f'train must be "answers" or "statements", or be left out, got {kind!r}.')
