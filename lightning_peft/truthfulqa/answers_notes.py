"""What stands below the table of free answers, from a `results.json` of this or an earlier release."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def answer_notes(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how answers were asked for, which rows have none, and how far the judges can be trusted.

    Args:
        settings: the `answers` of the results.
        rows: the `rows` of the results.
    """
    notes = [f"Greedy answers, preset {settings['preset']}, of at most {settings['max_new_tokens']} tokens."]
    silent = [row.get("label") or "" for row in rows if "bleu_acc" not in (row.get("metrics") or {})]
    if silent:
        notes.append(f"Without answers: {', '.join(silent)}.")
    if settings["judges"]:
        notes.append(
            "Differences are of what the judges say; corrected: their errors taken out, which its interval holds."
        )
    return notes + [_quality(kind, judge) for kind, judge in settings["judges"].items()]


def corrected_rates(rows: Sequence[Mapping[str, Any]], measures: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the rates of rows corrected for their judges' errors, as lines to say below values, by row and measure."""
    return {
        row["method"]: {
            name: f"corrected {rate['corrected']:.3f}\n[{rate['low']:.3f}, {rate['high']:.3f}]"
            for name, rate in row["rates"].items()
            if name in measures
        }
        for row in rows
        if "method" in row and row.get("rates")
    }


def _quality(kind: str, judge: Mapping[str, Any]) -> str:
    sentence = (
        f"The {kind} judge ({judge['folder']}): accuracy {judge['accuracy']:.3f}, AUROC {judge['auroc']:.3f} on "
        f"{judge['judgements']} held-out judgements; always giving the commoner verdict: {judge['majority']:.3f}."
    )
    if judge["accuracy"] > judge["majority"]:
        return sentence
    return f"{sentence} It is no better than that: do not rely on its verdicts."
