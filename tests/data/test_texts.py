"""Every token of a text is learnt once, however it is parted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_templates import chat_tokenizer

from lightning_peft.data import Texts
from lightning_peft.files.data_error import DataError
from lightning_peft.prompt_end import prompt_end

TEXTS = ["Hello you.", "It is so, and you are here, and what is it that you are?", "Hm."]


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(tmp_path / "my.jsonl")


@pytest.mark.parametrize("max_length", [None, 2, 5, 8])
def test_every_token_but_a_text_s_first_is_learnt_once(path: str, max_length: int | None) -> None:
    tokenizer = chat_tokenizer(None)
    data = Texts(path, tokenizer, max_length=max_length, val_fraction=0.0)
    data.setup()
    learnt: dict[int, list[int]] = {}
    for example in data.examples("train", "answers"):
        assert len(example["input_ids"]) <= (max_length or 1000)
        learnt.setdefault(example["group"], []).extend(token for token in example["labels"] if token != -100)
    for group, text in enumerate(TEXTS):
        assert learnt[group] == [*tokenizer(text)["input_ids"][1:], tokenizer.eos_token_id]


def test_batches_have_labels_behind_the_first_token_and_no_padding_among_them(path: str) -> None:
    data = Texts(path, chat_tokenizer(None), val_fraction=0.0)
    data.setup()
    (batch,) = data.train_dataloader()
    assert torch.equal(prompt_end(batch), torch.zeros(3, dtype=torch.long))
    assert torch.equal(batch["labels"][:, 1:] != -100, batch["attention_mask"][:, 1:].bool())
    assert data.prompts() == []


def test_a_text_that_is_missing_is_told_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text("text,other\nHello,1\n,2\n")
    with pytest.raises(DataError, match=r"my\.csv, row 2: 'text' is empty"):
        Texts(str(tmp_path / "my.csv")).prepare_data()
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        Texts(str(tmp_path / "my.csv"), max_length=1)
