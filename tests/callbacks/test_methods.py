"""Every method has what a user expects of any: the same common arguments, a recipe, a card, a place among the laws."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from lightning_peft import callbacks
from lightning_peft.callbacks import PEFT, AdapterCallback, Composite, Edit
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.testing.architectures import ARCHITECTURES
from lightning_peft.testing.methods import METHODS

ROOT = Path(__file__).parents[2]
TRAINED = [
    name
    for name in callbacks.__all__
    if issubclass(cls := getattr(callbacks, name), AdapterCallback)
    and not issubclass(cls, Edit)
    and cls not in (AdapterCallback, PEFT, Composite)
]


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_takes_what_every_method_takes(name: str) -> None:
    parameters = dict(inspect.signature(getattr(callbacks, name)).parameters)
    assert not AdapterOptions.__annotations__.keys() & parameters.keys()
    assert parameters["options"].annotation == "Unpack[AdapterOptions]"
    assert all(p.default is not inspect.Parameter.empty for key, p in parameters.items() if key != "options")
    common = {"backbone": "net", "name": "mine", "backbone_dropout": True, "strict_base": False, "check_finite": False}
    made = getattr(callbacks, name)(**common)
    assert {key: getattr(made, key) for key in common} == common


@pytest.mark.parametrize("name", [*TRAINED, "ITI", "CAA"])
def test_an_argument_that_no_method_has_is_named_with_the_nearest(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} has no argument 'backbon'; the nearest are backbone"):
        getattr(callbacks, name)(backbon="net")


def test_prefix_tuning_says_that_it_needs_the_past_that_checkpointing_drops() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        callbacks.PrefixTuning(gradient_checkpointing=True)


def test_shared_arguments_by_position_are_taken_with_a_warning() -> None:
    from peft import LoraConfig

    with pytest.warns(FutureWarning, match="by name"):
        made = PEFT(LoraConfig(), "net", "mine")
    assert (made.backbone, made.name) == ("net", "mine")

    class Mine(Edit):
        def __init__(self) -> None:
            super().__init__(None, "mine")

    with pytest.warns(FutureWarning, match="by name"):
        assert Mine().name == "mine"


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_is_among_those_the_laws_are_run_on(name: str) -> None:
    assert any(type(method.make()).__name__ == name for method in METHODS.values())


def test_the_laws_are_run_with_the_settings_that_the_methods_give_and_every_one_has_its_formula() -> None:
    architecture = ARCHITECTURES["llama"]
    assert len(METHODS) >= 37 and all(method.needs <= architecture.has for method in METHODS.values())
    assert {
        name: method.make().name for name, method in METHODS.items() if not method.count(architecture.make_module())
    } == {}
    assert METHODS["LoRA"].count(architecture.make_module()) == 672 and METHODS["DoRA"].make().variant == "dora"


def test_a_formula_speaks_of_the_arguments_and_is_none_where_there_is_none() -> None:
    backbone = ARCHITECTURES["llama"].make_module().get_submodule("backbone")
    once, twice = (callbacks.LoRA(r=r, layers=[0]).trainable_parameters(backbone) for r in (1, 2))
    assert 0 < 2 * once == twice < callbacks.LoRA(r=2).trainable_parameters(backbone)
    assert callbacks.BitFit(add_missing=False).trainable_parameters(backbone) is None
    assert Composite({"one": callbacks.LoRA(), "two": callbacks.BitFit()}).trainable_parameters(backbone) is None


def test_each_method_has_a_recipe_and_a_card_in_the_documentation() -> None:
    used = set()
    for recipe in (ROOT / "configs").glob("*.yaml"):
        for callback in yaml.safe_load(recipe.read_text())["trainer"]["callbacks"]:
            used.add(callback["class_path"].rsplit(".", 1)[-1])
    assert set(TRAINED) <= used
    cards = [card.read_text() for card in (ROOT / "docs" / "methods").glob("*.md")]
    assert not [name for name in TRAINED if not any(f"callbacks.{name}(" in card for card in cards)]
