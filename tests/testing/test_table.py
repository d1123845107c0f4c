"""A subset of the table of laws that touches every method and every architecture.

`python -m lightning_peft.testing` runs the whole of it.
"""

from __future__ import annotations

import pytest

from lightning_peft.testing.architectures import ARCHITECTURES
from lightning_peft.testing.methods import METHODS
from lightning_peft.testing.table import broken, reasons, run

EACH = 2  # architectures a method


def subset() -> list[tuple[str, str]]:
    """Each method on a few architectures that have what it needs, another choice for each method."""
    cells = []
    for number, (name, method) in enumerate(METHODS.items()):
        able = [a for a, architecture in ARCHITECTURES.items() if method.needs <= architecture.has]
        step = max(1, len(able) // EACH)
        cells += [(name, able[(number + i * step) % len(able)]) for i in range(min(EACH, len(able)))]
    return cells


CELLS = subset()
# it loads a model twenty times, and its calls differ between methods more than between architectures
ONCE = {cell: ["citizen"] for cell in CELLS if cell[0] in [method for method, _ in CELLS[: CELLS.index(cell)]]}


def test_the_subset_touches_every_method_and_every_architecture() -> None:
    assert {method for method, _ in CELLS} == set(METHODS)
    assert {architecture for _, architecture in CELLS} == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_laws_hold(architecture: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = {} if request.config.getoption("--thorough") else ONCE
    results = run([(method, name) for method, name in CELLS if name == architecture], left_out)
    with capsys.disabled():
        print(f"\n{architecture}: {', '.join(method for method, _ in results)}")
        print(*(f"  {line}" for line in reasons(results)), sep="\n")
    assert not broken(results)
    for cell, outcomes in results.items():
        held = {outcome.law for outcome in outcomes if outcome.holds}
        assert {"frozen", "off", "round trip"} <= held, f"{cell} must at least be frozen, off and round trip"
