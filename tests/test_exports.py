"""What the packages export: by one list each, or by a file's being there, and nothing imported for it."""

from __future__ import annotations

import importlib
import inspect
import tomllib
from pathlib import Path

import pytest
from tuning import ROOT, python

from lightning_peft import callbacks
from lightning_peft.exports import public_classes, stub, write_stub

PACKAGES = ["", ".callbacks", ".editing", ".effects", ".truthfulqa", ".truthfulqa.judges"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_that_dir_shows_can_be_imported(package: str) -> None:
    module = importlib.import_module(f"lightning_peft{package}")
    assert len(dir(module)) > 5 and set(dir(module)) <= {*module.__all__, "__version__"}
    assert all(getattr(module, name).__name__ for name in dir(module) if inspect.isclass(getattr(module, name)))


def test_a_star_import_brings_every_callback() -> None:
    names: dict[str, object] = {}
    exec("from lightning_peft.callbacks import *", names)
    assert names.keys() - {"__builtins__"} == set(callbacks.__all__) and {"PEFT", "LoRA", "ITI"} <= names.keys()


def test_showing_what_can_be_imported_imports_nothing() -> None:
    python("import sys, lightning_peft.callbacks as c\nassert 'LoRA' in dir(c)\nassert 'torch' not in sys.modules")


def test_a_file_exports_its_public_classes_by_being_there(tmp_path: Path) -> None:
    (tmp_path / "tuning").mkdir()
    (tmp_path / "__init__.py").write_text("class Nobody: ...\n")
    (tmp_path / "tuning" / "one.py").write_text(
        "import torch_is_not_here\n\nclass One: ...\nclass _Hidden:\n    class In: ...\n"
    )
    (tmp_path / "two.py").write_text('__all__ = [\n    "Two",\n]\n\nclass Base: ...\nclass Two(Base): ...\n')
    (tmp_path / "helpers.py").write_text("def help(): ...\n")
    assert public_classes(tmp_path) == {"tuning.one": ["One"], "two": ["Two"]}
    assert stub(tmp_path) == (
        "from .tuning.one import One as One\nfrom .two import Two as Two\n\n__all__ = ['One', 'Two']\n"
    )


def test_the_stub_of_the_callbacks_is_made_at_installation_and_has_every_name() -> None:
    written = write_stub().read_text()
    assert {line.rpartition(" as ")[2] for line in written.splitlines() if " as " in line} == set(callbacks.__all__)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "custom" in wheel["hooks"] and (ROOT / "hatch_build.py").exists()
    assert (ROOT / "lightning_peft" / "py.typed").exists()


@pytest.mark.parametrize(
    ("name", "module"),
    [("Layers", "backbone.targets"), ("answering", "positions"), ("AdapterError", "stack.adapter_files.folder")],
)
def test_what_the_pages_use_is_at_the_top(name: str, module: str) -> None:
    top = importlib.import_module("lightning_peft")
    assert getattr(top, name) is getattr(importlib.import_module(f"lightning_peft.{module}"), name)
