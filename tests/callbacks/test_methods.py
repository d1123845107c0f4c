"""Every method has what a user expects of any: the same common arguments, a recipe, a card, a place among the laws."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from lightning_peft import callbacks
from lightning_peft.callbacks import PEFT, Composite, Edit
from lightning_peft.testing.methods import METHODS

ROOT = Path(__file__).parents[2]
TRAINED = [
    name
    for name in callbacks.__all__
    if issubclass(cls := getattr(callbacks, name), PEFT) and not issubclass(cls, Edit) and cls not in (PEFT, Composite)
]
COMMON = {"backbone", "name", "backbone_dropout", "gradient_checkpointing"}


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_takes_what_every_method_takes(name: str) -> None:
    parameters = dict(inspect.signature(getattr(callbacks, name)).parameters)
    missing = COMMON - set(parameters)
    # transformers' layers forget a given past when they are checkpointed, and the prefix is one
    assert missing == ({"gradient_checkpointing"} if name == "PrefixTuning" else set())
    assert parameters.pop("options").kind is inspect.Parameter.VAR_KEYWORD
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_is_among_those_the_laws_are_run_on(name: str) -> None:
    assert any(type(method.make()).__name__ == name for method in METHODS.values())


def test_each_method_has_a_recipe_and_a_card_in_the_documentation() -> None:
    used = set()
    for recipe in (ROOT / "configs").glob("*.yaml"):
        for callback in yaml.safe_load(recipe.read_text())["trainer"]["callbacks"]:
            used.add(callback["class_path"].rsplit(".", 1)[-1])
    assert set(TRAINED) <= used
    cards = [card.read_text() for card in (ROOT / "docs" / "methods").glob("*.md")]
    nav = (ROOT / "mkdocs.yml").read_text()
    assert all(f"methods/{card.name}" in nav for card in (ROOT / "docs" / "methods").glob("*.md"))
    assert not [name for name in TRAINED if not any(f"callbacks.{name}(" in card for card in cards)]
