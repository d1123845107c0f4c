"""Which class puts a method on a backbone: one table, to which a method of one's own can be added."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from tiny_models import tiny
from tuning import ROOT

from lightning_peft.stack.injection import registry
from lightning_peft.stack.injection.injection import Injection
from lightning_peft.stack.injection.own_forward import Invocation
from lightning_peft.stack.injection.prompt_learning import PastInjection, PromptInjection
from lightning_peft.stack.injection.registry import injection_for, register_injection
from lightning_peft.stack.stack import stack_of


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.setattr(registry, "_INJECTIONS", dict(registry._INJECTIONS))
    yield registry._INJECTIONS


def test_a_method_is_put_on_by_the_class_of_its_type_and_any_other_by_the_one_for_wrapped_modules() -> None:
    assert injection_for(LoraConfig()) is Injection and injection_for(IA3Config()).start == 1.0
    assert injection_for(PrefixTuningConfig()) is PastInjection
    assert injection_for(PromptTuningConfig()) is PromptInjection


def test_a_prompt_of_a_type_not_yet_known_is_a_prompt() -> None:
    @dataclass
    class Tomorrow(PromptTuningConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.peft_type = "TOMORROW"  # type: ignore[assignment]

    assert injection_for(Tomorrow()) is PromptInjection


def test_a_class_says_of_a_configuration_what_is_done_around_calls() -> None:
    assert Injection.own_calls(LoraConfig()) is None
    assert Injection.own_calls(LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[3])) is Invocation
    assert registry.TasksInjection.own_calls(PeftConfig()) is registry.Tasks


def test_a_class_of_ones_own_puts_its_method_on(table: dict[str, Any]) -> None:
    class Named(Injection):
        def places(self) -> list[str]:
            return ["here"]

    register_injection(LoraConfig().peft_type, Named)  # type: ignore[arg-type]
    part = stack_of(tiny("llama")).add(LoraConfig(target_modules=["q_proj"]), "mine")
    assert table["LORA"] is Named and isinstance(part.injection, Named) and part.injection.places() == ["here"]


def test_nothing_else_that_puts_adapters_on_and_trains_them_tells_methods_apart_by_the_name_of_their_type() -> None:
    rooms = (ROOT / "lightning_peft" / room for room in ("stack", "fitting", "packing", "planning", "testing"))
    for file in (file for room in rooms for file in room.rglob("*.py") if file.name != "registry.py"):
        texts = (n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant))
        assert not registry._INJECTIONS.keys() & {text for text in texts if isinstance(text, str)}, file
