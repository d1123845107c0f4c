"""The batch's `prompt_end` is where its prompts end, or one sentence says what is wrong with it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import tiny
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.callbacks import HeadOffsets, LoRA
from lightning_peft.prompt_end import prompt_end

IDS = torch.arange(3, 15).reshape(2, 6)
LABELS = IDS.masked_fill(torch.arange(6) < 4, -100)
LEFT = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def batch(end: Any, **more: Tensor) -> dict[str, Any]:
    return {"input_ids": IDS, "prompt_end": end, **more}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (batch(torch.tensor([3, 3]), labels=LABELS), [3, 3]),
        (batch(torch.tensor([3, 1]), labels=LABELS, attention_mask=LEFT), [3, 1]),
        (batch(torch.tensor([3, 3]), labels=LABELS.masked_fill(torch.tensor([[False], [True]]), -100)), [3, 3]),
        (batch(torch.tensor([3, 2]), labels=torch.tensor([0, 1])), [3, 2]),
        (batch(torch.tensor([13, 13]), labels=LABELS, position_ids=torch.arange(10, 16).expand(2, 6)), [13, 13]),
        ({"input_ids": IDS}, None),
        ([IDS], None),
    ],
)
def test_ends_that_fit_the_batch_are_returned(given: Any, expected: list[int] | None) -> None:
    ends = prompt_end(given)
    assert (None if ends is None else ends.tolist()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (batch(torch.tensor([3, 269])), r"^prompt_end is 269 in row 1, whose tokens have the positions 0 to 5: give "),
        (batch(torch.tensor([-1, 3])), r"^prompt_end is -1 in row 0, "),
        (batch(torch.tensor([3, 4]), attention_mask=LEFT), r"^prompt_end is 4 in row 1, .* positions 0 to 3: give "),
        (
            batch(torch.tensor([3, 2]), labels=LABELS),
            r"^prompt_end is 2 in row 1, but its labels begin after position 3",
        ),
        (batch(torch.tensor([3])), r"^prompt_end has 1 values for 2 rows of input_ids; give one a row\.$"),
        (batch([3, 3]), r"^prompt_end must be a tensor of integers, one a row of the batch, got .* list\.$"),
        (batch(torch.tensor([[3], [3]])), r"got one that is of shape \[2, 1\], torch\.int64\.$"),
        (batch(torch.tensor([3.0, 3.0])), r"torch\.float32\.$"),
        (
            {"input_ids": IDS, "answer_start": torch.tensor([3, 3])},
            r"^The batch has a field 'answer_start', .*'prompt_end'",
        ),
        (batch(torch.tensor([3, 3]), answer_start=torch.tensor([3, 3])), r"^The batch has a field 'answer_start'"),
    ],
)
def test_ends_that_do_not_fit_are_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_end(given)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("llama")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch["input_ids"], labels=LABELS).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def fit(callback: Any, **fields: Any) -> float:
    """How far training moved the adapter."""
    module = Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(callbacks=[callback], max_steps=1, accelerator="cpu", **quiet)
    trainer.fit(module, DataLoader([{"input_ids": IDS, **fields}], batch_size=None))
    return float(sum(p.norm() for p in module.parameters() if p.requires_grad))


def test_training_reads_the_batch() -> None:
    assert fit(HeadOffsets(positions="answer"), prompt_end=torch.tensor([3, 3])) > 0
    with pytest.raises(ValueError, match=r"^The batch has a field 'answer_start'"):
        fit(HeadOffsets(positions="answer"), answer_start=torch.tensor([269, 269]))


def test_an_adapter_without_positions_leaves_such_fields_alone() -> None:
    assert fit(LoRA(r=2), answer_start=[[269], [269]], prompt_end="none of ours") > 0
