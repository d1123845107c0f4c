"""The view of scores by category, for the page."""

from __future__ import annotations

from typing import Any

from lightning_peft.compare.results import Results, measure_named
from lightning_peft.compare.writing import listed

SMALL = 10  # units of a category below which its mean says little
_NOTE = "Below each mean: Wilson's 95% interval, which is wider than need be where scores are not 0 or 1."


def categories_view(results: Results) -> dict[str, Any]:
    """Return what the page shows of `categories`: a row a category, a column for each method and measure.

    Args:
        results: completed. `category_measures` names the measures, else they are those that any category has;
            `category_note` says what intervals are below the means.
    """
    categories, labels = results.get("categories") or {}, {row["method"]: row["label"] for row in results["rows"]}
    methods = [method for method in labels if any(method in scores for scores in categories.values())]
    names = results.get("category_measures") or _measured(categories, methods)
    measures = {name: measure_named(results, name) for name in names}
    return {
        "methods": [labels[method] for method in methods],
        "measures": [measure.label for measure in measures.values()],
        "title": listed([measure.label for measure in measures.values()]),
        "note": results.get("category_note") or _NOTE,
        "small": SMALL,
        "rows": [
            {
                "name": name,
                "n": scores.get("n"),
                "small": (scores.get("n") or SMALL) < SMALL,
                "cells": [
                    {"score": (scores.get(method) or {}).get(measure), "written": measures[measure].written}
                    for method in methods
                    for measure in measures
                ],
            }
            for name, scores in categories.items()
        ],
    }


def _measured(categories: Any, methods: list[str]) -> list[str]:
    return list({name: None for scores in categories.values() for m in methods for name in scores.get(m) or {}})
