"""Old module paths, in a small package of their own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import runpy
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from jsonargparse import ArgumentParser

from lightning_peft import moved
from lightning_peft.moved.paths import install

MODULES = {
    "toyhouse.flat": "toyhouse.rooms",
    "toyhouse.mixed": "toyhouse.rooms",
    "toyhouse.mixed.shed": "toyhouse.garden.shed",
    "toyhouse.gone.deep.wine": "toyhouse.rooms.cellar.wine",
    "toyhouse.rooms.rake": "toyhouse.garden.rake",
    "toyhouse.nowhere": "toyhouse.never",
}
FILES = {
    "__init__.py": "runs = []",
    "rooms/__init__.py": "WALLS = 4",
    "rooms/kitchen.py": "import toyhouse\ntoyhouse.runs.append(__name__)\nfuel = 'gas'\n"
    "class Oven:\n    def __init__(self, heat: int = 1) -> None:\n        self.heat = heat\n"
    "def burn():\n    return fuel\nif __name__ == '__main__':\n    print('dinner')\n",
    "rooms/cellar/__init__.py": "",
    "rooms/cellar/wine.py": "YEAR = 1990",
    "rooms/cellar/__main__.py": "print('cheers')",
    "garden/__init__.py": "",
    "garden/shed.py": "TOOLS = ['spade']",
    "garden/rake.py": "TEETH = 9",
}


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `toyhouse`, whose modules had other paths."""
    for name, text in FILES.items():
        path = tmp_path / "toyhouse" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(moved, "_WARNED", set())
    finder = install(MODULES)
    yield tmp_path
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "toyhouse"]:
        del sys.modules[name]


def heard(code: str, names: dict[str, Any] | None = None) -> list[str]:
    """Run code; returns its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(code, "caller.py", "exec"), {} if names is None else names)
    assert all(warning.category is FutureWarning for warning in caught)
    return [str(warning.message).partition(";")[0] for warning in caught]


KITCHEN = "toyhouse.flat.kitchen is now toyhouse.rooms.kitchen"


@pytest.mark.parametrize(
    ("code", "warned"),
    [
        ("import toyhouse.flat.kitchen as m", KITCHEN),
        ("import toyhouse.flat.kitchen; m = toyhouse.flat.kitchen", KITCHEN),
        ("from toyhouse.flat.kitchen import Oven; import sys; m = sys.modules[Oven.__module__]", KITCHEN),
        ("from toyhouse.flat import kitchen as m", "toyhouse.flat is now toyhouse.rooms"),
        ("import importlib; m = importlib.import_module('toyhouse.flat.kitchen')", KITCHEN),
        ("import importlib; m = importlib.import_module('.kitchen', 'toyhouse.flat')", KITCHEN),
        ("m = __import__('toyhouse.flat.kitchen', fromlist=['Oven'])", KITCHEN),
        ("from toyhouse.mixed import kitchen as m", "toyhouse.mixed.kitchen is now toyhouse.rooms.kitchen"),
        ("import toyhouse.mixed.kitchen as m", "toyhouse.mixed.kitchen is now toyhouse.rooms.kitchen"),
    ],
)
def test_however_it_is_imported_an_old_path_is_the_new_module_run_once_with_one_warning(code: str, warned: str) -> None:
    names: dict[str, Any] = {}
    assert heard(code, names) == [warned]
    assert names["m"] is importlib.import_module("toyhouse.rooms.kitchen") is sys.modules["toyhouse.rooms.kitchen"]
    assert importlib.import_module("toyhouse").runs == ["toyhouse.rooms.kitchen"]
    assert heard(code) == []  # the second time


def test_the_new_module_imported_first_is_the_one_that_the_old_path_gives() -> None:
    new = importlib.import_module("toyhouse.rooms.kitchen")
    assert heard("import toyhouse.flat.kitchen") == [KITCHEN] and sys.modules["toyhouse.flat.kitchen"] is new
    assert importlib.import_module("toyhouse").runs == ["toyhouse.rooms.kitchen"]


def test_what_importlib_keeps_on_the_module_stays_that_of_the_new_path() -> None:
    module = importlib.import_module("toyhouse.rooms.kitchen")
    before = module.__name__, module.__spec__, module.__loader__, module.__package__
    heard("import toyhouse.flat.kitchen")
    assert (module.__name__, module.__spec__, module.__loader__, module.__package__) == before
    assert importlib.reload(sys.modules["toyhouse.flat.kitchen"]) is module
    assert "class Oven" in inspect.getsource(module.Oven)


@pytest.mark.parametrize("code", ["import toyhouse.flat.kitchen", "import importlib as i\ni.import_module(NAME)"])
def test_the_warning_points_at_the_line_that_imports(code: str) -> None:
    names = {"__name__": "theirs", "NAME": "toyhouse.flat.kitchen"}
    with pytest.warns(FutureWarning) as caught:
        exec(compile("\n\n" + code, "caller.py", "exec"), names)
    assert [(warning.filename, warning.lineno) for warning in caught] == [("caller.py", 2 + len(code.splitlines()))]


def test_a_warning_made_an_error_stops_the_import() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning, match="is now"):
            importlib.import_module("toyhouse.flat.kitchen")
    assert "toyhouse.flat.kitchen" not in sys.modules


def test_packages_that_are_gone_need_no_entry_of_their_own() -> None:
    names: dict[str, Any] = {}
    warned = ["toyhouse.gone.deep.wine is now toyhouse.rooms.cellar.wine"]
    assert heard("import toyhouse.gone.deep.wine as m", names) == warned
    assert names["m"] is importlib.import_module("toyhouse.rooms.cellar.wine")
    assert heard("import toyhouse.gone.deep") == []
    with pytest.raises(AttributeError, match=r"'toyhouse\.gone' has no attribute 'other'"):
        _ = sys.modules["toyhouse.gone"].other
    with pytest.raises(ImportError, match="cannot import name 'other'"):
        heard("from toyhouse.gone.deep import other")


def test_a_package_whose_modules_went_to_different_rooms_gives_each_from_where_it_stands() -> None:
    names: dict[str, Any] = {}
    code = "from toyhouse.mixed import shed, WALLS\nimport toyhouse.mixed\nsame = toyhouse.mixed.shed"
    warned = ["toyhouse.mixed.shed is now toyhouse.garden.shed", "toyhouse.mixed.WALLS is now toyhouse.rooms.WALLS"]
    assert heard(code, names) == warned
    assert names["shed"] is names["same"] is importlib.import_module("toyhouse.garden.shed") and names["WALLS"] == 4
    assert importlib.util.find_spec("toyhouse.rooms.shed") is None  # no path that never was


def test_a_module_that_left_a_package_that_stays_is_its_attribute_after_the_import() -> None:
    names: dict[str, Any] = {}
    assert heard("import toyhouse.rooms.rake\nteeth = toyhouse.rooms.rake.TEETH", names) == [
        "toyhouse.rooms.rake is now toyhouse.garden.rake"
    ]
    assert names["teeth"] == 9 and importlib.import_module("toyhouse.rooms").WALLS == 4


def test_folders_that_an_update_leaves_behind_hide_nothing(house: Path) -> None:
    for left in ("flat/__pycache__", "gone/deep/__pycache__", "mixed"):
        (house / "toyhouse" / left).mkdir(parents=True)
    importlib.invalidate_caches()
    heard("import toyhouse.flat.kitchen, toyhouse.gone.deep.wine, toyhouse.mixed.shed")
    assert sys.modules["toyhouse.flat"] is sys.modules["toyhouse.rooms"]
    assert sys.modules["toyhouse.mixed.shed"] is sys.modules["toyhouse.garden.shed"]


@pytest.mark.parametrize("path", ["toyhouse.flat.attic", "toyhouse.nowhere", "toyhouse.nowhere.deep", "toyhouse.other"])
def test_what_is_nowhere_is_not_found_by_the_name_that_was_given(path: str) -> None:
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(path)
    assert path.startswith(str(error.value.name)) and heard("import toyhouse.rooms") == []


def test_looking_for_an_old_path_warns_of_nothing() -> None:
    names: dict[str, Any] = {}
    assert heard("import importlib.util as u\nspec = u.find_spec('toyhouse.flat')", names) == []
    assert names["spec"].origin.endswith("rooms/__init__.py") and "toyhouse.flat" not in sys.modules


def test_pickles_of_old_classes_load() -> None:
    text = b"ctoyhouse.flat.kitchen\nOven\n."
    with pytest.warns(FutureWarning, match="is now"):
        assert pickle.loads(text) is importlib.import_module("toyhouse.rooms.kitchen").Oven
    state = pickle.dumps(importlib.import_module("toyhouse.rooms.kitchen").Oven(3), protocol=0)
    older = state.replace(b"toyhouse.rooms.kitchen", b"toyhouse.mixed.kitchen")
    assert older != state and pickle.loads(older).heat == 3


def test_class_paths_of_jsonargparse_are_found() -> None:
    base = importlib.import_module("toyhouse.rooms.kitchen").Oven
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--oven", type=base)
    with pytest.warns(FutureWarning, match="is now") as caught:
        given = {"oven": {"class_path": "toyhouse.flat.kitchen.Oven", "init_args": {"heat": 7}}}
        oven = parser.instantiate(parser.parse_object(given)).oven
    assert type(oven) is base and oven.heat == 7 and len(caught) == 1


def test_patching_by_an_old_path_patches_the_module() -> None:
    module = importlib.import_module("toyhouse.rooms.kitchen")
    with pytest.warns(FutureWarning), mock.patch("toyhouse.flat.kitchen.fuel", "wood"):
        assert module.burn() == "wood"
    assert module.burn() == "gas"


@pytest.mark.parametrize(("path", "printed"), [("toyhouse.flat.kitchen", "dinner"), ("toyhouse.flat.cellar", "cheers")])
def test_an_old_path_runs_as_a_program(path: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(FutureWarning, match=f"{path}.* is now"):
        runpy.run_module(path, run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.strip() == printed


@pytest.mark.parametrize("old", ["flat.kitchen", "gone.deep.wine", "mixed", "nowhere"])
def test_finding_an_old_path_imports_nothing(old: str) -> None:
    """A finder is asked under importlib's global lock, where waiting for a thread that imports would be for ever."""
    finder, before = install(MODULES), set(sys.modules)
    sys.meta_path.remove(finder)
    spec = finder.find_spec(f"toyhouse.{old}")
    assert set(sys.modules) == before and (spec is None) == (old == "nowhere")


def test_threads_that_import_by_both_paths_get_one_module() -> None:
    paths = ["toyhouse.flat.kitchen", "toyhouse.rooms.kitchen", "toyhouse.mixed.kitchen"] * 4
    gate, modules = threading.Barrier(len(paths)), []

    def load(path: str) -> None:
        gate.wait(timeout=20)
        modules.append(importlib.import_module(path))

    threads = [threading.Thread(target=load, args=(path,), daemon=True) for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
    assert len(modules) == len(paths) and len(set(map(id, modules))) == 1
    assert importlib.import_module("toyhouse").runs == ["toyhouse.rooms.kitchen"]


def test_nothing_but_the_standard_library_is_needed() -> None:
    code = "import sys, lightning_peft.moved.paths, lightning_peft.moved.names\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
