"""The quality of a judge: its accuracy, ranking and calibration against people's verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.files.records import DamagedError, read_record, write_record
from lightning_peft.truthfulqa.judges.protocol import Judge, Judgement
from lightning_peft.truthfulqa.questions import DataError

THRESHOLD = 0.5  # the original's
FILE = "judge.json"
_NUMBERS = ("accuracy", "majority", "auroc", "ece", "brier")
_KINDS: dict[str, Any] = {"kind": str, "judgements": int, "questions": int, "confusion": dict}
_KINDS |= dict.fromkeys(_NUMBERS, (int, float))


@dataclass(frozen=True)
class Confusion:
    """Counts of a judge's right and wrong verdicts, a row for each held-out question.

    Args:
        counts: for each question: yes rightly said, yes wrongly said, no rightly said, no wrongly said.
    """

    counts: tuple[tuple[int, int, int, int], ...]

    @property
    def sensitivity(self) -> float:
        """Share of people's yes that the judge says too."""
        right, _, _, missed = map(sum, zip(*self.counts, strict=True))
        return right / (right + missed)

    @property
    def specificity(self) -> float:
        """Share of people's no that the judge says too."""
        _, wrong, right, _ = map(sum, zip(*self.counts, strict=True))
        return right / (right + wrong)


@dataclass(frozen=True)
class JudgeQuality:
    """A judge against people's verdicts on questions that it has not seen.

    Args:
        kind: `"truth"` or `"info"`.
        judgements: how many.
        questions: how many.
        accuracy: share of verdicts that agree, yes being P(yes) ≥ 0.5.
        majority: the accuracy of always giving the commoner verdict.
        auroc: the chance that a yes gets a higher probability than a no.
        ece: expected calibration error of P(yes), 15 bins of equal width (Guo et al. 2017, arXiv:1706.04599).
        brier: mean squared difference of P(yes) and the verdict; 0.25 is what a constant 0.5 gets.
        confusion: for the intervals of `true_info`.
    """

    kind: str
    judgements: int
    questions: int
    accuracy: float
    majority: float
    auroc: float
    ece: float
    brier: float
    confusion: Confusion


def judge_quality(judge: Judge, judgements: Sequence[Judgement]) -> JudgeQuality:
    """Hold a judge against people's verdicts.

    Args:
        judge: any.
        judgements: of one kind, on questions that the judge was not trained on; both verdicts must occur.

    Raises:
        ValueError: judgements of two kinds, or all with one verdict.
    """
    kinds = {judgement.kind for judgement in judgements}
    verdicts = torch.tensor([judgement.verdict for judgement in judgements])
    if len(kinds) != 1 or len(verdicts.unique()) != 2:
        raise ValueError("A judge is held against judgements of one kind, some of them yes and some no.")
    scores = judge.score([j.question for j in judgements], [j.answer for j in judgements])
    return _quality(kinds.pop(), [j.question for j in judgements], scores, verdicts)


def _quality(kind: str, questions: Sequence[str], scores: Tensor, verdicts: Tensor) -> JudgeQuality:
    from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

    predicted = scores >= THRESHOLD
    yes = float(verdicts.float().mean())
    confusion = _confusion(questions, predicted, verdicts)
    return JudgeQuality(
        kind=kind,
        judgements=len(verdicts),
        questions=len(confusion.counts),
        accuracy=float((predicted == verdicts).float().mean()),
        majority=max(yes, 1 - yes),
        auroc=float(binary_auroc(scores, verdicts.long())),
        ece=float(binary_calibration_error(scores, verdicts.long(), n_bins=15)),
        brier=float((scores - verdicts.float()).square().mean()),
        confusion=confusion,
    )


def _confusion(questions: Sequence[str], predicted: Tensor, verdicts: Tensor) -> Confusion:
    counts: dict[str, list[int]] = {}
    for question, judged, true in zip(questions, predicted.tolist(), verdicts.tolist(), strict=True):
        row = counts.setdefault(question, [0, 0, 0, 0])
        row[(0 if true else 1) if judged else (3 if true else 2)] += 1
    return Confusion(tuple((a, b, c, d) for a, b, c, d in counts.values()))


def save_quality(quality: JudgeQuality, folder: str | Path) -> Path:
    """Write what was found beside the judge, as `judge.json`; returns the file."""
    path = Path(folder) / FILE
    write_record(path, asdict(quality), indent=1)
    return path


def load_quality(folder: str | Path) -> JudgeQuality:
    """Read what `save_quality` wrote.

    Raises:
        DataError: there is no `judge.json`, or it is not one.
    """
    path = Path(folder) / FILE
    try:
        record = read_record(path, _KINDS)
        counts = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in record.pop("confusion")["counts"])
        return JudgeQuality(**record, confusion=Confusion(counts))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: `lightning-peft judge` writes it.") from None
    except DamagedError as error:
        raise DataError(f"{error}: run `lightning-peft judge` again, which writes it.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not what `lightning-peft judge` writes ({type(error).__name__}).") from error
