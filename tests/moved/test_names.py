"""Old names in modules, and old arguments of classes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from tuning import QUIET

from lightning_peft import moved
from lightning_peft.moved.names import keep_old_arguments, keep_old_names

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(autouse=True)
def nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "_WARNED", set())


# -- names ----------------------------------------------------------------------------------------------------------

NAMES = {"toy.stack.Part": "toyroom.Adapter", "toyroom.count": "toyroom.parameter_count", "toy.far.away": "other.near"}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module `toyroom`, which was `toy.stack`, with two new names."""
    module = ModuleType("toyroom")
    exec("class Adapter: ...\ndef parameter_count(): return 3", vars(module))
    monkeypatch.setitem(sys.modules, "toyroom", module)
    yield module


def test_a_module_answers_to_old_names_with_one_warning_each(room: ModuleType) -> None:
    keep_old_names("toyroom", NAMES, {"toy.stack": "toyroom"})
    with pytest.warns(FutureWarning) as caught:
        assert room.Part is room.Part is room.Adapter and room.count() == 3
    sentences = [str(warning.message).partition(";")[0] for warning in caught]
    assert sentences == ["toy.stack.Part is now toyroom.Adapter", "toyroom.count is now toyroom.parameter_count"]
    assert {warning.filename for warning in caught} == {__file__}


def test_names_of_other_modules_and_misspelt_ones_are_attribute_errors(room: ModuleType) -> None:
    keep_old_names("toyroom", NAMES, {"toy.stack": "toyroom"})
    for name in ("away", "Parts"):
        with pytest.raises(AttributeError, match=f"'toyroom' has no attribute '{name}'"):
            getattr(room, name)
    with pytest.raises(ImportError):
        exec("from toyroom import Parts")


def test_names_that_a_module_makes_on_demand_are_still_made(room: ModuleType) -> None:
    vars(room)["__getattr__"] = lambda name: name.upper()
    keep_old_names("toyroom", NAMES, {"toy.stack": "toyroom"})
    assert room.lazy == "LAZY"
    with pytest.warns(FutureWarning):
        assert room.count is room.parameter_count


# -- arguments ------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    f"{__name__}.Dial.alpha": "scale",
    f"{__name__}.Sweeping.alphas": "scales",
    f"{__name__}.Dials.alpha": "other",
}


@partial(keep_old_arguments, arguments=ARGUMENTS)
class Dial(Callback):
    """A callback whose `scale` was `alpha`."""

    def __init__(self, scale: float = 1.0, layers: list[int] | None = None) -> None:
        self.scale, self.layers = scale, layers


@partial(keep_old_arguments, arguments=ARGUMENTS)
@dataclass
class Sweeping:
    """A plan whose `scales`, which must be given, were `alphas`."""

    name: str
    scales: list[float]
    seed: int = 0


def heard(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message).partition(";")[0] for w in caught if w.category is FutureWarning]


def test_an_old_keyword_is_taken_with_a_warning_at_the_line_that_gives_it() -> None:
    with pytest.warns(FutureWarning) as caught:
        assert Dial(alpha=3.0).scale == 3.0 and Dial(alpha=2.0, layers=[1]).layers == [1]
    assert heard(list(caught)) == [f"{__name__}.Dial(alpha=…) is now {__name__}.Dial(scale=…)"]
    assert caught[0].filename == __file__
    assert Dial(3.0).scale == Dial(scale=3.0).scale == 3.0


def test_an_argument_by_both_names_and_an_unknown_one_are_errors() -> None:
    with pytest.raises(TypeError, match="Dial was given alpha and scale, which is its name now: leave alpha out"):
        Dial(alpha=3.0, scale=2.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        Dial(beta=3.0)
    with pytest.raises(TypeError, match="multiple values for argument 'scale'"), pytest.warns(FutureWarning):
        Dial(1.0, alpha=3.0)


def fit(folder: Path, arguments: str) -> Any:
    """Build what a YAML file says with LightningCLI; returns the callback, and the saved file's `init_args`."""
    (folder / "config.yaml").write_text(
        "trainer:\n  logger: false\n  accelerator: cpu\n  callbacks:\n"
        f"    - class_path: {__name__}.Dial\n      init_args: {arguments}\n"
    )
    cli = LightningCLI(
        BoringModel, run=False, args=[f"--config={folder / 'config.yaml'}"], parser_kwargs={"exit_on_error": False}
    )
    dial = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Dial))  # type: ignore[attr-defined]
    return dial, cli.config.trainer.callbacks[0].init_args


def test_an_old_key_in_yaml_loads_with_one_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dial, _ = fit(tmp_path, "{alpha: 3, layers: [1]}")
    assert heard(caught) == [f"{__name__}.Dial(alpha=…) is now {__name__}.Dial(scale=…)"]
    assert dial.scale == 3.0 and isinstance(dial.scale, float) and dial.layers == [1]


def test_where_the_new_key_is_given_the_old_one_is_neither_warned_of_nor_saved(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dial, saved = fit(tmp_path, "{scale: 3}")
    assert heard(caught) == [] and dial.scale == 3.0 and "alpha" not in saved


@pytest.mark.parametrize(("arguments", "why"), [("{beta: 3}", "'beta' is not accepted"), ("{alpha: high}", "alpha")])
def test_an_unknown_key_and_a_value_of_another_type_still_fail(tmp_path: Path, arguments: str, why: str) -> None:
    with pytest.raises(Exception, match=why):
        fit(tmp_path, arguments)


def plan(text: str, folder: Path) -> Sweeping:
    """Read a plan as the commands do."""
    (folder / "plan.yaml").write_text(text)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Sweeping, as_positional=False)
    made = parser.instantiate(parser.parse_args(["--config", str(folder / "plan.yaml")])).as_dict()
    made.pop("config")
    return Sweeping(**made)


def test_a_plan_with_an_old_key_that_must_be_given_loads_with_one_warning(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning) as caught:
        assert plan("{name: a, alphas: [1, 2]}", tmp_path) == Sweeping("a", [1.0, 2.0])
    assert heard(list(caught)) == [f"{__name__}.Sweeping(alphas=…) is now {__name__}.Sweeping(scales=…)"]
    assert plan("{name: a, scales: [1, 2], seed: 1}", tmp_path) == Sweeping("a", [1.0, 2.0], 1)
    with pytest.raises(Exception, match="scales"):
        plan("{name: a}", tmp_path)
    with pytest.raises(Exception, match="alphax"):
        plan("{name: a, alphax: [1]}", tmp_path)


# -- the table ------------------------------------------------------------------------------------------------------


def test_the_table_lists_what_concerns_documented_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "MODULES", {"a.b": "a.x", "a.b.stays": "a.b.stays", "a.c": "a.y"})
    monkeypatch.setattr(moved, "NAMES", {"a.b.Part": "a.x.Adapter", "a.b.hidden": "a.x.secret"})
    monkeypatch.setattr(moved, "ARGUMENTS", {"a.x.Dial.alpha": "scale"})
    title = "| 0.1 | 0.2 |\n|---|---|\n"
    part, whole, dial = (
        "| `a.b.Part` | `a.x.Adapter` |",
        "| `a.b` | `a.x` |",
        "| `a.x.Dial(alpha=…)` | `a.x.Dial(scale=…)` |",
    )
    assert moved.table(["a.b.stays", "a.b.Part"]) == title + "\n".join([whole, part, dial])
    everything = [whole, part, "| `a.b.hidden` | `a.x.secret` |", "| `a.c` | `a.y` |", dial]
    assert moved.table() == title + "\n".join(everything)
