"""What was importable in 0.1 still is, by the same path and as the same object; the page on upgrading says what moved.

`data/names-0.1.json` lists the modules of 0.1, and the names that its pages, recipes and benchmarks used.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tuning import ROOT, python

from lightning_peft.moved import ARGUMENTS, MODULES, NAMES, new_path, resolve, table
from lightning_peft.moved.__main__ import listed

SNAPSHOT = ROOT / "tests" / "data" / "names-0.1.json"
UPGRADING = ROOT / "docs" / "upgrading.md"
# modules and names that no command, callback, page, recipe or benchmark of 0.1 used
GONE_MODULES = ["moments", *(f"probes.{name}" for name in ("closed_form", "mlp", "scores", "validation"))]
GONE_PROBES = ["LDAProbes", "MLPProbes", "MassMeanProbes", "RidgeProbes"]
GONE_PROBES += ["cross_validate", "permutation_null", "top_k_stability"]
GONE = {f"lightning_peft.editing.{name}" for name in GONE_MODULES + GONE_PROBES}
GONE |= {f"lightning_peft.editing.{name}" for name in ("GroupedMoments", "Moments", "capture_moments")}
GONE |= {f"lightning_peft.editing.probes.{name}" for name in GONE_PROBES}
GONE |= {f"lightning_peft.editing.probes.{name}" for name in ("PermutationNull", "ProbeReport", "Probes", "Stability")}

IMPORTED = """
import importlib.util, json, sys, warnings
from pathlib import Path

given = json.loads(Path(sys.argv[1]).read_text())
from lightning_peft.moved import NAMES, new_path, resolve

def imported(module, name=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = __import__(module, fromlist=[name or "__name__"])
            value = getattr(value, name) if name else value
        except (ImportError, AttributeError) as error:
            return error, []  # which is not what stands at the new place
    return value, [str(w.message) for w in caught if w.category is FutureWarning and "will be gone" in str(w.message)]

def at(path):
    try:
        return resolve(path)
    except (ImportError, AttributeError):
        return None

def is_scattered(module):  # a package whose modules went to different rooms: it warns of each name that is taken of it
    return new_path(module) is not None and getattr(sys.modules.get(module), "__name__", "") == module

rows = []
for module in given["modules"]:
    if module.endswith(".__main__"):  # a program, which runs when it is imported
        same = importlib.util.find_spec(module) is not None
        rows.append({"path": module, "new": None, "same": same, "warned": []})
        continue
    value, warned = imported(module)
    new = None if is_scattered(module) else new_path(module)
    same = value is sys.modules.get(new or module)
    rows.append({"path": module, "new": new, "same": same, "warned": warned})
for module, names in given["names"].items():
    for name in names:
        path = f"{module}.{name}"
        value, warned = imported(module, name)
        where = f"{new_path(module) or module}.{name}"
        new = NAMES.get(path, where if is_scattered(module) else None)
        if path in given["modules"]:  # imported above
            new, same = None, value is sys.modules.get(new_path(path) or path)
        else:
            same = value is at(new or where)
        rows.append({"path": path, "new": new, "same": same, "warned": warned})
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def imports() -> list[dict[str, Any]]:
    """Every module and name of 0.1, imported in a new process: its place now where it moved, and the warnings."""
    return json.loads(python(IMPORTED, SNAPSHOT).splitlines()[-1])


def test_every_module_and_name_of_the_last_version_is_the_object_at_its_new_place(
    imports: list[dict[str, Any]],
) -> None:
    assert len(imports) > 500
    assert {row["path"] for row in imports if not row["same"]} == GONE


def test_what_moved_gives_one_warning_that_names_the_new_place_and_what_stayed_none(
    imports: list[dict[str, Any]],
) -> None:
    expected = {row["path"]: [f"{row['path']} is now {row['new']}"] * (row["new"] is not None) for row in imports}
    assert {row["path"]: [text.partition(";")[0] for text in row["warned"]] for row in imports} == expected


# -- the tables -----------------------------------------------------------------------------------------------------


def test_modules_moved_to_modules_that_are_there_and_left_nothing_behind() -> None:
    for old, new in MODULES.items():
        assert importlib.util.find_spec(new) is not None, f"{old} is to be at {new}, where nothing is"
        assert new_path(new) is None, f"{old} is to be at {new}, which has moved itself"
        below = ROOT / old.replace(".", "/")
        assert old == new or not below.with_suffix(".py").exists(), f"{old} is still there"
        assert old == new or not (below / "__init__.py").exists(), f"{old} is still there"


def test_names_and_arguments_became_names_and_arguments_that_are_there() -> None:
    for old, new in NAMES.items():
        assert resolve(new) is not None and old != new
    for key, new in ARGUMENTS.items():
        owner, _, old = key.rpartition(".")
        cls = resolve(owner)
        parameters = inspect.signature(cls.__init__).parameters
        assert f"{cls.__module__}.{cls.__qualname__}" == owner and {old, new} <= parameters.keys()


def moved_names(text: str, suffix: str) -> set[str]:
    """Return what a file names by an old path."""
    paths = set(re.findall(r"\blightning_peft(?:\.\w+)+", text))
    if suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                paths |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {path for path in paths if new_path(path) or path in NAMES}


@pytest.mark.parametrize(
    "part", ["lightning_peft", "configs", "benchmarks", "docs", "README.md", "CONTRIBUTING.md", "Makefile"]
)
def test_nothing_of_ours_uses_an_old_path(part: str) -> None:
    files = [ROOT / part] if (ROOT / part).is_file() else sorted((ROOT / part).rglob("*"))
    files = [path for path in files if path.suffix in (".py", ".md", ".yaml", "") and path.is_file()]
    files = [path for path in files if path != UPGRADING and path.parent.name != "moved"]
    assert files != []
    assert {str(path): names for path in files if (names := moved_names(path.read_text(), path.suffix))} == {}


def test_an_old_path_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "lightning_peft.old", "lightning_peft.new")
    monkeypatch.setitem(NAMES, "lightning_peft.here.Part", "lightning_peft.here.Adapter")
    assert moved_names("from lightning_peft import old, older", ".py") == {"lightning_peft.old"}
    assert moved_names("class_path: lightning_peft.old.LoRA", ".yaml") == {"lightning_peft.old.LoRA"}
    assert moved_names("from lightning_peft.here import Part, Adapter", ".py") == {"lightning_peft.here.Part"}


# -- the page -------------------------------------------------------------------------------------------------------


def table_of(page: Path) -> str:
    """Return the table of what moved that stands in a page."""
    return page.read_text().partition("<!-- moved -->\n")[2].partition("\n<!-- end of moved -->")[0]


def test_the_page_says_what_is_gone() -> None:
    gone = UPGRADING.read_text().partition("## What is gone")[2]
    assert {name for path in GONE if f"`{(name := path.rpartition('.')[2])}`" not in gone} == set()


def test_the_page_lists_what_moved_of_what_was_documented() -> None:
    assert table_of(UPGRADING) == table(listed(SNAPSHOT)), "print it: python -m lightning_peft.moved " + str(
        SNAPSHOT.relative_to(ROOT)
    )
