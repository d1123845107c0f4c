"""Where a batch's answers begin: at its `prompt_end`, else at its labels, for whoever gives positions the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from edits import add_offsets, edited
from tiny_models import tiny
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import save_adapter
from lightning_peft.callbacks import Steer
from lightning_peft.models import CausalLM
from lightning_peft.positions import PlainTextWarning, answering, note_batch, plain_text, track

FIRST = torch.tensor([4, 3, 5])  # of the answers' tokens, in each text
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlainTextWarning)
        yield


def conversation(tokens: Tensor, side: str) -> dict[str, Tensor]:
    """Texts of 9, 7 and 8 tokens with two answers each, of which the second begins two tokens behind the first."""
    ids, mask, labels = torch.zeros_like(tokens), torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, length in enumerate((9, 7, 8)):
        real = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[row, real], mask[row, real] = tokens[row, :length], 1
        answers = torch.arange(length) >= FIRST[row]
        answers[FIRST[row] + 1] = False
        labels[row, real] = tokens[row, :length].masked_fill(~answers, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_lm_is_edited_from_the_first_label_on(
    kind: str, side: str, tokens: Tensor, tiny_folder: Callable[[str], Path]
) -> None:
    module = CausalLM(str(tiny_folder(kind))).eval()
    stack = add_offsets(module.backbone, "answer")
    batch = conversation(tokens, side)
    real = batch["attention_mask"].bool()
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        by_labels = module(batch)[real]
        assert torch.equal(by_labels, module({**unlabelled, "prompt_end": FIRST - 1})[real])
        assert torch.equal(module._loss(batch)[0], module._loss({**batch, "prompt_end": FIRST - 1})[0])
        with plain_text(module):
            assert not torch.equal(by_labels, module(unlabelled)[real])
        with stack.disabled():
            base = module(unlabelled)
    places = (batch["attention_mask"].cumsum(-1) - 1)[real]
    row = torch.arange(3).repeat_interleave(real.sum(-1))
    moved = (by_labels != base[real]).any(-1)
    assert torch.equal(moved, places >= FIRST[row] - 1)


class OfTheUser(L.LightningModule):
    """A module that hands its backbone no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("llama")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_a_callback_gives_the_labels_of_its_batch(tokens: Tensor, tmp_path: Path) -> None:
    folder = save_adapter(edited("llama", "answer")[0], tmp_path / "edit")
    batch = conversation(tokens, "right")
    others = {"prompt_end": FIRST - 1}, {"labels": torch.tensor([0, 1, 1]), "prompt_end": FIRST - 1}
    given: list[Any] = [batch, *({**batch, **other} for other in others)]
    trainer = L.Trainer(accelerator="cpu", callbacks=[Steer(folder)], **QUIET)  # type: ignore[arg-type]
    by_labels, *by_ends = trainer.predict(OfTheUser(), DataLoader(given, batch_size=None))
    for by_end in by_ends:
        assert torch.equal(by_labels, by_end)


@torch.no_grad()
def test_labels_of_the_batch_stand_behind_what_is_known_of_the_call(tokens: Tensor) -> None:
    model, _ = edited("llama", "answer")
    batch = {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(9) < 5, -100)}
    starts = [torch.full((3,), start) for start in (0, 2, 4)]
    by_start = []
    for start in starts:
        with answering(model, start=start):
            by_start.append(model(tokens).logits)
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
    noted = note_batch([], model, batch)
    assert torch.equal(model(tokens).logits, by_start[2])
    assert torch.equal(model(tokens, labels=tokens.masked_fill(torch.arange(9) < 3, -100)).logits, by_start[1])
    with answering(model, start=starts[1]):
        assert torch.equal(model(tokens).logits, by_start[1])
    with plain_text(model):
        assert torch.equal(model(tokens).logits, by_start[0]), "another text, whatever its shape"
    again = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
    assert torch.equal(again, written), "a prompt of its own"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlainTextWarning)
        torch.testing.assert_close(model(tokens[:, :7]).logits, by_start[0][:, :7])  # of another shape
    note_batch(noted, model, None)
    assert not any(vars(track(model).known).values())


@torch.no_grad()
def test_a_row_of_the_batch_without_labels_is_not_edited(tokens: Tensor) -> None:
    model, stack = edited("llama", "answer")
    with stack.disabled():
        base = model(tokens).logits
    labels = tokens.masked_fill(torch.tensor([[False], [True], [True]]), -100)
    note_batch([], model, {"input_ids": tokens, "labels": labels})
    edited_rows = (model(tokens).logits != base).flatten(1).any(-1)
    assert edited_rows.tolist() == [True, False, False]
