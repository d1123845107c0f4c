"""The TruthfulQA benchmark: data, prompts, scoring, metrics. It scores whatever adapter is active."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
