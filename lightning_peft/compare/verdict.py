"""The verdict of a comparison: its numbers, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_peft.compare.results import (
    Results,
    Row,
    check_results,
    completed,
    contrast_of,
    difference_to_base,
    excludes_zero,
    holm_by_method,
    measure_named,
    outside_range,
    plural_unit,
    ranked_rows,
)
from lightning_peft.compare.sections import prices
from lightning_peft.compare.statistics import MIN_DRAWS
from lightning_peft.compare.writing import SMALLEST_P, p_value, score, with_article, with_interval
from lightning_peft.tasks.measure import Measure


def verdict(results: Results) -> list[str]:
    """Say in sentences what the numbers tell about the measure that ranks the rows.

    They name the best method and its side effects, tuned against edited, the control, how draws of demonstrations
    differ, failures, and values that cannot be.

    A difference is called resolved where its 95% interval excludes 0. Nothing is claimed beyond that.

    Args:
        results: The content of ``results.json``.

    Returns:
        Sentences or short groups of sentences, plain text.

    Raises:
        ValueError: ``results`` lacks a part that every ``results.json`` has.

    Examples:
        >>> verdict({"name": "demo", "data": {}, "model": {}, "measures": {"f1": {"label": "F1"}}, "rows": []})
        ['No method has an F1 score, so there is nothing to rank.']
    """
    check_results(results)
    results = completed(results)
    name, ranked = results["primary"], ranked_rows(results)
    primary = measure_named(results, name)
    if ranked:
        sentences = [_best(results, name, primary, ranked), *prices(results, ranked[0])]
        sentences += [*_tuned_or_edited(results, name, primary, ranked), *_controls(name, primary, ranked)]
        sentences += [*_draws(results, name, primary), *_seeds(results, name, primary)]
    else:
        sentences = [_nothing_ranked(results, name, primary)]
    return [*sentences, *_failures(results), *_outside(results)]


def _nothing_ranked(results: Results, name: str, primary: Measure) -> str:
    if primary.better == 0 and any(name in row["metrics"] for row in results["rows"]):
        return f"Nothing in the results says whether more or less {primary.label} is better, so nothing is ranked."
    return f"No method has {with_article(primary.label or 'primary')} score, so there is nothing to rank."


def _best(results: Results, name: str, primary: Measure, ranked: list[Row]) -> str:
    best = ranked[0]
    extreme, moved = ("highest", "raised") if primary.better > 0 else ("lowest", "lowered")
    mean = score(best["metrics"][name]["mean"], primary.written)
    sentence = f"{best['label']} has the {extreme} {primary.label}, {mean}"
    if best["kind"] == "base":
        others = f"no method {moved} it" if len(ranked) > 1 else "no other method was measured"
        return f"{sentence}: {others}."
    difference = difference_to_base(best, name)
    if difference is None:
        return f"{sentence}. Its difference to base was not measured."
    change = with_interval(difference, primary.written)
    sentence += f". Its difference to base is {change}: {_resolved(difference)}."
    if difference.get("mde") is not None and not excludes_zero(difference):
        sentence += (
            f" With these {plural_unit(results)} a true difference of {score(difference['mde'], primary.written)} would"
            " have been found four times in five, a smaller one less often."
        )
    family = [row for row in ranked if (difference_to_base(row, name) or {}).get("p") is not None]
    if len(family) > 1 and difference.get("p") is not None:
        adjusted = holm_by_method(results, name)[best["method"]]
        p = p_value(adjusted) if adjusted < SMALLEST_P else f"= {p_value(adjusted)}"
        sentence += f" Corrected for the {len(family)} methods compared with base, p {p} (Holm)."
    return sentence


def _tuned_or_edited(results: Results, name: str, primary: Measure, ranked: list[Row]) -> list[str]:
    tuned = next((row for row in ranked if row["kind"] == "tuned"), None)
    edited = next((row for row in ranked if row["kind"] == "edited"), None)
    if tuned is None or edited is None:
        return []
    of_edited, of_tuned = (score(row["metrics"][name]["mean"], primary.written) for row in (edited, tuned))
    names = (
        f"The best edited method is {edited['label']} ({of_edited}), the best tuned one {tuned['label']} ({of_tuned})."
    )
    contrast = contrast_of(results, edited["method"], tuned["method"], name)
    if contrast is None:
        return [f"{names} The difference between them was not measured."]
    return [f"{names} Edited minus tuned is {with_interval(contrast, primary.written)}: {_resolved(contrast)}."]


def _controls(name: str, primary: Measure, ranked: list[Row]) -> list[str]:
    controls = [(row, difference_to_base(row, name)) for row in ranked if row["kind"] == "control"]
    return [
        f"The control {row['label']} differs from base by {with_interval(difference, primary.written)}:"
        f" {_resolved(difference)}."
        for row, difference in controls
        if difference is not None
    ]


def _draws(results: Results, name: str, primary: Measure) -> Iterator[str]:
    for row in results["rows"]:
        means = (row.get("draws") or {}).get(name) or []
        if len(means) > 1:
            few = f": from fewer than {MIN_DRAWS} it cannot be told how draws vary" if len(means) < MIN_DRAWS else ""
            least, most = (score(mean, primary.written) for mean in (min(means), max(means)))
            yield (
                f"{row['label']}: {primary.label} is {least} to {most} over {len(means)} draws of demonstrations; its "
                f"interval holds for {'these draws' if few else 'other draws too'}{few}."
            )


def _seeds(results: Results, name: str, primary: Measure) -> Iterator[str]:
    """Say what the intervals hold for, and which row varies most from seed to seed."""
    seeds = results.get("seeds") or []
    if len(seeds) < 2:
        return
    if len(seeds) < MIN_DRAWS:
        number = {2: "Two", 3: "Three", 4: "Four"}[len(seeds)]
        yield (
            f"{number} seeds; intervals are over {plural_unit(results)} alone (from five seeds on they include seeds)."
        )
    else:
        yield f"{len(seeds)} seeds; intervals are over {plural_unit(results)} and seeds."
    spread = [
        (max(means) - min(means), row) for row in results["rows"] if (means := (row.get("seeds") or {}).get(name))
    ]
    if spread:
        _, row = max(spread, key=lambda entry: entry[0])
        means = " ".join(score(mean, primary.written) for mean in row["seeds"][name])
        yield f"Most differs from seed to seed {row['label']}: {primary.label} {means}."


def _failures(results: Results) -> list[str]:
    failed = [row["label"] for row in results["rows"] if row["failed"]]
    return [f"Failed, and so not ranked: {', '.join(failed)}."] if failed else []


def _outside(results: Results) -> Iterator[str]:
    for row, measure, mean in outside_range(results):
        low, high = measure.range
        least, most = ("any" if end is None else score(end, measure.written) for end in (low, high))
        yield (
            f"{row['label']}: {measure.label} is {score(mean, measure.written)}, but its least value is {least} and "
            f"its greatest {most}: do not rely on it."
        )


def _resolved(value: Mapping[str, Any]) -> str:
    return "resolved" if excludes_zero(value) else "not resolved, the interval includes 0"
