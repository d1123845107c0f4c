"""What a callback needs is looked for in the batch, and one sentence shows how to make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from statements import trainer
from transformers import PreTrainedTokenizerBase

from lightning_peft.callbacks import ITI, LoRA
from lightning_peft.fitting.batch_keys import check_keys, check_learnable
from lightning_peft.models import CausalLM
from lightning_peft.truthfulqa import TruthfulQADataModule

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"label": 1},
            r"^ITI needs input_ids, label, but the training batch has no input_ids: input_ids is the ",
        ),
        (torch.zeros(2), r"has no input_ids and no label: input_ids is .*; label is `torch\.tensor\(\[1, 0, …\]\)`"),
        ([1, 2], r"has no input_ids and no label: "),
    ],
)
def test_a_missing_key_is_one_sentence_that_shows_how_to_make_it(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_keys("ITI", ("input_ids", "label"), batch)


def test_a_batch_with_all_keys_or_without_need_of_any_passes() -> None:
    check_keys("ITI", ("input_ids",), {"input_ids": 1, "more": 2})
    check_keys("LoRA", (), [torch.zeros(2)])


@pytest.mark.parametrize(
    ("labels", "loss", "refused"),
    [(-100, float("nan"), True), (-100, 1.0, False), (3, float("nan"), False)],
)
def test_only_a_batch_without_labels_and_without_a_loss_is_refused(labels: int, loss: float, refused: bool) -> None:
    batch = {"labels": torch.full((2, 3), labels)}
    if not refused:
        return check_learnable("LoRA", batch, torch.tensor(loss))
    with pytest.raises(ValueError, match=r"^LoRA has nothing to learn from the training batch, in which all labels "):
        check_learnable("LoRA", batch, torch.tensor(loss))


@pytest.mark.parametrize(
    ("callback", "train", "message"),
    [
        (LoRA(r=2), "statements", r"^LoRA has nothing to learn .* all labels are -100: let labels be the tokens of "),
        (
            ITI(num_heads=3),
            "answers",
            r"^Statements of both classes are needed, .* \[1\]: let the training data hold texts that are not",
        ),
    ],
)
def test_truthfulqas_other_training_data_are_refused_before_anything_is_learnt(
    tiny_folder: Callable[[str], Path],
    tiny_tokenizer: PreTrainedTokenizerBase,
    callback: Any,
    train: Any,
    message: str,
) -> None:
    module = CausalLM(str(tiny_folder("llama")))
    data = TruthfulQADataModule("package", train, limit=12, primer="", tokenizer=tiny_tokenizer)
    run = trainer(callback)
    with pytest.raises(ValueError, match=message):
        run.fit(module, data)
    assert run.global_step == 0
