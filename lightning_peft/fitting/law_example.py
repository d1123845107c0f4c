"""The example on which the laws of adaptation are run for a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LawExample:
    """One row of the table of laws: the settings that a method has there.

    Args:
        arguments: of the callback, beside its defaults; small ones, since every law trains its own.
        needs: features that a backbone must have: `"attention"`, `"mlp"`, `"transformers"`, `"tokens"`, `"decoder"`,
            `"position_ids"`, `"stream"` or `"norms"`.
        four_bits: quantise the backbone first.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    four_bits: bool = False
