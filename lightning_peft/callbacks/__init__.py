"""What a Trainer is given: callbacks that adapt a model by tuning or by editing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.callbacks.averaging import AdapterEMA
    from lightning_peft.callbacks.bitfit import BitFit
    from lightning_peft.callbacks.composite import Composite
    from lightning_peft.callbacks.edit import Edit
    from lightning_peft.callbacks.full import FullFineTuning, TopLayers
    from lightning_peft.callbacks.head_offsets import HeadOffsets
    from lightning_peft.callbacks.iti import ITI
    from lightning_peft.callbacks.lora import LoRA
    from lightning_peft.callbacks.lottery import LotteryTicket
    from lightning_peft.callbacks.peft import PEFT
    from lightning_peft.callbacks.sparse import LTSFT
    from lightning_peft.callbacks.strata import Strata
    from lightning_peft.callbacks.trunk_cache import TrunkCache

_MODULES = {
    "PEFT": "peft",
    "LoRA": "lora",
    "Edit": "edit",
    "ITI": "iti",
    "Composite": "composite",
    "TrunkCache": "trunk_cache",
    "AdapterEMA": "averaging",
    "FullFineTuning": "full",
    "TopLayers": "full",
    "BitFit": "bitfit",
    "LTSFT": "sparse",
    "LotteryTicket": "lottery",
    "Strata": "strata",
    "HeadOffsets": "head_offsets",
}

__all__ = [
    "ITI",
    "LTSFT",
    "PEFT",
    "AdapterEMA",
    "BitFit",
    "Composite",
    "Edit",
    "FullFineTuning",
    "HeadOffsets",
    "LoRA",
    "LotteryTicket",
    "Strata",
    "TopLayers",
    "TrunkCache",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
