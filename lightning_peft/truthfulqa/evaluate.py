"""Measure the benchmark's batches in whatever LightningModule holds a language model: a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn

from lightning_peft.backbone.find_backbone import find_backbone, whole
from lightning_peft.effects.text_sums import Off
from lightning_peft.models import CausalLM, Seq2SeqLM
from lightning_peft.replaced import Handle, replaced
from lightning_peft.stack.injection.initialisation import changes_base
from lightning_peft.stack.stack import adapters, find_stacks
from lightning_peft.truthfulqa.evaluation import Batch, Evaluation, Scores, by_logprob
from lightning_peft.truthfulqa.generation import Answer, AnswerGenerator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scoring = Callable[[Any], Scores]


class Evaluate(Callback):
    """Measure the benchmark in validation, test and prediction of any LightningModule.

    The batches of `TruthfulQADataModule` that hold choices, simple questions, neutral text or prompts for free answers
    are taken from the module's `validation_step`, `test_step` and `predict_step`; all others go there as ever. Logged
    are `mc0` … `mc3`, `capability`, `ce`, `ce_base` and `kl`, see `Evaluation`, in validation under names that begin
    with `val_`. A step returns the scores of choices, `[B]`, in nats, the effects of text, `[B, 4]`, and the `Answer`s
    to prompts. Whatever adapters are active count. An encoder-decoder gets the prompts itself.

    `TruthfulQADataModule` puts one on its Trainer where there is none, and takes it off again. A module that has an
    `Evaluation` of its own, or no language model, is left to itself by that one.

    Args:
        scoring: how choices are scored instead of by their log-probability: called with the module before the first
            choices of a validation or test, for what gives the scores `[B]` of a batch of them. Default: what
            `CausalLM.scoring` was set to, if anything.
        backbone: the language model, a submodule; default the one transformers model in the module, as in
            `lightning_peft.callbacks.PEFT`.
        tokenizer: with which answers are written; default the module's attribute `tokenizer`.

    Raises:
        ValueError: the module has no language model, or it cannot be told which of several.

    Example:
        >>> from lightning_peft.tasks.decoding import DoLaScoring
        >>> run = L.Trainer(callbacks=[Evaluate(DoLaScoring())])  # doctest: +SKIP
        >>> run.test(module, TruthfulQADataModule("hub"))  # doctest: +SKIP
    """

    def __init__(
        self,
        scoring: Scoring | None = None,
        backbone: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.scoring, self.backbone, self.tokenizer = scoring, backbone, tokenizer
        self.evaluation = Evaluation()
        self._by_data = False  # put on by a data module, so that it must not be in a module's way
        self._replaced: list[Handle] = []

    @classmethod
    def put_on(cls, trainer: L.Trainer, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Put one on a running Trainer that has none, until its `teardown`.

        Args:
            trainer: of which the data module is being set up.
            tokenizer: for a module that has none.
        """
        if trainer.state.status == TrainerStatus.RUNNING and _evaluating(trainer) is None:
            callback = cls(tokenizer=tokenizer)
            callback._by_data = True
            vars(trainer)["callbacks"] = [callback, *_callbacks(trainer)]

    @staticmethod
    def measures(trainer: L.Trainer) -> bool:
        """Return whether choices are measured in the Trainer's module, by such a callback or by itself."""
        callback = _evaluating(trainer)
        return _has_own(trainer.lightning_module) or (
            callback is not None and callback.language_model(trainer.lightning_module) is not None
        )

    def language_model(self, module: L.LightningModule) -> nn.Module | None:
        """Return the language model in a module; None where one that a data module put on is to leave it alone."""
        if self._by_data and _has_own(module):
            return None
        if self.backbone is None and isinstance(module, CausalLM | Seq2SeqLM):
            return module.backbone
        try:
            name = find_backbone(module, self.backbone)
        except ValueError:
            if self._by_data:
                return None
            raise
        model = whole(module, name or "")
        if self.backbone is None and not _writes(module.get_submodule(name or "")):
            if self._by_data:
                return None
            raise ValueError(
                f"Evaluate needs a language model of transformers, and {type(model).__name__} is none: name one with "
                "the argument backbone."
            )
        return model

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module, "validation_step")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(pl_module, "val_")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module, "test_step")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(pl_module, "")

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = self.language_model(pl_module)
        if model is None or _is_encoder_decoder(model):
            return
        generators: list[AnswerGenerator] = []

        def predict_step(original: Callable[..., Any], batch: Any, *more: Any, **named: Any) -> list[Answer] | Any:
            if not (isinstance(batch, Mapping) and "ending" in batch):
                return original(batch, *more, **named)
            if not generators:
                generators.append(AnswerGenerator(model, self._tokenizer(pl_module)))
            return generators[0].answer(cast("dict[str, Any]", batch))

        self._replaced.append(replaced(pl_module, "predict_step", predict_step))

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave(trainer)

    # -- what they do ------------------------------------------------------------------------------------------------

    def _begin(self, module: L.LightningModule, step_name: str) -> None:
        """Take the benchmark's batches from a step of the module."""
        self._release()
        model = self.language_model(module)
        if model is None:
            return
        off, base = _without_adapters(model)
        scoring: Scoring | None = self.scoring
        if scoring is None and isinstance(module, CausalLM):
            scoring = getattr(module, "scoring", None)

        def scores() -> Scores:
            return by_logprob(model) if scoring is None else scoring(module)

        self.evaluation.to(module.device)
        self.evaluation.begin(model, scores, off, base)

        def step(original: Callable[..., Any], batch: Any, *more: Any, **named: Any) -> Any:
            if isinstance(batch, Mapping) and (result := self.evaluation.step(cast(Batch, batch))) is not None:
                return result
            return original(batch, *more, **named)

        self._replaced.append(replaced(module, step_name, step))

    def _finish(self, module: L.LightningModule, prefix: str) -> None:
        if not self._replaced:
            return
        self._release()
        for name, value in self.evaluation.finish(prefix).items():
            module.log(name, value, prog_bar=name == "val_mc2", sync_dist=True)

    def _tokenizer(self, module: L.LightningModule) -> PreTrainedTokenizerBase:
        own = getattr(module, "tokenizer", None)
        tokenizer = own if self.tokenizer is None or (self._by_data and own is not None) else self.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{type(module).__name__} has no tokenizer to write answers with: give it one, or "
                "Evaluate(tokenizer=…)."
            )
        return tokenizer

    def _release(self) -> None:
        while self._replaced:
            self._replaced.pop().remove()

    def _leave(self, trainer: L.Trainer) -> None:
        """Take everything off: steps that are replaced, and what a data module put on the Trainer."""
        self._release()
        if self._by_data:  # another list: Lightning is going through this one
            vars(trainer)["callbacks"] = [callback for callback in _callbacks(trainer) if callback is not self]


def _evaluating(trainer: L.Trainer) -> Evaluate | None:
    return next((callback for callback in _callbacks(trainer) if isinstance(callback, Evaluate)), None)


def _has_own(module: nn.Module) -> bool:
    return any(isinstance(part, Evaluation) for part in module.modules())


def _callbacks(trainer: L.Trainer) -> list[Callback]:
    return vars(trainer)["callbacks"]  # which Lightning sets without declaring it


def _writes(model: nn.Module) -> bool:
    """Return whether a model is a language model of transformers."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate())


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _without_adapters(model: nn.Module) -> tuple[Off | None, bool]:
    """Return what switches a model's adapters off, if it has any, and whether the base is there to compare with."""
    off: Off | None = None
    configs: list[Any] = []
    if find_stacks(model):
        stack = adapters(model)
        off, configs = stack.disabled, [part.config for part in stack.parts]
    elif hasattr(model, "disable_adapter"):  # wrapped by peft itself
        wrapper: Any = model
        off, configs = wrapper.disable_adapter, list(wrapper.peft_config.values())
    base = not any(map(changes_base, configs))
    return (off if base else None), base
