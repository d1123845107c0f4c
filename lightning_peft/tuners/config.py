"""The base of the tuners' configurations: peft's, which also writes the model card of a folder it is saved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from lightning_peft.stack.adapter_files.model_card import write_adapter_card
from lightning_peft.stack.adapter_files.readme import may_write


class TunerConfig(PeftConfig):
    """A configuration of a method that peft lacks.

    `PeftModel.save_pretrained` and `save_pretrained` of a transformers model write the folder of an adapter by this,
    and a README that says nothing of the import that such a folder needs.
    """

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and the model card in place of peft's; a README of the user's own stays."""
        super().save_pretrained(save_directory, **kwargs)
        if may_write(Path(save_directory)):
            write_adapter_card(Path(save_directory), self)
