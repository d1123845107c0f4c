"""`lightning-peft fit`, `validate`, `test`, `predict`: LightningCLI over any module and any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft import models  # noqa: F401 - imported, its classes are known by their names alone
from lightning_peft.data import Choices, ContrastPairs, LabelledText, Statements  # noqa: F401 - likewise
from lightning_peft.files.data_error import DataError

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

# any module, any data, given by class path
OPTIONS: dict[str, Any] = {
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
}


def main(args: list[str]) -> LightningCLI:
    """Run one of LightningCLI's verbs and return the LightningCLI.

    Raises:
        SystemExit: in place of a `DataError`, with its sentence.
    """
    import lightning as L
    from lightning.pytorch.cli import LightningCLI

    try:
        return LightningCLI(
            L.LightningModule, L.LightningDataModule, save_config_kwargs={"overwrite": True}, args=args, **OPTIONS
        )
    except DataError as error:
        raise SystemExit(f"lightning-peft {args[0]}: {error}") from error
