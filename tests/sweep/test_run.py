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
from damage import DAMAGES

from lightning_peft import load_adapter
from lightning_peft.cli import main
from lightning_peft.files.locking import only_writer
from lightning_peft.models import CausalLM
from lightning_peft.sweep import fit as fitting
from lightning_peft.sweep.grid import Grid
from lightning_peft.sweep.results import Measured, best_point
from lightning_peft.sweep.settings import Sweep, check
from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule
from lightning_peft.truthfulqa.metrics import mc2

K, ALPHAS = [2, 5], [3.0, 20.0]


@pytest.fixture
def write(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[..., Path]:
    def plan(output: str, **changes: Any) -> Path:
        path = tmp_path / f"{output}.yaml"
        values: dict[str, Any] = {"name": output, "model": str(tiny_folder("llama")), "num_heads": K, "alphas": ALPHAS}
        values |= {"data": {"source": "package", "limit": 20, "num_folds": 2, "val_fraction": 0.5}, "few_shot": 1}
        values |= {"kl_tokens": 60, "chunk": 2, "output": str(tmp_path / output), "device": "cpu"}
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
        for metric in ("mc1", "mc2"):
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


def test_the_chosen_adapter_alone_scores_the_test_fold_as_the_sweep_says(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("whole")
    main(["sweep", "--config", str(path)])
    plan, total = yaml.safe_load(path.read_text()), 0.0
    for fold in range(2):
        module = CausalLM(plan["model"]).eval()
        load_adapter(module.backbone, tmp_path / "whole" / f"adapter-fold{fold}")
        data = TruthfulQADataModule(
            **plan["data"], fold=fold, few_shot=1, tokenizer=module.tokenizer, questions_per_batch=1
        )
        data.setup()
        scorer = ChoiceScorer(module.backbone)
        for batch in data.test_dataloader():
            total += mc2(scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"]), batch["mc2"])
    said = results(tmp_path / "whole")["confirmed"]["chosen"]["metrics"]["mc2"]["mean"]
    assert total / 20 == pytest.approx(said, abs=1e-4)


def test_killed_half_way_and_run_again_equals_an_uninterrupted_run(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["sweep", "--config", str(write("whole"))])
    scores, chunks = Grid.scores, []

    def killed(grid: Grid, batches: list[dict[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
        chunks.append(1)
        for row in scores(grid, batches):
            if len(chunks) == 5:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(Grid, "scores", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["sweep", "--config", str(write("killed"))])
    monkeypatch.undo()
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "parts").iterdir()}
    assert len(parts) >= 5 and not (tmp_path / "killed" / "results.json").exists()

    main(["sweep", "--config", str(write("killed"))])
    assert all(path.stat().st_mtime_ns == written for path, written in parts.items()), "no finished part is repeated"
    whole, again = results(tmp_path / "whole"), results(tmp_path / "killed")
    for name in ("points", "chosen", "confirmed", "measured"):
        assert whole[name] == again[name]


def test_a_finished_sweep_runs_no_model_and_another_setting_runs_anew(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["sweep", "--config", str(write("whole"))])
    monkeypatch.setattr(Grid, "scores", lambda *_: pytest.fail("a question was scored"))
    main(["sweep", "--config", str(write("whole")), "--rows", "1"])
    with pytest.raises(pytest.fail.Exception, match="a question was scored"):
        main(["sweep", "--config", str(write("whole")), "--alphas", "[3.0, 19.0]"])


def test_damaged_parts_are_named_and_measured_again(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the release before sums too, but for a bit that is flipped in them."""
    main(["sweep", "--config", str(write("x"))])
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
        main(["sweep", "--config", str(write("x"))])
        said = capsys.readouterr().out.splitlines()
        assert sum("made again" in line for line in said) == len(named)
        assert all(any(str(path) in line and "made again" in line for line in said) for path in named)
        assert results(tmp_path / "x") == whole


def test_a_folder_that_another_sweep_writes_to_is_one_sentence(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write("x")
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

    def noted(statements: fitting.Statements, questions: Any) -> Any:
        found = of(statements, questions)
        learnt.append(set(found[2].tolist()))
        return found

    monkeypatch.setattr(fitting.Statements, "of", noted)
    path = write(split, split=split)
    main(["sweep", "--config", str(path)])
    folds = []
    for fold in range(2):
        plan = yaml.safe_load(path.read_text())
        data = TruthfulQADataModule(**plan["data"], fold=fold, tokenizer=CausalLM(plan["model"]).tokenizer)
        data.setup()
        train, val, test = (
            {q.id for q in part} for part in (data.train_questions, data.val_questions, data.test_questions)
        )
        folds += [train, train | val] if split == "validation" else [train | val]
        assert not (train & val or (train | val) & test)
    assert learnt == folds
    assert (results(tmp_path / split)["chosen"] == []) == (split == "test"), "nothing is chosen on test questions"


def test_ties_go_to_the_smaller_divergence() -> None:
    measured = Measured([(0, 0.0), (4, 1.0), (4, 2.0), (8, 1.0)])
    scores = {0: [{"mc2": value} for value in (0.9, 0.6, 0.5, 0.6)]}
    measured.add(scores, [[0.0, 3.0, 1.0, 2.0]], [10])
    assert best_point(measured, "mc2") == (8, 1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alphas": [0.0]}, "at least one number of heads and one strength that is not 0"),
        ({"alphas": [1.0, 1.0]}, "alphas names a value twice"),
        ({"num_heads": [0, 4]}, "num_heads must be at least 1, got 0"),
        ({"direction": "sideways"}, "direction must be one of"),
        ({"positions": "all"}, "positions must lie within 'answer', got 'all'"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    given = {"name": "x", "model": "x", "num_heads": [4], "alphas": [1.0]} | changes
    with pytest.raises(ValueError, match=said):
        check(Sweep(**given))


def test_more_heads_than_the_model_has_is_one_sentence(write: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="num_heads is 999, but the model has 12 heads"):
        main(["sweep", "--config", str(write("many", num_heads=[2, 999]))])
