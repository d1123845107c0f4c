"""`lightning-peft fit`, `validate`, `test`, `predict`: LightningCLI over any module and any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

# any module, any data, given by class path
OPTIONS: dict[str, Any] = {
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
}


def main(args: list[str]) -> LightningCLI:
    """Run one of LightningCLI's verbs and return the LightningCLI."""
    import lightning as L
    from lightning.pytorch.cli import LightningCLI

    return LightningCLI(
        L.LightningModule, L.LightningDataModule, save_config_kwargs={"overwrite": True}, args=args, **OPTIONS
    )
