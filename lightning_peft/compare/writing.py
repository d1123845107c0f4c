"""The form of numbers, in the terminal and on the page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

SMALLEST_P = 0.001  # smaller ones are written "< .001": 10,000 resamples cannot tell them apart


def score(value: float | None, written: str = "") -> str:
    """Write a value in a measure's format; by default as ``.451``, for in [0, 1] the leading zero says nothing."""
    if value is None:
        return "-"
    text = format(value + 0.0, written or ".3f")  # a contrast turned round may hold -0.0
    if written and text.startswith("-") and not re.search("[1-9]", text):
        return text[1:]  # "-0" looks like a mistake; "-.000" is how a bound below 0 is told from one above it
    return text.replace("0.", ".", 1) if not written and text.startswith(("0.", "-0.")) else text


def signed(value: float | None, written: str = "") -> str:
    """Write a difference of values as `+.451`, and one below 0 that is rounded to it without a sign."""
    text = score(value, written)
    return text if text.startswith("-") or (value or 0.0) < 0 else f"+{text}"


def interval(value: Mapping[str, Any], written: str = "") -> str:
    """Write an interval as `[+.060, +.137]`."""
    return f"[{signed(value.get('low'), written)}, {signed(value.get('high'), written)}]"


def with_interval(value: Mapping[str, Any], written: str = "") -> str:
    """Write a difference and its interval, for a sentence."""
    low, high = (signed(value.get(end), written) for end in ("low", "high"))
    return f"{signed(value['mean'], written)} (95% interval {low} to {high})"


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


def plural(noun: str) -> str:
    """Return the plural of a regular noun, such as what a unit is called.

    Example:
        >>> plural("question"), plural("query"), plural("patch")
        ('questions', 'queries', 'patches')
    """
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "z", "ch", "sh")) else f"{noun}s"


def initial(text: str) -> str:
    """Return a text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def with_article(label: str) -> str:
    """Return a measure's label after "a" or "an", as it is spoken: an abbreviation letter by letter.

    Example:
        >>> with_article("accuracy"), with_article("F1"), with_article("MCC"), with_article("BLEU")
        ('an accuracy', 'an F1', 'an MCC', 'a BLEU')
    """
    spelt = len(label) > 1 and label[0].isupper() and not label[1].islower()
    return f"{'an' if label[:1] in ('AEFHILMNORSX' if spelt else 'AEIOaeiou') else 'a'} {label}"


def listed(words: Sequence[str]) -> str:
    """Write words as `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
