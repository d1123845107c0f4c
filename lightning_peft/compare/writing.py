"""The form of numbers, in the terminal and on the page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

SMALLEST_P = 0.001  # smaller ones are written "< .001": 10,000 resamples cannot tell them apart


def score(value: float | None) -> str:
    """Write a score as ``.451``: scores lie in [0, 1], so the leading zero says nothing."""
    if value is None:
        return "-"
    text = f"{value + 0.0:.3f}"  # a contrast turned round may hold -0.0
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def signed(value: float) -> str:
    """Write a difference of scores as `+.451`."""
    text = score(value)
    return text if text.startswith("-") else f"+{text}"


def interval(value: Mapping[str, Any]) -> str:
    """Write an interval as `[+.060, +.137]`."""
    return f"[{signed(value['low'])}, {signed(value['high'])}]"


def with_interval(value: Mapping[str, Any]) -> str:
    """Write a difference and its interval, for a sentence."""
    return f"{signed(value['mean'])} (95% interval {signed(value['low'])} to {signed(value['high'])})"


def p_value(value: float | None) -> str:
    """Write a p-value as `.020`, or `< .001` where resamples cannot tell."""
    if value is None:
        return "-"
    return "< .001" if value < SMALLEST_P else score(value)


def minus(text: str) -> str:
    """Replace minus and dash by the typographic ones, which the terminal's encoding may lack but a page never does."""
    return "\N{EN DASH}" if text == "-" else re.sub(r"(?<!\w)-(?=\.?\d)", "\N{MINUS SIGN}", text)


def count(value: int | None) -> str:
    """Write a number of parameters: `442,368`, `135M`."""
    if not value:
        return "-"
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,}"


def size(value: int | None) -> str:
    """Write a number of bytes: `1.78 MB`."""
    if not value:
        return "-"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value} B"


def seconds(value: float | None) -> str:
    """Write a duration, with a decimal where it is short."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def indented(value: object, indent: int | None = 2) -> str:
    """Write a value as JSON, whatever it holds."""
    return json.dumps(value, indent=indent, default=str, ensure_ascii=False)
