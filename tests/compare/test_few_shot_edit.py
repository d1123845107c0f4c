"""A row may be prompted with demonstrations and edited: the edit of the statements, at the answer only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny

from lightning_peft import load_adapter
from lightning_peft.callbacks import ITI
from lightning_peft.compare.cell import run_cell
from lightning_peft.compare.plan import Plan, Row, check
from lightning_peft.positions import answering
from lightning_peft.truthfulqa import TruthfulQADataModule
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore")
SHOTS = 5


def iti(**options: Any) -> ITI:
    return ITI(**({"num_heads": 3, "alpha": 5.0} | options))


@pytest.fixture(scope="module")
def cells(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Log-probabilities of each row, and where its adapter is."""
    rows = [
        Row("base", "", "base"),
        Row("few_shot", "", "prompt", few_shot=SHOTS),
        Row("iti", "", "edited", iti()),
        Row("both", "", "edited", iti(), few_shot=SHOTS),
        Row("nothing", "", "edited", iti(alpha=0.0), few_shot=SHOTS),
        Row("reference", "", "edited", iti(reference=True), few_shot=SHOTS),
    ]
    plan = Plan("few", rows, TruthfulQA(str(tiny_folder("llama")), "package", limit=12), accelerator="cpu")
    check(plan)
    folder = tmp_path_factory.mktemp("cells")
    found = {row.name: run_cell(plan, row, 0, folder / row.name, {})["samples"] for row in rows}
    return {"folder": folder} | {name: torch.tensor([s["logprob"] for s in each]) for name, each in found.items()}


def test_demonstrations_and_edit_both_count(cells: dict[str, Any]) -> None:
    for other in ("base", "few_shot", "iti"):
        assert bool(((cells["both"] - cells[other]).abs() > 1e-3).all())


def test_an_edit_of_strength_zero_is_the_prompt_alone(cells: dict[str, Any]) -> None:
    assert torch.equal(cells["nothing"], cells["few_shot"])


def test_the_edit_is_that_of_the_statements_whatever_the_prompt(cells: dict[str, Any]) -> None:
    alone, both = (load_file(next((cells["folder"] / name).rglob("*.safetensors"))) for name in ("iti", "both"))
    assert alone.keys() == both.keys() and all(torch.equal(alone[key], both[key]) for key in alone)


def test_the_authors_edit_can_be_a_row(cells: dict[str, Any]) -> None:
    assert bool(cells["reference"].isfinite().all()) and not torch.equal(cells["reference"], cells["both"])


def test_demonstrations_are_read_unedited(cells: dict[str, Any], tiny_tokenizer: Any) -> None:
    """Every score is that of one whole text, edited from its last prompt token on."""
    model = tiny("llama")
    load_adapter(model, cells["folder"] / "both" / "adapter")
    data = TruthfulQADataModule("package", limit=12, tokenizer=tiny_tokenizer, few_shot=SHOTS)
    data.setup()
    expected = []
    for batch in data.test_dataloader():
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            first = int((labels != -100).nonzero()[0])
            with torch.no_grad(), answering(model, start=torch.tensor([first - 1])):
                logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            expected.append(logprobs[first - 1 : -1].gather(1, ids[first:, None]).sum())
    torch.testing.assert_close(cells["both"], torch.stack(expected), atol=1e-3, rtol=0)
