"""A task of choices keeps columns as any does, and its rows may score choices otherwise."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tuning import trainer

from lightning_peft.compare.plan import Plan, Row
from lightning_peft.compare.run import run
from lightning_peft.models import CausalLM
from lightning_peft.tasks import CellRecords
from lightning_peft.tasks.choice_units import ChoiceUnitScores
from lightning_peft.tasks.choices import ChoiceRecords
from lightning_peft.tasks.decoding import DoLaScoring
from lightning_peft.truthfulqa import SideEffects
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore")
EFFECTS = SideEffects(tokens=0, capability=0)


class Plain(TruthfulQA):
    """The benchmark's questions as a task of one's own has them: columns, and no sections."""

    sections = ()

    @property
    def records(self) -> CellRecords:
        return ChoiceRecords(self)


def rows() -> list[Row]:
    scoring = DoLaScoring([1, 2])
    return [Row("base", "", "base"), Row("dola", "", "decoded", scoring=scoring), Row("few", "", "prompt", few_shot=2)]


def test_choices_are_scored_otherwise_on_any_task_of_choices(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    found = {}
    for kind in (TruthfulQA, Plain):
        task = kind(str(tiny_folder("llama")), limit=12, side_effects=EFFECTS)
        plan = Plan("x", rows(), task, str(tmp_path / kind.__name__), accelerator="cpu")
        results = run(plan, console=Console(file=io.StringIO()))
        assert not any(row["failed"] for row in results["rows"])
        found[kind] = {row["method"]: row["metrics"] for row in results["rows"]}
    assert found[Plain]["dola"]["mc2"] != found[Plain]["base"]["mc2"]
    for name in ("base", "dola", "few"):
        for measure in ("mc0", "mc1", "mc2", "mc3"):
            values = [found[kind][name][measure]["mean"] for kind in (TruthfulQA, Plain)]
            assert values[0] == pytest.approx(values[1], abs=1e-5)


class Unit(L.LightningDataModule):
    """A unit's two answers, in a batch each or in one."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def test_dataloader(self) -> DataLoader:
        ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
        labels = ids.masked_fill(torch.arange(3) < 2, -100)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        whole["group"] = torch.tensor([3, 3])
        parts = [whole] if self.whole else [{name: rows[i : i + 1] for name, rows in whole.items()} for i in range(2)]
        return DataLoader(parts, batch_size=None)


def test_a_unit_whose_answers_are_in_two_batches_is_refused_and_the_step_is_back(
    tiny_folder: Callable[[str], Path],
) -> None:
    module = CausalLM(str(tiny_folder("llama")))
    scores = ChoiceUnitScores(lambda logprobs, batch: {"best": float(logprobs.max())})
    with pytest.raises(ValueError, match=r"^Unit 3 is in two test batches"):
        trainer(scores).test(module, Unit(whole=False), verbose=False)
    assert "test_step" not in vars(module)


class Wrapped(L.LightningModule):
    """A module of one's own around a model that peft has wrapped."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        raise AssertionError("the task scores answers itself")


def test_what_peft_has_put_around_a_model_counts(tiny_folder: Callable[[str], Path]) -> None:
    best = []
    for tokens in (0, 3):
        torch.manual_seed(0)
        model: nn.Module = CausalLM(str(tiny_folder("llama"))).backbone
        if tokens:
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
            model = get_peft_model(model, config)  # type: ignore[arg-type]
        scores = ChoiceUnitScores(lambda logprobs, batch: {"best": float(logprobs.max())})
        trainer(scores).test(Wrapped(model), Unit(whole=True), verbose=False)
        best.append(scores.columns["best"][3])
    assert best[0] != best[1]
