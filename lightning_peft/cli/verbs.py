"""`lightning-peft fit`, `validate`, `test`, `predict`: LightningCLI over any module and any data."""

from __future__ import annotations

import argparse
from typing import Any

from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningCLI

from lightning_peft import models  # noqa: F401 - imported, its classes are known by their names alone
from lightning_peft.data import (  # noqa: F401 - likewise
    Chats,
    Choices,
    ContrastPairs,
    LabelledText,
    Statements,
    Texts,
)
from lightning_peft.files.data_error import DataError
from lightning_peft.generation.prediction_writer import PredictionWriter
from lightning_peft.generation.prompts import PromptError

# any module, any data, given by class path
OPTIONS: dict[str, Any] = {
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
}

_PREDICTIONS = (
    "--predictions PATH: the .jsonl file for what is predicted; default: predictions.jsonl in the log's folder"
)


def main(args: list[str]) -> LightningCLI:
    """Run one of LightningCLI's verbs and return the LightningCLI.

    Raises:
        SystemExit: in place of a `DataError`, with its sentence.
    """
    import lightning as L

    args, predictions = _take_predictions(args)
    try:
        return Verbs(
            L.LightningModule,
            L.LightningDataModule,
            save_config_kwargs={"overwrite": True},
            args=args,
            parser_kwargs={"predict": {"epilog": _PREDICTIONS}},
            predictions=predictions,
            **OPTIONS,
        )
    except (DataError, PromptError) as error:
        raise SystemExit(f"lightning-peft {args[0]}: {error}") from error


class Verbs(LightningCLI):
    """LightningCLI, whose `predict` writes what it gives.

    Args:
        predictions: the file for them; default `PredictionWriter`'s, unless the Trainer has another writer.
        *args, **options: LightningCLI's.
    """

    def __init__(self, *args: Any, predictions: str | None = None, **options: Any) -> None:
        self.predictions, self._writer = predictions, PredictionWriter(predictions)
        super().__init__(*args, **options)

    def before_predict(self) -> None:
        """Put a writer on, where there is none."""
        callbacks: list[Any] = vars(self.trainer)["callbacks"]
        if self.predictions or not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            vars(self.trainer)["callbacks"] = [self._writer, *callbacks]

    def after_predict(self) -> None:
        """Say where it was written."""
        writer = self._writer
        if not self.trainer.is_global_zero or writer not in vars(self.trainer)["callbacks"]:
            return
        if writer.written is None:
            reason = writer.skipped or "there was nothing to predict"
            print(f"Nothing was written: {reason}.")
        else:
            print(f"Wrote {writer.count:,} answers or predictions to {writer.written}.")


def _take_predictions(args: list[str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--predictions`, which only `predict` has, and its value."""
    if args[:1] != ["predict"]:
        return args, None
    option = argparse.ArgumentParser(prog="lightning-peft predict", add_help=False, allow_abbrev=False)
    option.add_argument("--predictions")
    parsed, others = option.parse_known_args(args)
    return others, parsed.predictions
