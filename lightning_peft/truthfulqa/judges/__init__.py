"""Judges of free answers: is an answer true, is it informative? None is needed, and none is loaded unasked."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
