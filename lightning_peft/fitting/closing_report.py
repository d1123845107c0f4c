"""The short report with which fit ends: what was trained or edited, what it costs on text, answers, what is next."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.backbone.sharded import has_shards
from lightning_peft.effects.per_token import PerToken
from lightning_peft.effects.slices import TextSettings
from lightning_peft.effects.text_sums import text_effects
from lightning_peft.fitting.next_steps import checkpoint_path, config_path, next_commands
from lightning_peft.fitting.sample_prompts import Sample, SamplePrompts, write_samples
from lightning_peft.stack.stack import AdapterStack

MUCH = 1.0  # nats a token of neutral text, beyond which answers often are gibberish
_METRICS = 4  # of validation that are shown


@dataclass
class ReportSettings:
    """What the report at the end of `fit` measures.

    Args:
        text: the neutral text on which KL is measured; 0 tokens for none.
        prompts: to answer, as the tokenizer takes them; None: two of the batches'; an empty list for none.
        new_tokens: of each answer at most.
        tokenizer: a tokenizer, or its name or folder; None: the module's own.
    """

    text: TextSettings = field(default_factory=lambda: TextSettings(tokens=512, length=64))
    prompts: list[str] | None = None
    new_tokens: int = 24
    tokenizer: Any = None


@dataclass
class Measured:
    """What was measured of a fitted module.

    Args:
        kl: KL(base ‖ adapted) on neutral text, and of how many tokens; None where it was not measured.
        samples: answers before and after.
        notes: why something was not measured.
    """

    kl: PerToken | None = None
    samples: Sequence[Sample] = ()
    notes: list[str] = field(default_factory=list)


class ClosingReport:
    """The report of one run of `fit`.

    Args:
        settings: what is measured.
    """

    def __init__(self, settings: ReportSettings) -> None:
        self.settings = settings
        self.prompts = SamplePrompts(2 if settings.prompts is None else 0)

    def note(self, batch: Any, validating: bool) -> None:
        """Look for prompts in a batch that passes by."""
        try:
            self.prompts.note(batch, validating)
        except Exception:  # whoever needs what it lacks says so
            self.prompts = SamplePrompts(0)

    def give(
        self, trainer: L.Trainer, module: L.LightningModule, stack: AdapterStack, names: Sequence[str], lines: Lines
    ) -> None:
        """Measure, print and log; whatever fails is one warning, since the training is done.

        Args:
            trainer: at the end of training.
            module: the module.
            stack: its adapters.
            names: of those that fit trained or computed.
            lines: returns what is known of them: headings and text; and the advice where KL is large.
        """
        try:
            with isolate_rng(include_cuda=torch.cuda.is_initialized()):
                measured = self._measure(trainer, module, stack, names)
            known, advice = lines()
            text = "\n".join(self._lines(trainer, stack, known, measured))
            _print(text)
            _log(trainer, text, measured)
        except Exception as error:
            warnings.warn(
                f"fit is done, but its report could not be made ({type(error).__name__}: {error}); report=False turns "
                "it off.",
                stacklevel=2,
            )
            return
        if measured.kl is not None and not measured.kl.mean <= MUCH:
            warnings.warn(_warning(measured.kl.mean, names, advice), stacklevel=2)

    # -- what is measured --------------------------------------------------------------------------------------------

    def _measure(
        self, trainer: L.Trainer, module: L.LightningModule, stack: AdapterStack, names: Sequence[str]
    ) -> Measured:
        """Return KL and answers, as far as the module has them."""
        measured, backbone, tokenizer = Measured(), stack.backbone, self._tokenizer(module)
        obstacle = _obstacle(trainer, module, backbone, tokenizer)
        if obstacle:
            measured.notes.append(obstacle)
            return measured
        with evaluating(backbone):
            if not _is_encoder_decoder(backbone) and (text := self.settings.text.text()) is not None:
                measured.kl = self._try(measured, "KL", lambda: _kl(stack, names, tokenizer, text))
            if rows := self._rows(tokenizer):
                tokens = self.settings.new_tokens

                def answers() -> list[Sample]:
                    return write_samples(backbone, tokenizer, rows, _without(stack, names), tokens)

                measured.samples = self._try(measured, "answers", answers) or ()
        return measured

    def _tokenizer(self, module: L.LightningModule) -> Any:
        given = self.settings.tokenizer
        if isinstance(given, str):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(given)
        return getattr(module, "tokenizer", None) if given is None else given

    def _rows(self, tokenizer: Any) -> list[list[int]]:
        """Return the tokens of the prompts: those given, those of batches, else beginnings of neutral text."""
        if self.settings.prompts is not None:
            return [list(tokenizer(prompt)["input_ids"]) for prompt in self.settings.prompts]
        if self.prompts.rows:
            return self.prompts.rows
        documents = TextSettings(tokens=24, length=12).text()
        assert documents is not None
        return [list(tokenizer(document)["input_ids"]) for document in documents.documents]

    def _try(self, measured: Measured, what: str, measure: Callable[[], Any]) -> Any:
        try:
            return measure()
        except Exception as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            measured.notes.append(f"no {what}: {message}")
            return None

    # -- what is said ------------------------------------------------------------------------------------------------

    def _lines(
        self, trainer: L.Trainer, stack: AdapterStack, known: Sequence[tuple[str, str]], measured: Measured
    ) -> Iterator[str]:
        yield "What fit did"
        lines = list(known)
        if metrics := _metrics(trainer):
            lines.append(("validation", metrics))
        if measured.kl is not None:
            tokens = sum(measured.kl.tokens)
            lines.append(
                ("KL to base", f"{measured.kl.mean:.3g} nats a token, at this strength, on {tokens} of neutral text")
            )
        lines += [("not measured", note) for note in measured.notes]
        for sample in measured.samples:
            lines += [("prompt", sample.prompt), ("  before", sample.before), ("  after", sample.after)]
        checkpoint = checkpoint_path(trainer)
        lines.append(("checkpoint", checkpoint or "none was written; lightning_peft.save_adapter writes a folder"))
        base = str(getattr(getattr(stack.backbone, "config", None), "_name_or_path", "") or "")
        prompt = "Who are you?" if measured.samples else None
        commands = next_commands(checkpoint, config_path(trainer), base, prompt)
        lines += [("next" if i == 0 else "", command) for i, command in enumerate(commands)]
        width = max(len(heading) for heading, _ in lines) + 2
        yield from (f"  {heading:{width}}{text}" for heading, text in lines)


Lines = Callable[[], tuple[list[tuple[str, str]], str]]


def _obstacle(trainer: L.Trainer, module: nn.Module, backbone: Any, tokenizer: Any) -> str:
    """Return why neither KL nor answers apply; empty where they do."""
    if has_shards(module) or isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        return "KL and answers, since the model is spread over processes"
    head = getattr(backbone, "get_output_embeddings", None)
    if not callable(head) or (head() is None and not _is_encoder_decoder(backbone)):
        return "KL and answers, which only language models have"
    if not callable(tokenizer):
        return "KL and answers, for want of a tokenizer: set the module's, or give report a tokenizer"
    return ""


def _is_encoder_decoder(backbone: nn.Module) -> bool:
    return bool(getattr(getattr(backbone, "config", None), "is_encoder_decoder", False))


def _kl(stack: AdapterStack, names: Sequence[str], tokenizer: Any, text: Any) -> PerToken:
    sums = text_effects(stack.backbone, tokenizer, text, lambda: _without(stack, names))
    return PerToken.from_sums(sums[:, 3].tolist(), [int(count) for count in sums[:, 0]])


@contextmanager
def _without(stack: AdapterStack, names: Sequence[str]) -> Iterator[None]:
    with ExitStack() as contexts:
        for name in names:
            contexts.enter_context(stack.disabled(name))
        yield


def _metrics(trainer: L.Trainer) -> str:
    logged = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val") and v.numel() == 1}
    return ", ".join(f"{name} {value:.4g}" for name, value in list(logged.items())[:_METRICS])


def _warning(kl: float, names: Sequence[str], advice: str) -> str:
    them = " and ".join(map(repr, names))
    if math.isnan(kl):
        return f"With {them} the model no longer predicts numbers: KL on neutral text is NaN. {advice}"
    return (
        f"With {them} the model is {kl:.2g} nats a token from its base on neutral text; above {MUCH:g} it often writes "
        f"gibberish. {advice}"
    )


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _log(trainer: L.Trainer, text: str, measured: Measured) -> None:
    """Give loggers the KL, and the text to those that show it."""
    for logger in trainer.loggers:
        if measured.kl is not None:
            logger.log_metrics({"neutral_kl": measured.kl.mean}, step=trainer.global_step)
        add_text = getattr(getattr(logger, "experiment", None), "add_text", None)  # TensorBoard's
        if callable(add_text):
            add_text("report", f"```\n{text}\n```", trainer.global_step)
