"""The verdict of a comparison: its numbers, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.compare.effects import price
from lightning_peft.compare.results import (
    Results,
    Row,
    check_results,
    contrast_of,
    difference_to_base,
    excludes_zero,
    holm_by_method,
    ranked_rows,
)
from lightning_peft.compare.statistics import MIN_DRAWS
from lightning_peft.compare.writing import SMALLEST_P, p_value, score, with_interval


def verdict(results: Results) -> list[str]:
    """Say in sentences what the numbers tell about MC2.

    They name the best method and its side effects, tuned against edited, the control, how draws of demonstrations
    differ, and failures.

    A difference is called resolved where its 95% interval excludes 0. Nothing is claimed beyond that.

    Args:
        results: The content of ``results.json``.

    Returns:
        Sentences or short groups of sentences, plain text.

    Raises:
        ValueError: ``results`` lacks a part that every ``results.json`` has.

    Examples:
        >>> verdict({"name": "demo", "data": {}, "model": {}, "rows": []})
        ['No method has an MC2 score, so there is nothing to rank.']
    """
    check_results(results)
    ranked = ranked_rows(results)
    if not ranked:
        return ["No method has an MC2 score, so there is nothing to rank.", *_failures(results)]
    sentences = [_best(results, ranked), *price(ranked[0]), *_tuned_or_edited(results, ranked), *_controls(ranked)]
    return [*sentences, *_draws(results), *_failures(results)]


def _best(results: Results, ranked: list[Row]) -> str:
    best = ranked[0]
    mean = score(best["metrics"]["mc2"]["mean"])
    if best["kind"] == "base":
        others = "no method raised it" if len(ranked) > 1 else "no other method was measured"
        return f"{best['label']} has the highest MC2, {mean}: {others}."
    sentence = f"{best['label']} has the highest MC2, {mean}."
    difference = difference_to_base(best, "mc2")
    if difference is None:
        return f"{sentence} Its difference to base was not measured."
    sentence += f" Its difference to base is {with_interval(difference)}: {_resolved(difference)}."
    if difference.get("mde") is not None and not excludes_zero(difference):
        sentence += (
            f" With these questions a true difference of {score(difference['mde'])} would have been found four times"
            " in five, a smaller one less often."
        )
    family = [row for row in ranked if (difference_to_base(row, "mc2") or {}).get("p") is not None]
    if len(family) > 1 and difference.get("p") is not None:
        adjusted = holm_by_method(results, "mc2")[best["method"]]
        p = p_value(adjusted) if adjusted < SMALLEST_P else f"= {p_value(adjusted)}"
        sentence += f" Corrected for the {len(family)} methods compared with base, p {p} (Holm)."
    return sentence


def _tuned_or_edited(results: Results, ranked: list[Row]) -> list[str]:
    tuned = next((row for row in ranked if row["kind"] == "tuned"), None)
    edited = next((row for row in ranked if row["kind"] == "edited"), None)
    if tuned is None or edited is None:
        return []
    names = (
        f"The best edited method is {edited['label']} ({score(edited['metrics']['mc2']['mean'])}),"
        f" the best tuned one {tuned['label']} ({score(tuned['metrics']['mc2']['mean'])})."
    )
    contrast = contrast_of(results, edited["method"], tuned["method"], "mc2")
    if contrast is None:
        return [f"{names} The difference between them was not measured."]
    return [f"{names} Edited minus tuned is {with_interval(contrast)}: {_resolved(contrast)}."]


def _controls(ranked: list[Row]) -> list[str]:
    controls = [(row, difference_to_base(row, "mc2")) for row in ranked if row["kind"] == "control"]
    return [
        f"The control {row['label']} differs from base by {with_interval(difference)}: {_resolved(difference)}."
        for row, difference in controls
        if difference is not None
    ]


def _draws(results: Results) -> list[str]:
    sentences = []
    for row in results["rows"]:
        means = (row.get("draws") or {}).get("mc2", [])
        if len(means) > 1:
            few = f": from fewer than {MIN_DRAWS} it cannot be told how draws vary" if len(means) < MIN_DRAWS else ""
            sentences.append(
                f"{row['label']}: MC2 is {score(min(means))} to {score(max(means))} over {len(means)} draws of "
                f"demonstrations; its interval holds for {'these draws' if few else 'other draws too'}{few}."
            )
    return sentences


def _failures(results: Results) -> list[str]:
    failed = [row["label"] for row in results["rows"] if row.get("failed")]
    return [f"Failed, and so not ranked: {', '.join(failed)}."] if failed else []


def _resolved(value: Mapping[str, Any]) -> str:
    return "resolved" if excludes_zero(value) else "not resolved, the interval includes 0"
