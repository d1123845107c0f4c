"""Each own method computes what the peer's implementation of it computed, within the tolerance that its row states."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity.comparison import Comparison
from parity.rows import comparisons


@pytest.mark.parametrize("row", comparisons(), ids=str)
def test_the_method_computes_what_the_peer_computes(row: Comparison) -> None:
    difference = row.difference()
    assert difference.outputs <= row.outputs
    assert difference.gradients is None or difference.gradients <= row.gradients
    assert difference.parameters is None or difference.parameters[0] == difference.parameters[1]


def test_the_page_shows_every_row() -> None:
    lines = Path(__file__).parents[2].joinpath("docs/parity.md").read_text().splitlines()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    rows = [[row.method, row.peer, row.architecture] for row in comparisons()]
    assert [cells[:3] for cells in shown[1:]] == rows
