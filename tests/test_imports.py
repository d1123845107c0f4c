"""Who imports whom, and what importing this package brings along."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tuning import ROOT, python

PACKAGE = ROOT / "lightning_peft"

# -- one direction --------------------------------------------------------------------------------------------------

# Rooms from the ground up: one may import those on lower floors, and none on its own or above.
FLOORS = [
    {"exports", "files", "moved", "per_thread", "prompt_end", "replaced", "tokens"},
    {"backbone", "positions"},
    {"stack"},
    {"effects", "packing", "tuners"},
    {"adapterhub", "editing"},
    {"fitting"},
    {"callbacks", "checkpoint", "data", "models"},
    {"generation"},
    {"tasks"},
    {"truthfulqa"},
    {"planning"},
    {"compare", "harness", "testing"},
    {"sweep"},
    {"attribution"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# rooms that do not touch the numerics, and what they are kept free of
WITHOUT = {"files": {"torch", "lightning"}, "backbone": {"lightning"}, "stack": {"lightning"}, "tuners": {"lightning"}}


def imported(source: str, package: str = "") -> set[str]:
    """What a file imports, anywhere in it: parts of this package by their first name, others by theirs."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            modules |= {f"{base}.{alias.name}" for alias in node.names}
    return {m.removeprefix("lightning_peft.").split(".")[0] for m in modules}


def files(room: str) -> list[Path]:
    path = PACKAGE / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def rooms() -> list[str]:
    found = (path.with_suffix("").name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir())
    return sorted(name for name in found if not name.startswith("_"))


def test_every_room_has_a_floor() -> None:
    assert set(rooms()) <= set(FLOOR)


@pytest.mark.parametrize("room", rooms())
def test_imports_go_down(room: str) -> None:
    wrong = {}
    for file in files(room):
        package = ".".join(file.relative_to(ROOT).parts[:-1])
        names = imported(file.read_text(), package)
        others = {name for name in names & FLOOR.keys() if name != room}
        upward = {name for name in others if FLOOR[name] >= FLOOR[room]}
        upward |= names & WITHOUT.get(room, set())
        if upward:
            wrong[str(file.relative_to(ROOT))] = upward
    assert wrong == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import lightning as L", {"lightning"}),
        ("from lightning_peft.fitting.peft import PEFT", {"fitting"}),
        ("from lightning_peft import callbacks, checkpoint", {"callbacks", "checkpoint"}),
        ("from ..callbacks import PEFT", {"callbacks"}),
        ("from . import stack", {"tuners"}),
        ("def f():\n    import lightning_peft.models", {"models"}),
        ("if TYPE_CHECKING:\n    from lightning_peft.compare.plan import Plan", {"compare"}),
    ],
)
def test_every_kind_of_import_is_seen(source: str, found: set[str]) -> None:
    assert imported(source, "lightning_peft.tuners") == found


# -- what importing brings along ------------------------------------------------------------------------------------

HEAVY = """
import sys
heavy = {"peft", "bitsandbytes", "transformers"}
import lightning_peft
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "torch" not in sys.modules

import lightning  # torchmetrics looks at transformers by itself
before = set(sys.modules)
import lightning_peft.callbacks
from lightning_peft.callbacks import ITI, PEFT, LoRA
import lightning_peft.fitting.checkpoints
import lightning_peft.cli
import lightning_peft.models
LoRA(r=2), ITI()
assert not {"peft", "bitsandbytes"} & set(sys.modules)
assert not [m for m in set(sys.modules) - before if m.split(".")[0] in heavy]
"""


def test_importing_the_package_loads_neither_peft_nor_bitsandbytes_nor_transformers() -> None:
    python(HEAVY)


ORDERS = {
    "ours first": "import lightning_peft\nimport peft",
    "peft first": "import peft\nimport lightning_peft",
    # as transformers does in every from_pretrained
    "asked for between": "import lightning_peft, importlib.util\nimportlib.util.find_spec('peft')\nimport peft",
}
READ = """
import sys
from tiny_models import tiny
from tuning import weights
import torch

assert "HEAD_OFFSETS" in peft.PeftType.__members__
model = peft.PeftModel.from_pretrained(tiny("llama"), sys.argv[1])
assert type(model.peft_config["default"]).__name__ == "HeadOffsetsConfig"
assert all((value == 0.5).all() for name, value in weights(model).items() if "head_offsets" in name)
print(sum("head_offsets" in name for name in weights(model)))
"""


@pytest.fixture(scope="module")
def head_offsets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of head offsets, all 0.5, on a tiny LLaMA."""
    from tiny_models import tiny

    from lightning_peft import save_adapter
    from lightning_peft.editing import head_offsets_config, head_sites
    from lightning_peft.stack.stack import stack_of

    model = tiny("llama")
    stack = stack_of(model)
    part = stack.add(head_offsets_config(head_sites(model), [(0, 1), (2, 3)], 1.0, "all"), computed=True)
    for tensor in stack.tensors(part).values():
        tensor.fill_(0.5)
    return save_adapter(model, tmp_path_factory.mktemp("head_offsets"))


@pytest.mark.parametrize("order", ORDERS)
def test_peft_reads_our_methods_in_either_order_of_import(order: str, head_offsets: Path) -> None:
    assert python(f"{ORDERS[order]}\n{READ}", head_offsets).split()[-1] == "2"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import lightning_peft
    import lightning_peft.callbacks

    for module in (lightning_peft, lightning_peft.callbacks):
        with pytest.raises(AttributeError, match="attribute Lora"):
            _ = module.Lora
        assert all(getattr(module, name) is not None for name in module.__all__)
