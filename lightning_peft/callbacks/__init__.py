"""The callbacks of a Trainer that adapt a model by tuning or by editing.

A file here exports its public classes, or those in its `__all__`, by being here.
"""

from pathlib import Path

import lazy_loader

from lightning_peft.exports import public_classes

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=public_classes(Path(__file__).parent))
