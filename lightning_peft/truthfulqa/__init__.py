"""The TruthfulQA benchmark: data, prompts, scoring, metrics. It scores whatever adapter is active."""

import lazy_loader

from lightning_peft.moved.names import keep_old_names

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
keep_old_names(__name__)
