"""What a test measures of each unit of choices, by the log-probabilities of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_peft.backbone.find_backbone import find_backbone, whole
from lightning_peft.editing.ranks import rank_and_count
from lightning_peft.packing.batch_scores import Scores, by_logprob
from lightning_peft.replaced import Handle, replaced
from lightning_peft.tasks.scoring import Scoring
from lightning_peft.tasks.unit_scores import UnitScores


class ChoiceUnitScores(UnitScores):
    """Scores the answers of each test batch, in the place of the module's `test_step`, and keeps each unit's scores.

    Whatever adapters are active count.

    Args:
        score: gives a unit's score by measure, from its answers' scores `[C]` and their columns.
        scoring: how answers are scored; default by their exact log-probabilities behind their prompts, in nats.

    Raises:
        ValueError: a unit's answers are in two batches.
    """

    def __init__(
        self, score: Callable[[Tensor, Mapping[str, Tensor]], dict[str, float]], scoring: Scoring | None = None
    ) -> None:
        super().__init__()
        self.score, self.scoring = score, scoring
        self._replaced: Handle | None = None
        self._units: set[int] = set()

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_epoch_start(trainer, pl_module)
        self._units = set()
        module: Any = pl_module
        scorers: list[Scores] = []  # made at the first batch, for the model as it is then

        def step(original: Callable[..., Any], batch: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            if not scorers and self.scoring is None:
                scorers.append(by_logprob(whole(module, find_backbone(module, None) or "")))
            elif not scorers and self.scoring is not None:
                scorers.append(self.scoring(module))
            return scorers[0](batch)

        self._replaced = replaced(pl_module, "test_step", step)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        groups = batch["group"].cpu()
        columns = {n: v.cpu() for n, v in batch.items() if isinstance(v, Tensor) and v.shape == groups.shape}
        for unit in dict.fromkeys(groups.tolist()):
            rows = (groups == unit).nonzero().flatten()
            scores = self.score(outputs.cpu()[rows], {name: values[rows] for name, values in columns.items()})
            self.returned = ", ".join(map(repr, scores)) or "nothing"
            if unit in self._units and rank_and_count()[1] == 1:  # else a sampler may repeat some
                raise ValueError(
                    f"Unit {unit} is in two test batches: all answers to a unit, which have its number under 'group', "
                    "must be in one."
                )
            self._units.add(unit)
            for name, value in scores.items():
                self._here[name][unit] = value

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_epoch_end(trainer, pl_module)
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        if self._replaced is not None:
            self._replaced.remove()
            self._replaced = None
