"""timm and torchvision, which the test set-up installs apart: `models()` gives both, or skips the test."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

_APART = Path(sys.prefix, "vision")
_MISSING = ("nms", "qnms")  # what torchvision's binary would register, and its Python code expects


@functools.cache
def libraries() -> tuple[ModuleType, ModuleType]:
    """`(timm, torchvision)`, imported without torchvision's binary where that does not fit this build of torch."""
    if _APART.is_dir() and str(_APART) not in sys.path:
        sys.path.append(str(_APART))
    pytest.importorskip("transformers")  # which looks once for torchvision, and is not to find it
    try:
        import torchvision
    except ModuleNotFoundError:
        pytest.skip("timm and torchvision are not installed: make test installs them")
    except RuntimeError:  # an operator is missing
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in _MISSING:
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import torchvision
    return pytest.importorskip("timm"), torchvision
