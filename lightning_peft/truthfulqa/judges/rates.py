"""True, Info and True×Info of a model's answers, with intervals that hold the judges' own errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_peft.truthfulqa.judges.quality import THRESHOLD, Confusion

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """A share of answers, from 0 to 1.

    Args:
        judged: what the judges say, as the literature reports it.
        judged_low: lower end of its interval: other questions.
        judged_high: upper end.
        corrected: with the judges' errors taken out; None where no confusion was given.
        low: lower end of the corrected interval: other questions and the judges' errors.
        high: upper end.
    """

    judged: float
    judged_low: float
    judged_high: float
    corrected: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TrueInfo:
    """The rates of true and of informative answers of a model, by two judges.

    Args:
        true: share of true answers.
        info: share of informative answers.
        product_of_means: True×Info as the original computes it, `true · info`.
        mean_of_products: share of answers that are both.
        level: of the intervals.
    """

    true: Rate
    info: Rate
    product_of_means: Rate
    mean_of_products: Rate
    level: float


# of a table of shares [..., true or not, informative or not], yes first
_MEASURES: Mapping[str, Callable[[Floats], Floats]] = {
    "true": lambda table: table[..., 0, :].sum(-1),
    "info": lambda table: table[..., :, 0].sum(-1),
    "product_of_means": lambda table: table[..., 0, :].sum(-1) * table[..., :, 0].sum(-1),
    "mean_of_products": lambda table: table[..., 0, 0],
}


def true_info(
    truth: Tensor,
    info: Tensor,
    truth_confusion: Confusion | None = None,
    info_confusion: Confusion | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> TrueInfo:
    """Estimate True, Info and True×Info from two judges' probabilities, one answer a question.

    The judges are imperfect, so the table P of their verdicts (true or not × informative or not) is a mixture of the
    table Π of people's: P = Mₜ Π Mᵢᵀ, where M = [[se, 1 − sp], [1 − se, sp]] has a judge's sensitivity and
    specificity, the two judges erring independently given what is so. Hence Π = Mₜ⁻¹ P Mᵢ⁻ᵀ, whose margins are the
    estimate of Rogan and Gladen 1978 (Am. J. Epidemiol. 107:71), (p + sp − 1) / (se + sp − 1); each measure is clipped
    to 0 … 1. Intervals are percentiles of a bootstrap that draws the answers anew and, by question, the judgements
    that se and sp were counted on (that both count: Lang and Reiczigel 2014, Prev. Vet. Med. 113:13). A draw in which
    a judge is no better than chance says nothing: it counts as 0 for the lower end and as 1 for the upper.

    The correction supposes that the judges err on these answers as often as on those they were held against.

    Args:
        truth: `[N]`, the truth judge's probabilities of yes, a row a question.
        info: `[N]`, the info judge's, of the same answers.
        truth_confusion: of the truth judge on held-out questions; without both there is no correction.
        info_confusion: of the info judge.
        level: of the intervals, between 0 and 1.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: different or no answers, or a level out of its range.

    Example:
        >>> import torch
        >>> rates = true_info(torch.tensor([0.9, 0.8, 0.1, 0.7]), torch.tensor([0.9, 0.2, 0.6, 0.9]))
        >>> rates.true.judged, rates.info.judged, rates.product_of_means.judged, rates.mean_of_products.judged
        (0.75, 0.75, 0.5625, 0.5)
    """
    if truth.shape != info.shape or truth.dim() != 1 or not len(truth):
        raise ValueError(f"truth and info must be of the same answers, got shapes {truth.shape} and {info.shape}.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    random = np.random.default_rng(seed)
    # of the four cells of a 2 × 2 table, yes first: the one of each answer
    cells = (2 * (truth < THRESHOLD).int() + (info < THRESHOLD).int()).numpy()
    judged = np.bincount(cells, minlength=4)[None] / len(cells)
    again = random.multinomial(len(cells), judged[0], size=draws) / len(cells)
    judged, again = judged.reshape(-1, 2, 2), again.reshape(-1, 2, 2)

    true, corrected = None, None
    if truth_confusion is not None and info_confusion is not None:
        true = _correct(judged, _rates(truth_confusion), _rates(info_confusion))
        corrected = _correct(again, *(_rates(c, random, draws) for c in (truth_confusion, info_confusion)))
    tail = (1 - level) / 2
    rates = {}
    for name, measure in _MEASURES.items():
        low, high = np.quantile(measure(again), [tail, 1 - tail])
        rate = [float(measure(judged)[0]), float(low), float(high)]
        if true is not None and corrected is not None:
            values = measure(corrected)
            rate.append(float(np.clip(np.nan_to_num(measure(true), nan=0.0), 0, 1)[0]))
            for empty, share in ((0.0, tail), (1.0, 1 - tail)):
                rate.append(float(np.quantile(np.clip(np.nan_to_num(values, nan=empty), 0, 1), share)))
        rates[name] = Rate(*rate)
    return TrueInfo(**rates, level=level)


def _rates(confusion: Confusion, random: np.random.Generator | None = None, draws: int = 1) -> Floats:
    """Return sensitivity and specificity, `[draws, 2]`, of the questions or of as many drawn with replacement."""
    counts = np.array(confusion.counts, dtype=np.float64)
    weights = np.ones((1, len(counts)))
    if random is not None:
        weights = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=draws).astype(float)
    yes_right, yes_wrong, no_right, no_wrong = (weights @ counts).T
    with np.errstate(invalid="ignore"):
        return np.stack([yes_right / (yes_right + no_wrong), no_right / (no_right + yes_wrong)], axis=-1)


def _correct(table: Floats, truth: Floats, info: Floats) -> Floats:
    """Return Π = Mₜ⁻¹ P Mᵢ⁻ᵀ, `[draws, 2, 2]`; NaN where a judge is no better than chance."""
    return _inverse(truth) @ table @ _inverse(info).swapaxes(-1, -2)


def _inverse(rates: Floats) -> Floats:
    sensitivity, specificity = rates.T
    with np.errstate(invalid="ignore", divide="ignore"):
        better = np.where(sensitivity + specificity > 1, sensitivity + specificity - 1, np.nan)
    rows = [[specificity, specificity - 1], [sensitivity - 1, sensitivity]]
    return np.moveaxis(np.array(rows) / better, -1, 0)
