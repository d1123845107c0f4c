"""lightning-peft: adapt a model under PyTorch Lightning, by tuning or by editing, and say which to take.

Importing this package loads neither peft nor bitsandbytes: both are slow to import, and bitsandbytes' optimizers
clash with LightningCLI's short names. What needs peft is imported on first use; the PEFT methods defined here
register themselves whenever peft is loaded, in either order.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_peft.moved.paths import install
from lightning_peft.stack.registration import register_with_peft
from lightning_peft.tuners import METHODS

if TYPE_CHECKING:
    from lightning_peft.callbacks.edits.caa import edit_caa
    from lightning_peft.callbacks.edits.iti import edit_iti
    from lightning_peft.fitting.checkpoints import export_checkpoint, load_from_checkpoint
    from lightning_peft.fitting.reading_edit import edit
    from lightning_peft.stack.adapter_files.baking import bake
    from lightning_peft.stack.adapter_files.control_vectors import export_control_vector
    from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
    from lightning_peft.stack.computed import ComputedAdapter
    from lightning_peft.stack.stack import AdapterStack, adapters
    from lightning_peft.stack.steering import steering

__version__ = "0.2.0"

_EXPORTS = {
    "AdapterStack": "lightning_peft.stack.stack",
    "adapters": "lightning_peft.stack.stack",
    "load_adapter": "lightning_peft.stack.adapter_files.saving",
    "save_adapter": "lightning_peft.stack.adapter_files.saving",
    "steering": "lightning_peft.stack.steering",
    "ComputedAdapter": "lightning_peft.stack.computed",
    "edit": "lightning_peft.fitting.reading_edit",
    "edit_caa": "lightning_peft.callbacks.edits.caa",
    "edit_iti": "lightning_peft.callbacks.edits.iti",
    "bake": "lightning_peft.stack.adapter_files.baking",
    "export_control_vector": "lightning_peft.stack.adapter_files.control_vectors",
    "export_checkpoint": "lightning_peft.fitting.checkpoints",
    "load_from_checkpoint": "lightning_peft.fitting.checkpoints",
}

__all__ = [
    "AdapterStack",
    "ComputedAdapter",
    "__version__",
    "adapters",
    "bake",
    "edit",
    "edit_caa",
    "edit_iti",
    "export_checkpoint",
    "export_control_vector",
    "load_adapter",
    "load_from_checkpoint",
    "save_adapter",
    "steering",
]

install()
register_with_peft(METHODS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
