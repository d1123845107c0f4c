"""Side effects of every row as a further table: put together over folds, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.section import Section

if TYPE_CHECKING:
    from lightning_peft.truthfulqa.task import TruthfulQA

EFFECTS = {
    "ce": Measure(
        "CE",
        "cross-entropy on neutral text, in nats per token; what it rises by has been forgotten of the language",
        -1,
        range=(0, None),
        written=".3f",
    ),
    "kl": Measure(
        "KL",
        "divergence of the adapted model from the base on the same text, in nats per token; 0 is no change",
        -1,
        range=(0, None),
        written=".3f",
    ),
    "capability": Measure(
        "Capability",
        "share of simple questions answered rightly, after four demonstrations",
        range=(0, 1),
        written=".3f",
    ),
    "forgotten": Measure(
        "Forgotten",
        "share of the simple questions which the base answers rightly that are answered wrongly",
        -1,
        range=(0, 1),
        written=".3f",
    ),
}


class SideEffectsSection(Section):
    """What each row costs on neutral text and on simple questions.

    Args:
        task: whose side effects they are.
    """

    name = "side_effects"
    title = "Side effects"
    measures = EFFECTS
    unit = "document or question"
    price = "On neutral text it changes cross-entropy by {ce:+} nats per token; KL from base is {kl}."

    def __init__(self, task: TruthfulQA) -> None:
        self.task = task

    def scores(self, cells: Sequence[Cell], base: Sequence[Cell]) -> dict[str, dict[int, float]]:
        scores = effect_scores([cell.result["effects"] for cell in cells])
        known = effect_scores([cell.result["effects"] for cell in base]).get("capability", {})
        if "capability" in scores and any(known.values()):
            scores["forgotten"] = forgotten_scores(known, scores["capability"])
        return scores

    def notes(self, results: Mapping[str, Any]) -> list[str]:
        notes, text = ["A prompt alone leaves the model as it is."], results["data"].get("text")
        if text:
            notes.append(
                f"Neutral text: {text['documents']} documents, {text['source']}, SHA-256 {text['sha256'][:12]}."
            )
        return notes


def effect_scores(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the score of each document or question by each effect, the mean over the folds' adapters.

    Args:
        cells: the `effects` of a row's finished cells; those in which nothing was measured are passed over.

    Returns:
        `ce`, `kl` and `capability`, as far as they were measured. A document's score is scaled by its number of tokens,
        so that the mean over documents is the mean over tokens.

    Example:
        >>> effect_scores([{"documents": [[10, 20.0, 30.0, 5.0], [30, 60.0, 90.0, 3.0]], "capability": {"7": 1.0}}])
        {'ce': {0: 1.5, 1: 4.5}, 'kl': {0: 0.25, 1: 0.15}, 'capability': {7: 1.0}}
    """
    scores: dict[str, dict[int, float]] = {}
    texts = [cell["documents"] for cell in cells if cell.get("documents")]
    if texts:
        mean_tokens = sum(document[0] for document in texts[0]) / len(texts[0])
        for name, column in (("ce", 2), ("kl", 3)):
            by_document = [_mean([text[i][column] for text in texts]) / mean_tokens for i in range(len(texts[0]))]
            if not any(math.isnan(value) for value in by_document):  # an adapter that cannot be switched off has no KL
                scores[name] = dict(enumerate(by_document))
    answers = [cell["capability"] for cell in cells if cell.get("capability")]
    if answers:
        scores["capability"] = {int(i): _mean([answer[i] for answer in answers]) for i in answers[0]}
    return scores


def forgotten_scores(before: Mapping[int, float], after: Mapping[int, float]) -> dict[int, float]:
    """Return the part of each simple question in `forgotten`, scaled so that the mean over questions is that share.

    Example:
        >>> forgotten_scores({0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}, {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0})
        {0: 0.0, 1: 2.0, 2: 0.0, 3: 0.0}
    """
    right = sum(before.values())
    return {i: max(0.0, before[i] - after[i]) * len(before) / right for i in before} if right else {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
