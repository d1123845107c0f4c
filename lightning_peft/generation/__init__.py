"""Talk to an adapted language model: load it, let it answer, stream its tokens, hold a conversation; no Trainer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
