"""The questions of a comparison or a sweep as they were given before there were tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_peft.truthfulqa.answers import Answers
from lightning_peft.truthfulqa.protocols import ProtocolName
from lightning_peft.truthfulqa.side_effects import SideEffects

if TYPE_CHECKING:
    from lightning_peft.truthfulqa.task import TruthfulQA


@dataclass
class Data:
    """The questions, the same for every row.

    Args:
        source: `"package"` (this package's own set), `"hub"` (TruthfulQA), or a folder or file of a release.
        limit: take only so many questions, stratified by category.
        num_folds: every question is tested once, by a model that has not seen its fold.
        val_fraction: share of the training questions that hyperparameters are chosen on.
        seed: of folds and splits.
        side_effects: what is measured beside the questions, on the same text for every row.
        protocol: how choices are scored: `"lm_eval"`, `"original"`, `"honest_llama"` or `"chat"`. By the first, ties
            count as right, which would favour ways of scoring that tie often.
        answers: free answers to the questions too; by default none.
        fit_window: where demonstrations with a question are longer than the model can read, leave out as many as need
            be, from the front, and say so in the report.
    """

    source: str = "package"
    limit: int | None = None
    num_folds: int = 2
    val_fraction: float = 0.2
    seed: int = 0
    side_effects: SideEffects = field(default_factory=SideEffects)
    protocol: ProtocolName = "original"
    answers: Answers | None = None
    fit_window: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that scores depend on; one that came later is left out where it changes nothing."""
        values = asdict(self)
        del values["answers"]  # which are written after, by what a cell has saved
        if not self.fit_window:
            del values["fit_window"]
        return values

    def task(self, model: str, dtype: str = "float32") -> TruthfulQA:
        """Return the task of these questions for a model."""
        from lightning_peft.truthfulqa.task import TruthfulQA

        return TruthfulQA(model, dtype=dtype, **vars(self))
