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
