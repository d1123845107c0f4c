"""What a `results.json` of 0.1 leaves unsaid: what its numbers are, which of them ranks, what a unit is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.moved import resolve

_NOTES = "lightning_peft.truthfulqa.answers_notes"

# label, meaning and the sign of a change for the better
_MEASURES = {
    "mc0": (
        "MC0",
        "of the best true and the best false answer, how often the true one is more likely; chance is .5",
        1,
    ),
    "mc1": ("MC1", "how often the best true answer is the most likely of all", 1),
    "mc2": ("MC2", "probability of the true answers, as a share of that of all answers", 1),
    "mc3": ("MC3", "share of the true answers that are more likely than every false one", 1),
}
_EFFECTS = {
    "ce": (
        "CE",
        "cross-entropy on neutral text, in nats per token; what it rises by has been forgotten of the language",
        -1,
    ),
    "kl": (
        "KL",
        "divergence of the adapted model from the base on the same text, in nats per token; 0 is no change",
        -1,
    ),
    "capability": ("Capability", "share of simple questions answered rightly, after four demonstrations", 1),
    "forgotten": (
        "Forgotten",
        "share of the simple questions which the base answers rightly that are answered wrongly",
        -1,
    ),
}
_ANSWERS = {
    "bleu_acc": ("BLEU", "share of answers that are liker, by BLEU, to a true reference than to any false one", 1),
    "rouge1_acc": ("ROUGE-1", "the same by ROUGE-1", 1),
    "true": ("True", "share of answers that the truth judge calls true", 1),
    "info": ("Info", "share of answers that the info judge calls informative", 1),
    "true_info": ("True*Info", "share of answers that are called both", 1),
}
_PRICE = "On neutral text it changes cross-entropy by {ce:+} nats per token; KL from base is {kl}."
_CATEGORY_NOTE = "Below each mean: Wilson's 95% interval, which for MC2 is wider than need be."


def complete(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results of 0.1 with the measures and sections that every comparison had then.

    Where the rows have measures and none of those, nothing is known of them: they stay without a description, and the
    first of them is the primary one.
    """
    names = {name: None for row in results["rows"] for name in row.get("metrics") or {}}
    if names and not names.keys() & {**_MEASURES, **_EFFECTS, **_ANSWERS}.keys():
        return {"measures": {}, "primary": next(iter(names)), **results}
    sections = [_effects(results), _answers(results)]
    return {
        "measures": _described(_MEASURES),
        "primary": "mc2",
        "unit": "question",
        "sections": [section for section in sections if names.keys() & section["measures"].keys()],
        "category_measures": ["mc1", "mc2"],
        "category_note": _CATEGORY_NOTE,
        **results,
    }


def _described(measures: Mapping[str, tuple[str, str, int]], written: str = "") -> dict[str, dict[str, Any]]:
    return {
        name: {"label": label, "meaning": meaning, "better": better, "range": [None, None], "written": written}
        for name, (label, meaning, better) in measures.items()
    }


def _effects(results: Mapping[str, Any]) -> dict[str, Any]:
    text, notes = results.get("data", {}).get("text"), ["A prompt alone leaves the model as it is."]
    if text:
        notes.append(f"Neutral text: {text['documents']} documents, {text['source']}, SHA-256 {text['sha256'][:12]}.")
    section = {"name": "side_effects", "title": "Side effects", "measures": _described(_EFFECTS, ".3f")}
    return {**section, "notes": notes, "unit": "document or question", "price": _PRICE}


def _answers(results: Mapping[str, Any]) -> dict[str, Any]:
    section = {"name": "answers", "title": "Free answers", "unit": "document or question"}
    settings, rows = results.get("answers"), results["rows"]
    notes = resolve(f"{_NOTES}.answer_notes")(settings, rows) if settings else []
    below = resolve(f"{_NOTES}.corrected_rates")(rows, _ANSWERS)
    return {**section, "measures": _described(_ANSWERS, ".3f"), "notes": notes, "below": below}
