"""lightning-peft: adapt a model under PyTorch Lightning, by tuning or by editing, and say which to take.

Importing this package loads neither peft nor bitsandbytes: both are slow to import, and bitsandbytes' optimizers
clash with LightningCLI's short names. What needs peft is imported on first use; the PEFT methods defined here
register themselves whenever peft is loaded, in either order.
"""

import lazy_loader

from lightning_peft.moved.paths import install
from lightning_peft.stack.registration import register_with_peft
from lightning_peft.tuners import METHODS

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]

install()
register_with_peft(METHODS)
