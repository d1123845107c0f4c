"""The pages that promise that their code runs are run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str, model: Path) -> dict[str, Any]:
    """Every Python block of a page, in order, in one namespace; a tiny model stands in for the one of the hub."""
    names: dict[str, Any] = {"__name__": page}
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)), page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def made(tiny_folder: Callable[[str], Path]) -> dict[str, Any]:
    return run("your-own-module.md", tiny_folder("llama"))


@pytest.mark.filterwarnings("ignore")
def test_lora_on_a_hand_written_network_beats_training_its_head_alone(made: dict[str, Any]) -> None:
    assert len(made["with_lora"]) == len(made["head_alone"]) == 3
    assert min(made["with_lora"]) > max(made["head_alone"]) + 0.05


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_ones_own_is_tuned_tested_and_validated_on_truthfulqa(made: dict[str, Any]) -> None:
    choices = {"mc0", "mc1", "mc2", "mc3"}
    assert made["before"].keys() == made["after"].keys() == choices and made["before"] != made["after"]
    also = {"loss", "ce", "ce_base", "kl", "capability"}
    assert made["validated"].keys() == {f"val_{name}" for name in choices | also} and made["validated"]["val_kl"] > 0


@pytest.mark.filterwarnings("ignore")
def test_an_edit_is_computed_without_a_trainer_and_one_of_ones_own_stands_on_it(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = run("methods/iti.md", tiny_folder("llama"))
    stack = made["adapters"](made["model"])
    assert [part.name for part in stack.parts] == ["iti", "median_difference"] and stack["iti"].scale == 2.0
    assert made["median"].record == {"texts": 36} and (tmp_path / "snow-is-white" / "adapter_config.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_ones_own_is_swept(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = run("sweep.md", tiny_folder("llama"))["results"]
    assert len(results["points"]) == 5 and results["confirmed"]["prompts"] == 12
    assert results["settings"]["task"]["class_path"].endswith("RightAnswers") and results["settings"]["kl_tokens"] == 0
    assert (tmp_path / "runs" / "mine" / "adapter-fold1" / "adapter_config.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_cost_of_an_edit_is_measured_on_the_model_and_in_its_folder(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = run("effects.md", tiny_folder("llama"))
    assert made["change"].mean > 0 and made["before"].mean != made["after"].mean and len(made["own"].by_text) == 2
    costs = list(made["costs"].values())
    assert costs[0] == 0 and costs[2] == pytest.approx(made["change"].mean) and costs == sorted(costs)
    assert made["mass"].shape == (6,) and bool(made["mass"].isfinite().all() and made["mass"].any())
    assert len(made["answers"]) == 3 and all(made["answers"])
    assert 0 < made["within"]["kl"] <= 0.1 and 0 < made["found"].kl <= 0.05


@pytest.mark.filterwarnings("ignore")
def test_an_adapted_model_is_talked_to(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = run("generation.md", talker / "base")
    assert len(made["replies"]) == 2 and made["plain"] == made["replies"][:1], "an untrained LoRA is its base"
    assert made["adapted"].strengths() == {"lora": 1.0}
    assert made["beside"] == made["second"], "at any strength"


@pytest.mark.filterwarnings("ignore")
def test_a_loop_with_fabric_is_resumed_and_its_adapter_loaded(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = run("fabric.md", tiny_folder("llama"))
    whole, optimizer = made["begin"](made["fabric"])
    assert made["train"](made["fabric"], whole, optimizer, made["batches"]) == made["last_loss"]
    expected, resumed = whole.state_dict(), made["resumed"].state_dict()
    assert all(expected[name].equal(resumed[name]) for name in expected)
    ids = made["encoded"][0]
    assert made["resumed"].eval()(ids).logits.allclose(made["fresh"].eval()(ids).logits, atol=0.05)  # bfloat16
    assert (tmp_path / "adapter" / "README.md").exists()
    assert (tmp_path / "half.ckpt").stat().st_size < (tiny_folder("llama") / "model.safetensors").stat().st_size
