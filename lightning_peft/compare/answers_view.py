"""The view of free answers, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.compare.measured import Measure, measured_view

MEASURES = {
    "bleu_acc": Measure("BLEU", "share of answers that are liker, by BLEU, to a true reference than to any false one"),
    "rouge1_acc": Measure("ROUGE-1", "the same by ROUGE-1"),
    "true": Measure("True", "share of answers that the truth judge calls true"),
    "info": Measure("Info", "share of answers that the info judge calls informative"),
    "true_info": Measure("True*Info", "share of answers that are called both"),
}


def answers_view(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the terminal and the page show of free answers; see `measured_view`."""
    settings = results.get("answers")
    if not settings:
        return None
    notes = [f"Greedy answers, preset {settings['preset']}, of at most {settings['max_new_tokens']} tokens."]
    silent = [row["label"] for row in results["rows"] if "bleu_acc" not in (row.get("metrics") or {})]
    if silent:
        notes.append(f"Without answers: {', '.join(silent)}.")
    if settings["judges"]:
        notes.append(
            "Differences are of what the judges say; corrected: their errors taken out, which its interval holds."
        )
    notes += [_quality(kind, judge) for kind, judge in settings["judges"].items()]
    view = measured_view(results, "Free answers", MEASURES, notes)
    if view is None:
        return None
    rates = {row["method"]: row.get("rates") or {} for row in results["rows"]}
    for row in view["rows"]:
        for column, cell in zip(view["columns"], row["cells"], strict=True):
            if rate := rates[row["method"]].get(column["name"]):
                cell["below"] = f"corrected {rate['corrected']:.3f}\n[{rate['low']:.3f}, {rate['high']:.3f}]"
    return view


def _quality(kind: str, judge: Mapping[str, Any]) -> str:
    sentence = (
        f"The {kind} judge ({judge['folder']}): accuracy {judge['accuracy']:.3f}, AUROC {judge['auroc']:.3f} on "
        f"{judge['judgements']} held-out judgements; always giving the commoner verdict: {judge['majority']:.3f}."
    )
    if judge["accuracy"] > judge["majority"]:
        return sentence
    return f"{sentence} It is no better than that: do not rely on its verdicts."
