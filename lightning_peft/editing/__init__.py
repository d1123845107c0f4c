"""What computes an adapter without gradient descent: sites, capture, probes, directions, edits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.editing.arithmetic import combine
    from lightning_peft.editing.capture import Capture, HeadCapture
    from lightning_peft.editing.collect import Captured, capture_texts, capture_tokens
    from lightning_peft.editing.contrast import (
        LayerEdit,
        ablation_direction,
        act_add_vectors,
        caa_vectors,
        repe_vectors,
    )
    from lightning_peft.editing.differences import checkpoint_difference
    from lightning_peft.editing.dola import DoLa
    from lightning_peft.editing.facts import (
        Fact,
        FactScores,
        KeyMoments,
        KnowledgeEdit,
        causal_trace,
        compute_memit,
        compute_rome,
        key_moments,
        read_facts,
        score_facts,
    )
    from lightning_peft.editing.heads import HeadSite, head_offsets_config, head_sites
    from lightning_peft.editing.iti import HeadEdit, compute_iti
    from lightning_peft.editing.layers import LayerSite, layer_offsets_config, layer_sites, stream_writers
    from lightning_peft.editing.probes import CCSProbes, LogisticProbes
    from lightning_peft.editing.row_offsets import RowOffsets, displacements
    from lightning_peft.editing.rtd import RTD, final_states
    from lightning_peft.editing.selection import Selection

_MODULES = {
    "checkpoint_difference": "differences",
    "combine": "arithmetic",
    "HeadSite": "heads",
    "head_sites": "heads",
    "head_offsets_config": "heads",
    "LayerSite": "layers",
    "layer_sites": "layers",
    "layer_offsets_config": "layers",
    "stream_writers": "layers",
    "LayerEdit": "contrast",
    "ablation_direction": "contrast",
    "act_add_vectors": "contrast",
    "caa_vectors": "contrast",
    "repe_vectors": "contrast",
    "Capture": "capture",
    "HeadCapture": "capture",
    "Captured": "collect",
    "capture_texts": "collect",
    "capture_tokens": "collect",
    "CCSProbes": "probes",
    "LogisticProbes": "probes",
    "RowOffsets": "row_offsets",
    "displacements": "row_offsets",
    "DoLa": "dola",
    "RTD": "rtd",
    "final_states": "rtd",
    "Selection": "selection",
    "HeadEdit": "iti",
    "Fact": "facts",
    "FactScores": "facts",
    "KeyMoments": "facts",
    "KnowledgeEdit": "facts",
    "causal_trace": "facts",
    "compute_memit": "facts",
    "compute_rome": "facts",
    "key_moments": "facts",
    "read_facts": "facts",
    "score_facts": "facts",
    "compute_iti": "iti",
}

__all__ = [
    "RTD",
    "CCSProbes",
    "Capture",
    "Captured",
    "DoLa",
    "Fact",
    "FactScores",
    "HeadCapture",
    "HeadEdit",
    "HeadSite",
    "KeyMoments",
    "KnowledgeEdit",
    "LayerEdit",
    "LayerSite",
    "LogisticProbes",
    "RowOffsets",
    "Selection",
    "ablation_direction",
    "act_add_vectors",
    "caa_vectors",
    "capture_texts",
    "capture_tokens",
    "causal_trace",
    "checkpoint_difference",
    "combine",
    "compute_iti",
    "compute_memit",
    "compute_rome",
    "displacements",
    "final_states",
    "head_offsets_config",
    "head_sites",
    "key_moments",
    "layer_offsets_config",
    "layer_sites",
    "read_facts",
    "repe_vectors",
    "score_facts",
    "stream_writers",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
