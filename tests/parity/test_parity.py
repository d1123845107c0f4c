"""Each own method computes what the peer's implementation of it computed, within the tolerance that its row states."""

from __future__ import annotations

import pytest
from parity.comparison import Comparison
from parity.rows import comparisons


@pytest.mark.parametrize("row", comparisons(), ids=str)
def test_the_method_computes_what_the_peer_computes(row: Comparison) -> None:
    difference = row.difference()
    assert difference.outputs <= row.outputs
    assert difference.gradients is None or difference.gradients <= row.gradients
    assert difference.parameters is None or difference.parameters[0] == difference.parameters[1]
