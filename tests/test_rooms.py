"""What belongs to the benchmark stands in its room: code elsewhere names neither it nor what it measures."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tuning import ROOT

PACKAGE = ROOT / "lightning_peft"
# the benchmark itself; commands, which may have it for a default; what older plans and results meant
MAY = {"truthfulqa", "cli", "moved"}
NAMES = re.compile(
    r"truthful_?qa|\bmc_?[0-3]\b|_mc[0-3]|\bbleu_acc\b|\brouge1_acc\b|\btrue_info\b|\binfo_judge\b|\btruth_judge\b",
    re.IGNORECASE,
)


def code(source: str) -> str:
    """A file without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def elsewhere() -> list[Path]:
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".jinja"))
    return sorted(path for path in files if path.parts[0] not in MAY)


@pytest.mark.parametrize("path", elsewhere(), ids=str)
def test_nothing_names_the_benchmark_outside_its_room(path: Path) -> None:
    text = (PACKAGE / path).read_text(encoding="utf-8")
    assert NAMES.findall(code(text) if path.suffix == ".py" else text) == []


def test_a_name_in_code_is_seen_and_one_in_a_docstring_is_not() -> None:
    assert NAMES.findall(code('"""TruthfulQA."""\nfrom lightning_peft.truthfulqa import MC2  # mc1')) == [
        "truthfulqa",
        "MC2",
    ]
    assert not NAMES.findall(code('def f():\n    """MC2."""'))
