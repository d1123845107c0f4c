"""The index of models on fifteen types, that it can fail, and the page made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.models import check as checks
from benchmarks.models.check import NATS, RELATIVE, Edit, check, iti, words
from benchmarks.models.index import FOLDER, PAGE, TASKS, build, run_bounded, types
from benchmarks.models.page import page
from benchmarks.models.places import missed_blocks, wrong_heads
from benchmarks.models.plain import Vectors
from lightning_peft.editing import head_sites

EQUAL = {"iti": "equal", "caa": "equal", "packed": "equal"}
CHOSEN: dict[tuple[str, str], dict[str, str]] = {
    ("causal", "gpt2"): EQUAL | {"bake": "equal", "bake_caa": "equal"},
    ("causal", "gemma2"): EQUAL,
    ("causal", "mistral"): EQUAL | {"bake": "refused"},
    ("causal", "gpt_oss"): EQUAL,
    ("causal", "cohere2"): EQUAL,
    ("causal", "deepseek_v3"): EQUAL,
    ("causal", "bloom"): EQUAL,
    ("causal", "bart"): EQUAL,
    ("causal", "qwen3_next"): EQUAL,
    ("causal", "lfm2"): EQUAL,
    ("causal", "mamba2"): {"iti": "refused", "caa": "equal", "packed": "equal"},
    ("image", "llava"): EQUAL,
    ("image", "qwen2_vl"): EQUAL,
    ("image", "gemma3"): EQUAL,
    ("image", "qwen3_5"): EQUAL,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "kind"), CHOSEN)
def test_steering_baking_and_scoring_equal_plain_hooks_and_plain_scoring(
    task: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = CHOSEN[task, kind]
    if "bake" not in expected:  # which takes half of the time
        monkeypatch.setattr(checks, "_baking", lambda *_: checks.Outcome("none", "left out"))
    monkeypatch.setattr(checks, "NEW_TOKENS", 2)
    found = check(build(task, kind), sees_pictures=task == "image")
    assert {name: found[name][0] for name in expected} == expected, found
    if task == "image":
        assert any(way.startswith("picture") for way in found["ways"]), found["picture"]


@pytest.mark.filterwarnings("ignore")
def test_an_edit_of_another_strength_or_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("causal", "llama")

    def stronger(model: Any, encodes: bool) -> Edit:
        made = iti(model, encodes)
        return Edit(made.adapter, Vectors({k: 1.01 * v for k, v in made.vectors.by_module.items()}, to_input=True))

    monkeypatch.setattr(checks, "iti", stronger)
    monkeypatch.setattr(checks, "caa", lambda *_: pytest.fail("one at a time"))
    base = {"text": (words(), True, checks.write(model, words(), True, 2))}
    monkeypatch.setattr(checks, "NEW_TOKENS", 2)
    assert checks._steering(model, stronger, {}, "iti", base, False).outcome == "differs"
    names = [site.name.replace("o_proj", "q_proj") for site in head_sites(model)]
    assert wrong_heads(model, names, words()) == names
    assert not wrong_heads(model, [site.name for site in head_sites(model)], words())
    assert missed_blocks(model, ["model.layers.0", "model.layers.1"]) == "2 of 4 layers, in model.layers"


@pytest.mark.filterwarnings("ignore")
def test_a_type_that_takes_too_long_or_cannot_be_built_has_a_row_with_the_reason() -> None:
    assert run_bounded("causal", "llama", seconds=0.01, gibibytes=16)["built"] == "more than 0.01 seconds"


def test_the_page_is_that_of_the_results_and_has_the_types_it_should() -> None:
    import transformers

    results = {task: json.loads((FOLDER / f"{task}.json").read_text()) for task in TASKS}
    built = {task: [row for row in rows.values() if not row["built"]] for task, rows in results.items()}
    assert len(built["causal"]) >= 120 and len(built["image"]) >= 40
    version = PAGE.read_text().split("transformers ")[1].split(" ")[0]
    assert PAGE.read_text() == page(results, version, RELATIVE, NATS)
    if version == transformers.__version__:
        assert all(results[task].keys() <= types(task).keys() for task in TASKS)
