"""What the tuners' configurations add to peft's: the model card of a folder that one is saved to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.stack.adapter_files.model_card import write_adapter_card
from lightning_peft.stack.adapter_files.readme import may_write

if TYPE_CHECKING:
    from peft.config import PeftConfig
else:
    PeftConfig = object  # importing peft imports every tuner, and these need this module


class WithCard(PeftConfig):
    """A configuration of a method that peft lacks, before `PeftConfig` among its bases.

    `PeftModel.save_pretrained`, and `save_pretrained` of a transformers model, write the folder of an adapter by its
    configuration, and a README that says nothing of the import that such a folder needs.
    """

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and the model card in place of peft's; a README of the user's own stays."""
        super().save_pretrained(save_directory, **kwargs)
        if may_write(Path(save_directory)):
            write_adapter_card(Path(save_directory), self)
