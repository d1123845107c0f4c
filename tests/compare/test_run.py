"""A comparison runs from one YAML file, survives being killed, and tells failures from results."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tuning import ROOT

from lightning_peft.cli import main
from lightning_peft.stack.adapter_files.folder import read_folder
from lightning_peft.truthfulqa import read_samples

LORA = {"class_path": "lightning_peft.callbacks.LoRA", "init_args": {"r": 2}}


def iti(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning_peft.callbacks.ITI", "init_args": {"num_heads": 3, "alpha": 5.0} | arguments}


ROWS: list[dict[str, Any]] = [
    {"name": "base", "label": "Base", "kind": "base"},
    {"name": "few_shot", "label": "Few-shot", "kind": "prompt", "few_shot": 4},
    {
        "name": "lora",
        "label": "LoRA",
        "kind": "tuned",
        "callback": LORA,
        "learning_rates": [0.01, 0.03, 0.001],
        "max_epochs": 2,
    },
    {"name": "iti", "label": "ITI", "kind": "edited", "callback": iti()},
    {"name": "iti_random", "label": "Random", "kind": "control", "callback": iti(direction="random")},
    {"name": "lora_iti", "label": "LoRA + ITI", "kind": "stack", "after": "lora", "callback": iti()},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Sixteen made-up questions in four categories."""
    path = tmp_path / "TruthfulQA.csv"
    columns = ["Type", "Category", "Question", "Best Answer", "Best Incorrect Answer"]
    columns += ["Correct Answers", "Incorrect Answers", "Source"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for i in range(16):
            best, wrong = f"It is true {i}", f"It is false {i}"
            row = ["Adversarial", f"C{i % 4}", f"What is it {i}?", best, wrong]
            row += [f"{best}; He is it {i}", f"{wrong}; She is not {i}; Who is it", "made up"]
            writer.writerow(dict(zip(columns, row, strict=True)))
    return path


@pytest.fixture
def write(tmp_path: Path, tiny_folder: Callable[[str], Path], questions: Path) -> Callable[..., Path]:
    def plan(output: str, rows: list[dict[str, Any]] = ROWS) -> Path:
        path = tmp_path / f"{output}.yaml"
        arguments = {"model": str(tiny_folder("llama")), "source": str(questions), "num_folds": 2}
        arguments["side_effects"] = {"tokens": 256, "capability": 8}
        task = {"class_path": "lightning_peft.truthfulqa.task.TruthfulQA", "init_args": arguments}
        values = {"name": output, "task": task, "rows": rows}
        path.write_text(yaml.safe_dump(values | {"output": str(tmp_path / output), "accelerator": "cpu"}))
        return path

    return plan


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    timeless = json.loads(json.dumps(results))
    for row in timeless["rows"]:
        for cost in ("seconds", "scoring_seconds", "step_seconds", "peak_memory"):
            row.pop(cost, None)
    for name in ("name", "settings"):
        timeless.pop(name)
    return timeless


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_one_command_gives_table_results_samples_and_report(write: Callable[..., Path], tmp_path: Path) -> None:
    main(["compare", "--config", str(write("whole"))])
    found = results(tmp_path / "whole")
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [row["name"] for row in ROWS] and not any(row["failed"] for row in rows.values())
    assert set(rows["few_shot"]["metrics"]) == {"mc0", "mc1", "mc2", "mc3"} and rows["base"]["difference"] is None
    assert set(rows["base"]["metrics"]) == {"mc0", "mc1", "mc2", "mc3", "ce", "kl", "capability", "forgotten"}
    for name in ("few_shot", "lora", "iti", "iti_random", "lora_iti"):
        difference = rows[name]["difference"]["mc2"]
        assert difference["low"] <= difference["mean"] <= difference["high"]
        gap = rows[name]["metrics"]["mc2"]["mean"] - rows["base"]["metrics"]["mc2"]["mean"]
        assert difference["mean"] == pytest.approx(gap)
    # tiny LLaMA: r=2 on q_proj (32 -> 32) and v_proj (32 -> 16) of 3 layers; 3 heads of width 8
    assert rows["lora"]["trainable_parameters"] == 3 * 2 * (64 + 48)
    assert rows["iti"]["edited_parameters"] == rows["iti_random"]["edited_parameters"] == 3 * 8
    assert rows["lora_iti"]["trainable_parameters"] == rows["lora"]["trainable_parameters"]
    assert rows["lora_iti"]["edited_parameters"] == 3 * 8
    assert rows["lora"]["chosen"]["learning_rate"][0] in (0.01, 0.03, 0.001)
    assert len(rows["lora"]["chosen"]["trials"][0]) == 3
    assert {(c["a"], c["b"]) for c in found["contrasts"]} >= {("iti", "lora"), ("iti", "iti_random")}
    assert len(found["head_accuracy"]["accuracy"]) == 3 and len(found["head_accuracy"]["selected"]) == 3

    kl = {name: row["metrics"].get("kl", {}).get("mean") for name, row in rows.items()}
    assert kl["base"] == 0 and kl["few_shot"] is None
    assert all(kl[name] > 0 for name in ("lora", "iti", "iti_random", "lora_iti"))
    for name in ("lora", "iti", "iti_random", "lora_iti"):
        for effect in ("ce", "kl", "capability", "forgotten"):
            change = rows[name]["difference"][effect]
            assert change["low"] <= change["mean"] <= change["high"]
            gap = rows[name]["metrics"][effect]["mean"] - rows["base"]["metrics"][effect]["mean"]
            assert change["mean"] == pytest.approx(gap)
    assert rows["base"]["metrics"]["forgotten"]["mean"] == 0
    assert found["data"]["text"]["documents"] == 2 and len(found["data"]["text"]["sha256"]) == 64

    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == len(ROWS) * 16 * 5
    tested = {(s["method"], s["question_id"]) for s in samples}
    assert len(tested) == len(ROWS) * 16, "every question is tested once by every row"
    for name, row in rows.items():
        for task in ("mc1", "mc2"):
            logged = read_samples(tmp_path / "whole" / "samples" / name / f"samples_truthfulqa_{task}.jsonl")
            assert [sample["doc_id"] for sample in logged] == list(range(16))
            assert sum(sample["acc"] for sample in logged) / 16 == pytest.approx(row["metrics"][task]["mean"])
            mean = sum(sample["acc"] for sample in logged if sample["category"] == "C1") / 4
            assert found["categories"]["C1"][name][task]["mean"] == pytest.approx(mean)
    assert found["categories"]["C1"]["n"] == 4
    demonstrations = {sample["arguments"]["gen_args_0"]["arg_0"].count("Q: ") for sample in logged}
    assert demonstrations == {7}  # of the last row, which has the six of the primer
    assert (tmp_path / "whole" / "report.html").read_text().count("<html") == 1
    for picture in ("by_method.png", "head_accuracy.png"):
        assert (tmp_path / "whole" / picture).read_bytes().startswith(b"\x89PNG")


def test_killed_half_way_and_run_again_equals_an_uninterrupted_run(write: Callable[..., Path], tmp_path: Path) -> None:
    main(["compare", "--config", str(write("whole"))])

    command = [sys.executable, "-m", "lightning_peft.cli", "compare", "--config", str(write("killed"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: another number of threads rounds differently
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    cells = tmp_path / "killed" / "cells"
    deadline = time.monotonic() + 240
    while len(list(cells.glob("*/result.json"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(SystemExit, match=rf"killed is in use by process {process.pid} on .*: wait for it \(--wait\)"):
        main(["compare", "--config", str(write("killed"))])
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in cells.glob("*/result.json")}
    assert 4 <= len(finished) < 12 and not (tmp_path / "killed" / "results.json").exists()

    main(["compare", "--config", str(write("killed"))])
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items()), "no finished cell is repeated"
    assert without_times(results(tmp_path / "killed")) == without_times(results(tmp_path / "whole"))
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "killed")]
    assert samples[0] == samples[1]


def test_a_failing_row_is_reported_and_stops_no_other(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"name": "bad", "label": "Bad", "kind": "edited", "callback": iti(num_heads=999)}
    main(["compare", "--config", str(write("failing", [ROWS[0], bad, ROWS[1]]))])
    rows = {row["method"]: row for row in results(tmp_path / "failing")["rows"]}
    assert "num_heads is 999, but the model has 12 heads" in rows["bad"]["failed"]
    assert rows["few_shot"]["failed"] is None and rows["few_shot"]["metrics"]
    assert "num_heads is 999" in capsys.readouterr().out


def test_a_changed_row_is_computed_again_and_no_other(write: Callable[..., Path], tmp_path: Path) -> None:
    main(["compare", "--config", str(write("changed", [ROWS[0], ROWS[3]]))])
    cells = tmp_path / "changed" / "cells"
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*/result.json")}
    other = {**ROWS[3], "callback": iti(alpha=1.0)}
    main(["compare", "--config", str(write("changed", [ROWS[0], other]))])
    for path, written in before.items():
        assert (path.stat().st_mtime_ns == written) == path.parent.name.startswith("base"), path


def test_the_ladder_is_one_config_and_every_rung_trains_more(write: Callable[..., Path], tmp_path: Path) -> None:
    rows = yaml.safe_load((ROOT / "configs" / "compare" / "ladder.yaml").read_text())["rows"]
    smaller = {"steered": {"num_heads": 3, "alpha": 5.0}, "lofit": {"share": 0.5}, "lora": {"r": 8}}
    for row in rows:
        if row["name"] in smaller:
            row["callback"]["init_args"] = smaller[row["name"]]
        if row["kind"] == "tuned":
            row |= {"learning_rates": [0.01], "max_epochs": 2}
    main(["compare", "--config", str(write("ladder", rows))])
    found = {row["method"]: row for row in results(tmp_path / "ladder")["rows"]}
    assert not any(row["failed"] for row in found.values())
    assert found["steered"]["edited_parameters"] == 3 * 8
    trained = {name: row["trainable_parameters"] for name, row in found.items() if row["trainable_parameters"]}
    # tiny LLaMA: 12 heads of width 8; biases of q, k, v, o, gate, up, down in 3 layers; r=8 on q and v
    biases = 3 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert trained == {"gains": 3, "offsets": 24, "lofit": 6 * 8, "bitfit": biases, "lora": 3 * 8 * (64 + 48)}
    for fold in range(2):  # each rung on its own fold's edit
        cells = tmp_path / "ladder" / "cells"
        (steered, _, _), (gains, _, _) = (
            read_folder(cells / f"{n}-fold{fold}" / "adapter") for n in ("steered", "gains")
        )
        assert gains.heads == steered.heads  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([ROWS[1]], "exactly one row of kind base"),
        ([ROWS[0], ROWS[5]], "comes after 'lora', which is not an earlier row"),
        ([ROWS[0], ROWS[0]], "names must differ"),
        ([ROWS[0], {**ROWS[2], "learning_rates": []}], "needs learning_rates"),
        ([ROWS[0], {"name": "x", "label": "X", "kind": "edited"}], "needs a callback"),
        ([ROWS[0], {**ROWS[2], "kind": "prompt"}], "is of kind prompt and can have no callback"),
        ([ROWS[0], {**ROWS[2], "starts_from": "iti"}], "starts from 'iti', which is not an earlier row"),
        ([ROWS[0], {**ROWS[2], "starts_from": "base"}], "starts from 'base', which has no adapter"),
        ([ROWS[0], ROWS[3], {**ROWS[2], "starts_from": "iti"}], "LoRA starts from nothing saved"),
    ],
)
def test_a_plan_that_cannot_run_is_one_sentence_at_the_start(
    write: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        main(["compare", "--config", str(write("wrong", rows))])
    assert not (tmp_path / "wrong" / "cells").exists()
