"""The laws every adaptation obeys, as a kit for methods of your own: `check_adaptation(make_module, callback)`.

`python -m lightning_peft.testing` runs them for every method of this package on every architecture and prints a table.
"""

from __future__ import annotations

from lightning_peft.testing.check import Outcome, check_adaptation
from lightning_peft.testing.comparing import LawBroken
from lightning_peft.testing.laws import LAWS

__all__ = ["LAWS", "LawBroken", "Outcome", "check_adaptation"]
