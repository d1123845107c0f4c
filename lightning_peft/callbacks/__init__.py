"""What a Trainer is given: callbacks that adapt a model by tuning or by editing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.callbacks.averaging import AdapterEMA
    from lightning_peft.callbacks.edits.ablation import Ablation
    from lightning_peft.callbacks.edits.act_add import ActAdd
    from lightning_peft.callbacks.edits.caa import CAA
    from lightning_peft.callbacks.edits.iti import ITI
    from lightning_peft.callbacks.edits.knowledge import MEMIT, ROME
    from lightning_peft.callbacks.edits.repe import RepE
    from lightning_peft.callbacks.quantize import Quantize
    from lightning_peft.callbacks.steer import Steer
    from lightning_peft.callbacks.trunk_cache import TrunkCache
    from lightning_peft.callbacks.tuning.adalora import AdaLoRA
    from lightning_peft.callbacks.tuning.attention_prefix import AttentionPrefix
    from lightning_peft.callbacks.tuning.bitfit import BitFit
    from lightning_peft.callbacks.tuning.bottleneck import (
        AdapterPlus,
        Houlsby,
        ParallelAdapter,
        Pfeiffer,
        ScaledParallelAdapter,
    )
    from lightning_peft.callbacks.tuning.compacter import Compacter, CompacterPlusPlus
    from lightning_peft.callbacks.tuning.composite import Composite
    from lightning_peft.callbacks.tuning.full import FullFineTuning, TopLayers
    from lightning_peft.callbacks.tuning.head_gains import HeadGains
    from lightning_peft.callbacks.tuning.head_offsets import HeadOffsets
    from lightning_peft.callbacks.tuning.ia3 import IA3
    from lightning_peft.callbacks.tuning.layer_offsets import LayerOffsets
    from lightning_peft.callbacks.tuning.lofit import LoFiT
    from lightning_peft.callbacks.tuning.lora import LoRA
    from lightning_peft.callbacks.tuning.lottery import LotteryTicket
    from lightning_peft.callbacks.tuning.mam import MAM
    from lightning_peft.callbacks.tuning.p_tuning import PTuning
    from lightning_peft.callbacks.tuning.prefix_tuning import PrefixTuning
    from lightning_peft.callbacks.tuning.prompt_tuning import PromptTuning
    from lightning_peft.callbacks.tuning.qlora import QLoRA
    from lightning_peft.callbacks.tuning.sparse import LTSFT
    from lightning_peft.callbacks.tuning.ssb import SSB
    from lightning_peft.callbacks.tuning.ssl import SSL
    from lightning_peft.callbacks.tuning.strata import Strata
    from lightning_peft.callbacks.tuning.unipelt import UniPELT
    from lightning_peft.fitting.adapter_callback import AdapterCallback
    from lightning_peft.fitting.edit import Edit
    from lightning_peft.fitting.peft import PEFT
    from lightning_peft.fitting.reading_edit import ReadingEdit

_MODULES = {
    "AdapterCallback": "lightning_peft.fitting.adapter_callback",
    "PEFT": "lightning_peft.fitting.peft",
    "LoRA": "lightning_peft.callbacks.tuning.lora",
    "Edit": "lightning_peft.fitting.edit",
    "ReadingEdit": "lightning_peft.fitting.reading_edit",
    "ITI": "lightning_peft.callbacks.edits.iti",
    "ROME": "lightning_peft.callbacks.edits.knowledge",
    "MEMIT": "lightning_peft.callbacks.edits.knowledge",
    "CAA": "lightning_peft.callbacks.edits.caa",
    "ActAdd": "lightning_peft.callbacks.edits.act_add",
    "RepE": "lightning_peft.callbacks.edits.repe",
    "Ablation": "lightning_peft.callbacks.edits.ablation",
    "LayerOffsets": "lightning_peft.callbacks.tuning.layer_offsets",
    "Steer": "lightning_peft.callbacks.steer",
    "Composite": "lightning_peft.callbacks.tuning.composite",
    "TrunkCache": "lightning_peft.callbacks.trunk_cache",
    "AdapterEMA": "lightning_peft.callbacks.averaging",
    "FullFineTuning": "lightning_peft.callbacks.tuning.full",
    "TopLayers": "lightning_peft.callbacks.tuning.full",
    "BitFit": "lightning_peft.callbacks.tuning.bitfit",
    "LTSFT": "lightning_peft.callbacks.tuning.sparse",
    "LotteryTicket": "lightning_peft.callbacks.tuning.lottery",
    "Strata": "lightning_peft.callbacks.tuning.strata",
    "HeadOffsets": "lightning_peft.callbacks.tuning.head_offsets",
    "HeadGains": "lightning_peft.callbacks.tuning.head_gains",
    "LoFiT": "lightning_peft.callbacks.tuning.lofit",
    "AttentionPrefix": "lightning_peft.callbacks.tuning.attention_prefix",
    "Houlsby": "lightning_peft.callbacks.tuning.bottleneck",
    "Pfeiffer": "lightning_peft.callbacks.tuning.bottleneck",
    "ParallelAdapter": "lightning_peft.callbacks.tuning.bottleneck",
    "ScaledParallelAdapter": "lightning_peft.callbacks.tuning.bottleneck",
    "AdapterPlus": "lightning_peft.callbacks.tuning.bottleneck",
    "Compacter": "lightning_peft.callbacks.tuning.compacter",
    "CompacterPlusPlus": "lightning_peft.callbacks.tuning.compacter",
    "MAM": "lightning_peft.callbacks.tuning.mam",
    "UniPELT": "lightning_peft.callbacks.tuning.unipelt",
    "Quantize": "lightning_peft.callbacks.quantize",
    "QLoRA": "lightning_peft.callbacks.tuning.qlora",
    "SSB": "lightning_peft.callbacks.tuning.ssb",
    "SSL": "lightning_peft.callbacks.tuning.ssl",
    "AdaLoRA": "lightning_peft.callbacks.tuning.adalora",
    "IA3": "lightning_peft.callbacks.tuning.ia3",
    "PromptTuning": "lightning_peft.callbacks.tuning.prompt_tuning",
    "PTuning": "lightning_peft.callbacks.tuning.p_tuning",
    "PrefixTuning": "lightning_peft.callbacks.tuning.prefix_tuning",
}

__all__ = [
    "CAA",
    "IA3",
    "ITI",
    "LTSFT",
    "MAM",
    "MEMIT",
    "PEFT",
    "ROME",
    "SSB",
    "SSL",
    "Ablation",
    "ActAdd",
    "AdaLoRA",
    "AdapterCallback",
    "AdapterEMA",
    "AdapterPlus",
    "AttentionPrefix",
    "BitFit",
    "Compacter",
    "CompacterPlusPlus",
    "Composite",
    "Edit",
    "FullFineTuning",
    "HeadGains",
    "HeadOffsets",
    "Houlsby",
    "LayerOffsets",
    "LoFiT",
    "LoRA",
    "LotteryTicket",
    "PTuning",
    "ParallelAdapter",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "QLoRA",
    "Quantize",
    "ReadingEdit",
    "RepE",
    "ScaledParallelAdapter",
    "Steer",
    "Strata",
    "TopLayers",
    "TrunkCache",
    "UniPELT",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
