"""What is said of side effects in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.compare.measured import Measure, measured_view
from lightning_peft.truthfulqa.side_effects_section import EFFECTS as _EFFECTS
from lightning_peft.truthfulqa.side_effects_section import effect_scores as effect_scores
from lightning_peft.truthfulqa.side_effects_section import forgotten_scores as forgotten_scores

EFFECTS = {name: Measure(m.label, m.meaning, m.better) for name, m in _EFFECTS.items()}


def price(row: Mapping[str, Any]) -> list[str]:
    """Return a sentence on what a row changes beside the benchmark; none for the base, or without measurements."""
    change, kl = (row.get("difference") or {}).get("ce"), (row.get("metrics") or {}).get("kl")
    if change is None or kl is None:
        return []
    interval = f"{change['mean']:+.3f} (95% interval {change['low']:+.3f} to {change['high']:+.3f})"
    return [f"On neutral text it changes cross-entropy by {interval} nats per token; KL from base is {kl['mean']:.3f}."]


def effects_view(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the terminal and the page show of side effects; see `measured_view`."""
    text, notes = results["data"].get("text"), ["A prompt alone leaves the model as it is."]
    if text:
        notes.append(f"Neutral text: {text['documents']} documents, {text['source']}, SHA-256 {text['sha256'][:12]}.")
    return measured_view(results, "Side effects", EFFECTS, notes)
