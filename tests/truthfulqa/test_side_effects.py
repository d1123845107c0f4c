"""Simple questions, and side effects where a Trainer tests the benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from edits import add_offsets
from peft import LoraConfig
from tuning import trainer

from lightning_peft.effects import text_slice
from lightning_peft.models import CausalLM
from lightning_peft.stack.stack import stack_of
from lightning_peft.truthfulqa import SideEffects, TruthfulQADataModule, forgotten, load_questions
from lightning_peft.truthfulqa.side_effects import CAPABILITY, CAPABILITY_PRIMER

# -- settings ------------------------------------------------------------------------------------------------------


def test_the_settings_are_those_that_plans_and_finished_cells_have() -> None:
    assert list(asdict(SideEffects()).items()) == [
        ("tokens", 4096),
        ("capability", 82),
        ("source", "package"),
        ("seed", 0),
        ("length", 128),
    ]
    assert SideEffects(64, 8) == SideEffects(tokens=64, capability=8)


def test_the_text_is_the_slice_of_these_settings() -> None:
    assert SideEffects(tokens=60, seed=3, length=12).text() == text_slice("package", 60, 3, 12)
    assert SideEffects(tokens=0).text() is None


# -- capability ----------------------------------------------------------------------------------------------------


def test_the_capability_set_has_sixty_questions_of_four_choices_of_four_kinds() -> None:
    questions = load_questions(CAPABILITY)
    assert len(questions) >= 60
    kinds = [question.category for question in questions]
    assert {kind: kinds.count(kind) >= 15 for kind in set(kinds)} == dict.fromkeys(
        ("arithmetic", "commonsense", "reading", "grammar"), True
    )
    for question in questions:
        assert len(question.choices) == 4 and sum(choice.mc1 for choice in question.choices) == 1, question.text


def test_no_demonstration_is_a_question_of_the_set() -> None:
    shown = set(re.findall(r"^Q: (.*)$", CAPABILITY_PRIMER, re.MULTILINE))
    assert len(shown) == 4 and not shown & {question.text for question in load_questions(CAPABILITY)}


def test_the_sums_of_the_capability_set_are_right() -> None:
    checked = 0
    for question in load_questions(CAPABILITY):
        match question.text.removeprefix("What is ").rstrip("?").split():
            case [a, ("plus" | "minus" | "times") as what, b]:
                value = {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[what]
                assert question.best == f"{value}.", question.text
                checked += 1
    assert checked >= 6


def test_forgetting_counts_what_was_known_alone() -> None:
    assert forgotten({1: 1, 2: 1, 3: 0, 4: 1}, {1: 1, 2: 0, 3: 1, 4: 0}) == pytest.approx(2 / 3)
    assert forgotten({1: 1, 2: 0}, {1: 1, 2: 1}) == 0
    assert forgotten({1: 0}, {1: 0}) == 0


# -- with the Trainer ----------------------------------------------------------------------------------------------

ASKED = SideEffects(tokens=64, capability=8)


def logged(folder: Path, prepare: Callable[[CausalLM], object] = lambda module: None) -> dict[str, float]:
    module = CausalLM(str(folder))
    prepare(module)
    data = TruthfulQADataModule(source="package", limit=12, primer="Q: It?\nA: It.", side_effects=ASKED)
    (found,) = trainer().test(module, datamodule=data, verbose=False)
    return dict(found)


def test_test_logs_side_effects_where_they_are_asked_for(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("wide_llama")
    base = logged(folder)
    assert {"ce", "ce_base", "kl", "capability", "mc1", "mc2"} <= base.keys()
    assert base["kl"] == 0 and base["ce"] == base["ce_base"] and 0 <= base["capability"] <= 1
    changed = logged(folder, lambda module: add_offsets(module.backbone))
    assert changed["kl"] > 0 and changed["ce"] != base["ce"]
    assert changed["ce_base"] == pytest.approx(base["ce"], abs=1e-6)


def test_of_an_adapter_that_cannot_be_switched_off_cross_entropy_alone_is_logged(
    tiny_folder: Callable[[str], Path],
) -> None:
    def pissa(module: CausalLM) -> None:
        stack_of(module.backbone).add(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))

    found = logged(tiny_folder("llama"), pissa)
    assert "ce" in found and "kl" not in found and "ce_base" not in found


def test_not_asked_for_nothing_more_is_tested(tiny_folder: Callable[[str], Path]) -> None:
    data = TruthfulQADataModule(source="package", limit=12, tokenizer=str(tiny_folder("llama")))
    data.setup()
    assert all("mc1" in batch for batch in data.test_dataloader())
