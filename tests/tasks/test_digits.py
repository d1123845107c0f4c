"""A task of one's own is compared on in little more than its own lines: head, biases and LoRA on digits."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from digits import Batch, Data, Digits, DigitTask, FunctionTask, Head, images
from rich.console import Console
from sklearn.metrics import f1_score, matthews_corrcoef

from lightning_peft.callbacks import LTSFT, BitFit, LoRA
from lightning_peft.compare import run as running
from lightning_peft.compare import statistics
from lightning_peft.compare.cell import cell_of
from lightning_peft.compare.page import write_html
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.compare.sections import section_views
from lightning_peft.compare.terminal import table
from lightning_peft.compare.verdict import verdict
from lightning_peft.tasks import Measure, Section, Split, UnitScores

pytestmark = pytest.mark.filterwarnings("ignore")
TAKEN = ("target", "prediction")
SHORT: dict[str, Any] = {"learning_rates": [1e-2, 3e-3], "max_epochs": 4}


def rows() -> list[Row]:
    lora = LoRA(r=8, alpha=16, backbone="backbone", target_modules=["0", "3", "7"])
    return [
        Row("base", "As pretrained", "base"),
        Row("head", "Head alone", "tuned", Head(), **SHORT),
        Row("bitfit", "BitFit", "tuned", BitFit(backbone="backbone"), **SHORT),
        Row("lora", "LoRA", "tuned", lora, **SHORT),
    ]


def run(plan: Plan) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=500)
    results = running.run(plan, console=console)
    return results, console.file.getvalue()


def plan_of(folder: Path, task: DigitTask | None = None, some: list[Row] | None = None) -> Plan:
    return Plan("digits", rows() if some is None else some, task or DigitTask(), str(folder), accelerator="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, dict[str, Any]]:
    plan = plan_of(tmp_path_factory.mktemp("digits") / "run")
    return plan, run(plan)[0]


def by_name(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in results["rows"]}


def predictions(plan: Plan, name: str) -> dict[str, dict[int, float]]:
    """Each unit's columns by the module that a cell has saved, tested anew."""
    row, columns = next(row for row in plan.rows if row.name == name), {}
    for fold in range(2):
        cell = cell_of(plan, row, fold, Path(str(plan.output)) / "cells" / f"{name}-fold{fold}")
        scores = UnitScores()
        cell.test(cell.adapted(), plan.task.data(cell.split), scores)
        for column, values in scores.columns.items():
            columns.setdefault(column, {}).update(values)
    return columns


def test_every_image_is_tested_once_and_has_an_interval(made: tuple[Plan, dict[str, Any]]) -> None:
    results = made[1]
    assert [row["failed"] for row in results["rows"]] == [None] * 4
    assert results["data"] == {"label": "DigitTask", "units": 300, "folds": 2}
    assert results["primary"] == "accuracy" and list(results["measures"]) == ["accuracy", "nll"]
    for row in results["rows"]:
        assert list(row["metrics"]) == ["accuracy", "nll"]
        assert all(value["low"] <= value["mean"] <= value["high"] for value in row["metrics"].values())
    found = by_name(results)
    for name in ("head", "bitfit", "lora"):
        accuracy = found[name]["difference"]["accuracy"]
        assert accuracy["low"] > 0 and accuracy["mde"] > 0 and found[name]["difference"]["nll"]["high"] < 0
        gap = found[name]["metrics"]["accuracy"]["mean"] - found["base"]["metrics"]["accuracy"]["mean"]
        assert accuracy["mean"] == pytest.approx(gap)
    assert found["lora"]["metrics"]["accuracy"]["mean"] > found["head"]["metrics"]["accuracy"]["mean"]


@pytest.mark.parametrize("name", ["base", "head", "lora"])
def test_what_a_cell_saved_gives_its_numbers_again(made: tuple[Plan, dict[str, Any]], name: str) -> None:
    plan, results = made
    columns = predictions(plan, name)
    units, metrics = sorted(columns["target"]), by_name(results)[name]["metrics"]
    assert units == sorted(images()[3].tolist())
    assert metrics["accuracy"]["mean"] == pytest.approx(sum(columns["accuracy"].values()) / 300)


def test_a_function_of_all_predictions_has_an_interval_and_a_paired_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("function_interval", "function_difference"):
        monkeypatch.setattr(statistics, name, partial(getattr(statistics, name), resamples=100))
    plan = plan_of(tmp_path, FunctionTask(), rows()[:2])
    results, _ = run(plan)
    found, values = by_name(results), {}
    for name, row in found.items():
        columns = predictions(plan, name)
        target, prediction = ([columns[column][unit] for unit in sorted(columns[column])] for column in TAKEN)
        values[name] = (
            f1_score(target, prediction, average="macro", zero_division=0),
            matthews_corrcoef(target, prediction),
        )
        assert (row["metrics"]["f1"]["mean"], row["metrics"]["mcc"]["mean"]) == pytest.approx(values[name])
        for measure in ("f1", "mcc"):
            assert row["metrics"][measure]["low"] < row["metrics"][measure]["mean"] < row["metrics"][measure]["high"]
    for place, measure in enumerate(("f1", "mcc")):
        difference = found["head"]["difference"][measure]
        assert difference["mean"] == pytest.approx(values["head"][place] - values["base"][place])
        assert difference["low"] > 0 and difference["mde"] is None


def test_what_is_trained_outside_the_backbone_is_counted_and_saved(made: tuple[Plan, dict[str, Any]]) -> None:
    plan, results = made
    found, head = by_name(results), 64 * 5 + 5
    assert found["base"]["trainable_parameters"] == found["base"]["adapter_bytes"] == 0
    assert found["head"]["trainable_parameters"] == head and found["head"]["adapter_bytes"] == 4 * head
    assert found["bitfit"]["trainable_parameters"] == head + 16 + 32 + 64
    cells = Path(str(plan.output)) / "cells"
    assert not (cells / "head-fold0" / "adapter").exists() and (cells / "head-fold0" / "outside.safetensors").exists()


def test_terminal_page_and_verdict_show_it(made: tuple[Plan, dict[str, Any]], tmp_path: Path) -> None:
    results = json.loads((Path(str(made[0].output)) / "results.json").read_text())
    console = Console(file=io.StringIO(), width=160)
    console.print(table(results))
    shown = console.file.getvalue()
    page = write_html(results, tmp_path / "report.html").read_text()
    assert all(word in text for text in (shown, page) for word in ("Accuracy", "NLL", "LoRA"))
    assert "LoRA has the highest Accuracy" in verdict(results)[0]


def test_a_finished_comparison_computes_nothing_again(
    made: tuple[Plan, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "run_cell", lambda *_: pytest.fail("a finished cell was computed again"))
    again, said = run(plan_of(Path(str(made[0].output))))  # a plan made anew, as another process would
    assert again == made[1] and said.count("finished before") == 8


def test_a_damaged_cell_is_named_and_computed_again(made: tuple[Plan, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(str(made[0].output), tmp_path / "run")
    damaged = tmp_path / "run" / "cells" / "head-fold1" / "outside.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again, said = run(plan_of(tmp_path / "run"))
    assert f"{damaged} has" in said and said.count("finished before") == 7
    assert by_name(again)["head"]["metrics"] == by_name(made[1])["head"]["metrics"]


class Other(DigitTask):
    """The same task with an argument and a hash of its data."""

    def __init__(self, label: str = "a") -> None:
        self.label, self.hash = label, 1

    def depends_on(self) -> int:
        return self.hash


@pytest.mark.parametrize("change", ["argument", "data", "nothing"])
def test_a_changed_task_is_computed_again(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plan_of(tmp_path, Other(), rows()[:1]))
    task = Other("b" if change == "argument" else "a")
    task.hash = 2 if change == "data" else 1
    assert run(plan_of(tmp_path, task, rows()[:1]))[1].count("finished before") == (2 if change == "nothing" else 0)


class Fails(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise RuntimeError("no training here")


def test_a_row_that_fails_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    first, second = rows()[:2]
    some = [first, Row("bad", "Bad", "tuned", Fails(), **SHORT), second]
    results, said = run(plan_of(tmp_path, some=some))
    found = by_name(results)
    assert found["bad"]["failed"] == "RuntimeError: no training here" and not found["bad"]["metrics"]
    assert not found["head"]["failed"] and "failed: RuntimeError: no training here" in said
    assert run(plan_of(tmp_path, some=some))[1].count("finished before") == 4


class ByNLL(DigitTask):
    """The same, ranked by a measure of which less is better."""

    primary = "nll"


def test_a_primary_measure_may_be_the_better_the_lower(tmp_path: Path) -> None:
    results, _ = run(plan_of(tmp_path, ByNLL(), rows()[:2]))
    assert results["primary"] == "nll" and "Head alone has the lowest NLL" in verdict(results)[0]


def test_an_adapter_may_lie_on_another_with_its_head(tmp_path: Path) -> None:
    lora = rows()[3].callback
    some = [rows()[0], rows()[1], Row("both", "Head, then LoRA", "stack", lora, after="head", **SHORT)]
    results, _ = run(plan_of(tmp_path, some=some))
    found = by_name(results)
    assert not found["both"]["failed"], found["both"]["failed"]
    assert [(c["a"], c["b"], c["metric"]) for c in results["contrasts"]] == [("both", "head", "accuracy")]
    losses = found["both"]["chosen"]["trials"][0][0]["val_losses"]
    assert min(losses) < found["head"]["chosen"]["trials"][0][0]["val_losses"][0]


def test_what_is_kept_of_a_method_in_phases_is_of_its_last_one_however_much_worse(tmp_path: Path) -> None:
    sparse = LTSFT(density=0.05, full_epochs=5, backbone="backbone")
    some = [rows()[0], Row("sparse", "LT-SFT", "tuned", sparse, learning_rates=[0.1], max_epochs=6, patience=1)]
    results, _ = run(plan_of(tmp_path, some=some))
    found, head = by_name(results)["sparse"], 325
    entries = sum(parameter.numel() for parameter in DigitTask().module().backbone.parameters())
    losses = found["chosen"]["trials"][0][0]["val_losses"]
    assert len(losses) == 6  # patience counts in the last phase alone
    assert min(losses) < losses[-1] and found["chosen"]["epochs"] == [6, 6]
    assert found["trainable_parameters"] == int(0.05 * entries) + head


# -- what cannot be compared on ---------------------------------------------------------------------------------------


class Changed(Digits):
    """Returns something else."""

    change: ClassVar[dict[str, Any]] = {}

    def test_step(self, batch: Batch, batch_idx: int) -> Any:
        outputs = {**super().test_step(batch, batch_idx), **self.change}
        return {name: value for name, value in outputs.items() if value is not None}


def task_of(module: type[Digits], **attributes: Any) -> DigitTask:
    def make(self: DigitTask) -> Digits:
        fresh = DigitTask.module(self)
        fresh.__class__ = module
        return fresh

    return type("Mine", (DigitTask,), {"module": make, **attributes})()


def function_task(module: type[Digits]) -> DigitTask:
    return task_of(module, measures=FunctionTask.measures)


def returning(**change: Any) -> type[Digits]:
    return type("Mine", (Changed,), {"change": change})


class Together(Data):
    """Tests the same units in every fold."""

    def __init__(self, split: Split, batch_size: int = 32) -> None:
        super().__init__(replace(split, fold=0), batch_size)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (task_of(Digits, measures={}), r"^Mine has no measures: set `measures`"),
        (task_of(Digits, primary="auroc"), r"^The primary measure of Mine is 'auroc', but it measures accuracy, nll"),
        (task_of(Digits, folds=1), r"^folds of Mine must be at least 2, so that tests are on unseen images, got 1\.$"),
        (
            task_of(returning(nll=None)),
            r"^test_step does not return the measure 'nll' \[B\]; it returns 'unit' \[32\],",
        ),
        (task_of(returning(accuracy=0.5)), r"must return the measure 'accuracy' \[B\]; it returns a float for 32"),
        (function_task(returning(target=None)), r"does not return 'target', which 'f1' takes \[B\]"),
        (task_of(returning(unit=None)), r"^Mine.test_step must return a dict with the number of each unit"),
    ],
)
def test_a_task_that_cannot_be_measured_is_one_sentence_before_anything_is_trained(
    task: DigitTask, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(plan_of(tmp_path, task))
    assert not (tmp_path / "cells").exists()


def test_a_module_without_a_learning_rate_is_one_sentence(tmp_path: Path) -> None:
    class Fixed(Digits):
        @property
        def learning_rate(self) -> float:
            raise AttributeError("learning_rate")

        @learning_rate.setter
        def learning_rate(self, rate: float) -> None: ...

    with pytest.raises(ValueError, match=r"^Fixed has no attribute learning_rate for a row to set"):
        run(plan_of(tmp_path, task_of(Fixed)))


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"few_shot": 3}, "Row 'x' sets few_shot, which DigitTask.data does not take"),
        ({"few_shot": 3, "draws": 2}, "Row 'x' sets draws and few_shot, which DigitTask.data does not take"),
    ],
)
def test_an_option_that_the_task_does_not_take_is_one_sentence(
    option: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    some = [rows()[0], Row("x", "X", "tuned", Head(), learning_rates=[1e-3], **option)]
    with pytest.raises(ValueError, match=sentence):
        run(plan_of(tmp_path, some=some))


def test_a_batch_size_is_given_to_the_data_where_a_row_sets_one(tmp_path: Path) -> None:
    plan, head = plan_of(tmp_path), rows()[1]
    for size, expected in ((None, 32), (7, 7)):
        cell = cell_of(plan, replace(head, batch_size=size), 0, tmp_path)
        assert plan.task.data(cell.split, **cell.options_of(0)).batch_size == expected


def test_scores_that_are_not_finite_are_a_failure_that_names_the_unit(tmp_path: Path) -> None:
    class Diverging(Digits):
        def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
            outputs = super().test_step(batch, batch_idx)
            outputs["nll"] = outputs["nll"].where(torch.tensor(batch_idx < 2), torch.tensor(float("nan")))
            return outputs

    results, _ = run(plan_of(tmp_path, task_of(Diverging), rows()[:1]))
    assert (
        "of image" in results["rows"][0]["failed"] and "is nan: scores must be finite" in results["rows"][0]["failed"]
    )


def test_a_unit_in_two_folds_is_a_failure_that_names_it(tmp_path: Path) -> None:
    task = task_of(Digits, data=lambda self, split, *, batch_size=32: Together(split, batch_size))
    results, _ = run(plan_of(tmp_path, task, rows()[:1]))
    assert "150 images are tested in fold 0 and in fold 1" in results["rows"][0]["failed"]


def test_rows_tested_on_other_units_fail(tmp_path: Path) -> None:
    def fewer(self: DigitTask, split: Split, *, batch_size: int = 32) -> Data:
        data = Data(split, batch_size)
        data.test = data.test[: 150 if batch_size == 32 else 149]
        return data

    some = [rows()[0], replace(rows()[1], batch_size=16)]
    results, _ = run(plan_of(tmp_path, task_of(Digits, data=fewer), some))
    failed = by_name(results)["head"]["failed"]
    assert "'head' was tested on 149 images of fold 0 and 'base' on 150, of which 149 are the same" in failed


# -- what a task may have besides -------------------------------------------------------------------------------------


class Confidence(Section):
    name, title = "confidence", "Confidence"
    measures: ClassVar[dict[str, Measure]] = {"nll": Measure("NLL", "nats an image", -1)}


class WithSection(DigitTask):
    measures: ClassVar[dict[str, Measure]] = {"accuracy": Measure("Accuracy", "share right", range=(0, 1))}

    @property
    def sections(self) -> list[Section]:
        return [Confidence()]


def test_a_section_of_columns_is_a_name_a_title_and_measures(tmp_path: Path) -> None:
    results, _ = run(plan_of(tmp_path, WithSection(), rows()[:2]))
    assert list(results["measures"]) == ["accuracy"]
    (section,) = results["sections"]
    assert (section["title"], list(section["measures"])) == ("Confidence", ["nll"])
    assert by_name(results)["head"]["difference"]["nll"]["high"] < 0
    (view,) = section_views(results)
    assert [column["label"] for column in view["columns"]] == ["NLL"] and len(view["rows"]) == 2


def test_scores_of_several_draws_are_means_and_all_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("function_interval", "function_difference"):
        monkeypatch.setattr(statistics, name, partial(getattr(statistics, name), resamples=20))
    drawn: list[int] = []

    class Drawn(FunctionTask):
        def data(self, split: Split, *, few_shot: int = 0, draw: int = 0) -> Data:
            drawn.append(draw)
            return Data(split, 32)

        def scores(self) -> UnitScores:
            return Shifted()

    class Shifted(UnitScores):
        """Predictions that are wrong for every second image in draws other than the first."""

        def on_test_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            outputs = dict(rest[1])
            if drawn[-1]:
                wrong = outputs["unit"] % 2 == 0
                outputs["prediction"] = outputs["prediction"].where(~wrong, (outputs["target"] + 1) % 5)
                outputs["accuracy"] = (outputs["prediction"] == outputs["target"]).float()
            super().on_test_batch_end(trainer, rest[0], outputs, *rest[2:])

    some = [rows()[0], Row("drawn", "Drawn", "prompt", few_shot=1, draws=2)]
    results, _ = run(plan_of(tmp_path, Drawn(), some))
    row = by_name(results)["drawn"]
    assert not row["failed"] and {*drawn} == {0, 1}
    for name in ("accuracy", "f1", "mcc"):
        first, second = row["draws"][name]
        assert first > second and row["metrics"][name]["mean"] == pytest.approx((first + second) / 2)
        assert row["difference"][name]["mean"] == pytest.approx((second - first) / 2)
        assert by_name(results)["base"]["metrics"][name]["mean"] == pytest.approx(first)


def test_a_function_that_gives_nothing_is_said_and_loses_no_other_measure(tmp_path: Path) -> None:
    def undefined(target: Any, prediction: Any) -> float:
        raise ZeroDivisionError("nothing to divide")

    measures = DigitTask.measures | {"f1": Measure("F1", "mean of F1", columns=TAKEN, function=undefined)}
    results, _ = run(plan_of(tmp_path, task_of(Digits, measures=measures), rows()[:2]))
    assert all(list(row["metrics"]) == ["accuracy", "nll"] and not row["failed"] for row in results["rows"])
    assert [caveat.split("(")[0] for caveat in results["caveats"]] == [
        "As pretrained: F1 could not be computed ",
        "Head alone: F1 could not be computed ",
    ]
