"""The pages that promise that their code runs are run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str) -> dict[str, Any]:
    """Every Python block of a page, in order, in one namespace."""
    names: dict[str, Any] = {"__name__": page}
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore")
def test_lora_on_a_hand_written_network_beats_training_its_head_alone() -> None:
    made = run("your-own-module.md")
    assert len(made["with_lora"]) == len(made["head_alone"]) == 3
    assert min(made["with_lora"]) > max(made["head_alone"]) + 0.05
