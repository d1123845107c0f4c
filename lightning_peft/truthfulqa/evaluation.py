"""Measure a validation or a test on the batches of `TruthfulQADataModule`, in any LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft.effects.metric import TextEffects
from lightning_peft.effects.text_sums import Off, batch_effects
from lightning_peft.models import TokenMean
from lightning_peft.packing.batch_scores import Scores as Scores
from lightning_peft.packing.batch_scores import by_logprob as by_logprob
from lightning_peft.truthfulqa.metrics import ChoiceMetrics

Batch = dict[str, Tensor]


class Evaluation(nn.Module):
    """The benchmark's metrics of one epoch of validation or test: `begin`, `step` with each batch, `finish`.

    Measured are `mc0` … `mc3` of questions, `capability` of simple ones, `ce`, `ce_base` and `kl` on neutral text, in
    nats per token, and `loss`, the mean of the losses given, per token. Each is there where there was any such batch.
    On several processes each gets the numbers of all, and a question or document that a sampler repeats counts once;
    the loss alone counts what is repeated. It is a module so that the metrics follow the LightningModule to its device.

    Example:
        >>> class Mine(L.LightningModule):  # doctest: +SKIP
        ...     def __init__(self, backbone, tokenizer):
        ...         super().__init__()
        ...         self.backbone, self.tokenizer, self.evaluation = backbone, tokenizer, Evaluation()
        ...
        ...     def on_test_epoch_start(self):
        ...         self.evaluation.begin(self.backbone)
        ...
        ...     def test_step(self, batch, batch_idx):
        ...         return self.evaluation.step(batch)
        ...
        ...     def on_test_epoch_end(self):
        ...         self.log_dict(self.evaluation.finish())
        >>> L.Trainer().test(Mine(backbone, tokenizer), TruthfulQADataModule("hub"))  # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__()
        self.choices, self.text = ChoiceMetrics(), TextEffects()
        self.loss = TokenMean()
        self._scoring: Callable[[], Scores] | None = None
        self._scores: Scores | None = None
        self._effects: Scores | None = None

    def begin(
        self,
        backbone: nn.Module,
        scoring: Callable[[], Scores] | None = None,
        off: Off | None = None,
        base: bool = True,
    ) -> None:
        """Forget what was measured before, and any scorer: the model may have changed.

        Args:
            backbone: a language model of transformers, causal or encoder-decoder. Whatever adapters are active count.
            scoring: called before the first choices, for what gives the scores `[B]` of a batch of them; default their
                log-probabilities.
            off: switches the adapters off for a while, such as `adapters(module).disabled`, for `ce_base` and `kl`;
                None where there are none.
            base: whether there is a base to compare with; without, `ce` is all that is measured on text.
        """

        def effects(batch: Batch) -> Tensor:
            values = batch_effects(backbone, batch, off)
            if not base:
                values[:, [1, 3]] = math.nan
            return values

        self._scoring = (lambda: by_logprob(backbone)) if scoring is None else scoring
        self._scores, self._effects = None, effects
        self.choices.begin()
        self.text.reset()
        self.text.update(torch.zeros(1, 4))  # of several processes those without any text must take part too
        self.loss.begin()

    def step(self, batch: Batch) -> Tensor | None:
        """Measure a batch of choices or of neutral text.

        Returns:
            The choices' scores, `[B]`, in nats; of text its effects, `[B, 4]`, see `batch_effects`; None of any other
            batch, such as the answers of a validation, whose loss `add_loss` may be given.
        """
        if self._scoring is None or self._effects is None:
            raise RuntimeError("Evaluation.begin must be called at the start of the epoch, before the first step.")
        if "document" in batch:
            effects = self._effects(batch)
            self.text.update(effects, batch["document"])
            return effects
        if not batch.keys() & self.choices.keys():
            return None
        if self._scores is None:
            self._scores = self._scoring()
        scores = self._scores(batch)
        self.choices.add(scores, batch)
        return scores

    def add_loss(self, loss: Tensor, tokens: int) -> None:
        """Count a batch's mean loss as often as it has tokens."""
        self.loss.add(loss, tokens)

    def finish(self, prefix: str = "") -> dict[str, float]:
        """Return the results over all processes, under names that begin with `prefix`, and begin anew."""
        loss = self.loss.finish()
        results = {} if loss is None else {"loss": loss}
        results |= {name: float(value) for name, value in self.choices.finish().items()}
        results |= {name: value for name, value in self.text.compute().items() if not math.isnan(value)}
        self.text.reset()
        self._scoring = self._scores = self._effects = None
        return {prefix + name: value for name, value in results.items()}
