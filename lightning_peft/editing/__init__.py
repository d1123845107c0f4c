"""What computes an adapter without gradient descent: sites, capture, probes, directions, edits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.editing.capture import HeadCapture, capture_tokens
    from lightning_peft.editing.heads import HeadSite, head_offsets_config, head_sites
    from lightning_peft.editing.iti import HeadEdit, compute_iti
    from lightning_peft.editing.probes import LogisticProbes

_MODULES = {
    "HeadSite": "heads",
    "head_sites": "heads",
    "head_offsets_config": "heads",
    "HeadCapture": "capture",
    "capture_tokens": "capture",
    "LogisticProbes": "probes",
    "HeadEdit": "iti",
    "compute_iti": "iti",
}

__all__ = [
    "HeadCapture",
    "HeadEdit",
    "HeadSite",
    "LogisticProbes",
    "capture_tokens",
    "compute_iti",
    "head_offsets_config",
    "head_sites",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
