"""A sweep runs from one YAML file, goes on where it was killed, and chooses on questions it is not tested on."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ab_questions import QUESTIONS, ABQuestions
from damage import DAMAGES

from lightning_peft import load_adapter, moved
from lightning_peft.cli import main
from lightning_peft.files.locking import only_writer
from lightning_peft.models import CausalLM
from lightning_peft.sweep import fit as fitting
from lightning_peft.sweep.grid import Grid
from lightning_peft.tasks import Split
from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule
from lightning_peft.truthfulqa.metrics import mc2

K, ALPHAS = [2, 5], [3.0, 20.0]
TASKS = ("truthfulqa", "own")


@pytest.fixture
def write(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[..., Path]:
    llama, gpt2 = str(tiny_folder("llama")), str(tiny_folder("gpt2"))
    questions = {"model": llama, "source": "package", "limit": 20, "num_folds": 2, "val_fraction": 0.5}
    tasks: dict[str, Any] = {
        "truthfulqa": {"class_path": "lightning_peft.truthfulqa.task.TruthfulQA", "init_args": questions},
        "own": {"class_path": "ab_questions.ABQuestions", "init_args": {"model": gpt2}},
    }

    def plan(output: str, task: str = "truthfulqa", **changes: Any) -> Path:
        path = tmp_path / f"{output}.yaml"
        values = {"name": output, "task": tasks[task], "num_heads": K, "alphas": ALPHAS, "kl_tokens": 60, "chunk": 2}
        values |= {"output": str(tmp_path / output), "device": "cpu"} | ({"few_shot": 1} if task != "own" else {})
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return plan


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_one_command_gives_table_picture_choice_and_adapter(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["sweep", "--config", str(write("whole"))])
    found = results(tmp_path / "whole")
    assert [(p["num_heads"], p["alpha"]) for p in found["points"]] == [(0, 0.0), *((k, a) for k in K for a in ALPHAS)]
    base, *points = found["points"]
    assert base["kl"]["mean"] == 0.0 and all(p["kl"]["mean"] > 0 for p in points)
    for point in points:
        for metric in ("mc0", "mc1", "mc2", "mc3"):
            gap = point["metrics"][metric]["mean"] - base["metrics"][metric]["mean"]
            assert point["difference"][metric]["mean"] == pytest.approx(gap)
    with (tmp_path / "whole" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mc2_mean"]) for row in rows] == [p["metrics"]["mc2"]["mean"] for p in found["points"]]
    assert (tmp_path / "whole" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [choice["fold"] for choice in found["chosen"]] == [0, 1]
    assert found["confirmed"]["questions"] == 20
    printed = capsys.readouterr().out
    assert "Fold 0: the highest MC2 on its validation questions" in printed and "test questions" in printed


def test_a_task_of_ones_own_gives_a_table_with_its_measures(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["sweep", "--config", str(write("own", "own", choose="surprise"))])
    sweep, printed = results(tmp_path / "own"), capsys.readouterr().out
    assert [*sweep["measures"]] == ["accuracy", "surprise"] and sweep["primary"] == "accuracy"
    assert sweep["data"] == {"label": "ABQuestions", "units": len(QUESTIONS), "folds": 2}
    heading = next(line for line in printed.splitlines() if "Right" in line)
    assert heading.split() == ["K", "α", "Right", "Surprise", "Surprise", "−", "base", "KL"]
    base = sweep["points"][0]["metrics"]
    assert f"{base['accuracy']['mean']:.2f} [" in printed and f"{base['surprise']['mean']:.3f} [" in printed
    assert "Fold 0: the lowest Surprise on its validation units is at K=" in printed
    assert "Right on the 12 test units: " in printed and "MC" not in printed


def test_its_numbers_are_those_of_the_chosen_adapter_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write("own", "own")
    main(["sweep", "--config", str(path)])
    task = ABQuestions(**yaml.safe_load(path.read_text())["task"]["init_args"])
    scores: list[dict[str, float]] = []
    for fold in range(2):
        module = task.module().eval()
        load_adapter(module.backbone, tmp_path / "own" / f"adapter-fold{fold}")
        data = task.data(Split(fold), edits=True)
        data.tokenizer, scorer = module.tokenizer, ChoiceScorer(module.backbone)
        for batch in data.test_dataloader():
            logprobs = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
            scores.append(task.choice_scores(logprobs, batch))
    expected = results(tmp_path / "own")["confirmed"]["chosen"]["metrics"]
    for name in ("accuracy", "surprise"):
        assert sum(row[name] for row in scores) / 12 == pytest.approx(expected[name]["mean"], abs=1e-4)


def test_the_chosen_adapter_alone_scores_the_test_fold_as_the_sweep_says(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("whole")
    main(["sweep", "--config", str(path)])
    options, total = yaml.safe_load(path.read_text())["task"]["init_args"], 0.0
    pretrained = options.pop("model")
    for fold in range(2):
        module = CausalLM(pretrained).eval()
        load_adapter(module.backbone, tmp_path / "whole" / f"adapter-fold{fold}")
        data = TruthfulQADataModule(**options, fold=fold, few_shot=1, tokenizer=module.tokenizer, questions_per_batch=1)
        data.setup()
        scorer = ChoiceScorer(module.backbone)
        for batch in data.test_dataloader():
            total += mc2(scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"]), batch["mc2"])
    said = results(tmp_path / "whole")["confirmed"]["chosen"]["metrics"]["mc2"]["mean"]
    assert total / 20 == pytest.approx(said, abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_killed_half_way_and_run_again_equals_an_uninterrupted_run(
    task: str, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["sweep", "--config", str(write("whole", task))])
    scores, chunks = Grid.scores, []

    def killed(grid: Grid, batches: list[dict[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
        chunks.append(1)
        for row in scores(grid, batches):
            if len(chunks) == 5:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(Grid, "scores", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["sweep", "--config", str(write("killed", task))])
    monkeypatch.undo()
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "parts").iterdir()}
    assert len(parts) >= 5 and not (tmp_path / "killed" / "results.json").exists()

    main(["sweep", "--config", str(write("killed", task))])
    assert all(path.stat().st_mtime_ns == written for path, written in parts.items()), "no finished part is repeated"
    whole, again = results(tmp_path / "whole"), results(tmp_path / "killed")
    for name in ("points", "chosen", "confirmed", "measured"):
        assert whole[name] == again[name]


@pytest.mark.parametrize(("task", "changed"), [("truthfulqa", "--task.seed=1"), ("own", "--task.limit=10")])
def test_a_finished_sweep_runs_no_model_and_another_setting_runs_anew(
    task: str, changed: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write("whole", task))
    main(["sweep", "--config", path])
    monkeypatch.setattr(Grid, "scores", lambda *_: pytest.fail("a question was scored"))
    main(["sweep", "--config", path, "--rows", "1"])
    for option in ("--alphas=[3.0, 19.0]", changed):
        with pytest.raises(pytest.fail.Exception, match="a question was scored"):
            main(["sweep", "--config", path, option])


@pytest.mark.parametrize("task", TASKS)
def test_damaged_parts_are_named_and_measured_again(
    task: str, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the release before sums too, but for a bit that is flipped in them."""
    main(["sweep", "--config", str(write("x", task))])
    whole, parts = results(tmp_path / "x"), sorted((tmp_path / "x" / "parts").iterdir())
    assert len(parts) >= 10
    for summed in (True, False):
        named = []
        for number, path in enumerate(parts):
            if not summed:
                record = json.loads(path.read_text())
                path.write_text(json.dumps({name: record[name] for name in ("of", "found")}))
            damage = [*DAMAGES, "nothing"][number % 6]
            if damage == "nothing" or (damage == "flipped" and not summed):
                continue
            DAMAGES[damage](path)
            named += [path] if damage != "deleted" else []
        capsys.readouterr()
        main(["sweep", "--config", str(write("x", task))])
        said = capsys.readouterr().out.splitlines()
        assert sum("made again" in line for line in said) == len(named)
        assert all(any(str(path) in line and "made again" in line for line in said) for path in named)
        assert results(tmp_path / "x") == whole


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_that_another_sweep_writes_to_is_one_sentence(
    task: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("x", task)
    with ThreadPoolExecutor(1) as pool, only_writer(tmp_path / "x"):
        refused = pool.submit(main, ["sweep", "--config", str(path)]).exception()
    assert isinstance(refused, SystemExit) and f"in use by process {os.getpid()} on" in str(refused)
    assert not (tmp_path / "x" / "parts").exists()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_point_is_measured_on_a_question_it_was_computed_from(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    learnt: list[set[int]] = []
    of = fitting.Statements.of

    def noted(statements: fitting.Statements, texts: Any) -> Any:
        read = of(statements, texts)
        learnt.append(set(read[2].tolist()))
        return read

    monkeypatch.setattr(fitting.Statements, "of", noted)
    path = write(split, split=split)
    main(["sweep", "--config", str(path)])
    options, folds = yaml.safe_load(path.read_text())["task"]["init_args"], []
    tokenizer = CausalLM(options.pop("model")).tokenizer
    for fold in range(2):
        data = TruthfulQADataModule(**options, fold=fold, tokenizer=tokenizer)
        data.setup()
        train, val, test = (
            {q.id for q in part} for part in (data.train_questions, data.val_questions, data.test_questions)
        )
        folds += [train | val, train] if split == "validation" else [train | val]
        assert not (train & val or (train | val) & test)
    assert learnt == folds
    assert (results(tmp_path / split)["chosen"] == []) == (split == "test"), "nothing is chosen on test questions"


def test_each_text_is_read_once(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    capture = fitting.capture_tokens

    def counted(backbone: Any, sites: Any, texts: Any) -> torch.Tensor:
        read.append(len(texts))
        return capture(backbone, sites, texts)

    monkeypatch.setattr(fitting, "capture_tokens", counted)
    main(["sweep", "--config", str(write("own", "own"))])
    assert read == [2 * len(QUESTIONS)]


def test_a_plan_of_the_release_before_gives_the_same(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("x")
    main(["sweep", "--config", str(path)])
    monkeypatch.setattr(moved, "_WARNED", set())
    with pytest.warns(FutureWarning, match=r"--data.limit is now --task.init_args.limit"):
        main(["sweep", "--config", str(path), "--data.limit=20"])
    whole, plan = results(tmp_path / "x"), yaml.safe_load(path.read_text())
    data = plan.pop("task")["init_args"]
    path.write_text(yaml.safe_dump(plan | {"model": data.pop("model"), "data": data, "choose": "mc2"}))
    parts = {part: part.stat().st_mtime_ns for part in (tmp_path / "x" / "parts").iterdir()}
    with pytest.warns(FutureWarning, match=r"is now .*Sweep\(task="):
        main(["sweep", "--config", str(path)])
    assert {part: part.stat().st_mtime_ns for part in (tmp_path / "x" / "parts").iterdir()} == parts
    again = results(tmp_path / "x")
    assert whole.pop("settings") != again.pop("settings") and whole == again
