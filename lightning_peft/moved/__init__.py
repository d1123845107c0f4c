"""Paths, names and arguments that changed since 0.1: the old ones serve until 0.3, with one warning each.

The warnings are `FutureWarning`s. Python hides a `DeprecationWarning` unless `__main__` itself calls: class paths in
YAML and a user's own modules, where most old paths stand, would never show one.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

# old path -> new path; a package moves all below it, unless a longer entry says otherwise (to stay: its own path)
MODULES: dict[str, str] = {
    "lightning_peft.callbacks.ablation": "lightning_peft.callbacks.edits.ablation",
    "lightning_peft.callbacks.act_add": "lightning_peft.callbacks.edits.act_add",
    "lightning_peft.callbacks.activations": "lightning_peft.planning.activation_bytes",
    "lightning_peft.callbacks.adalora": "lightning_peft.callbacks.tuning.adalora",
    "lightning_peft.callbacks.alive": "lightning_peft.fitting.alive",
    "lightning_peft.callbacks.attention_prefix": "lightning_peft.callbacks.tuning.attention_prefix",
    "lightning_peft.callbacks.backbone": "lightning_peft.fitting.find_backbone",
    "lightning_peft.callbacks.bitfit": "lightning_peft.callbacks.tuning.bitfit",
    "lightning_peft.callbacks.bottleneck": "lightning_peft.callbacks.tuning.bottleneck",
    "lightning_peft.callbacks.caa": "lightning_peft.callbacks.edits.caa",
    "lightning_peft.callbacks.checkpointing": "lightning_peft.fitting.activation_checkpointing",
    "lightning_peft.callbacks.compacter": "lightning_peft.callbacks.tuning.compacter",
    "lightning_peft.callbacks.composite": "lightning_peft.callbacks.tuning.composite",
    "lightning_peft.callbacks.data_init": "lightning_peft.fitting.data_init",
    "lightning_peft.callbacks.edit": "lightning_peft.fitting.edit",
    "lightning_peft.callbacks.edit_layers": "lightning_peft.fitting.edit_layers",
    "lightning_peft.callbacks.finite": "lightning_peft.fitting.finite",
    "lightning_peft.callbacks.frozen": "lightning_peft.fitting.frozen",
    "lightning_peft.callbacks.full": "lightning_peft.callbacks.tuning.full",
    "lightning_peft.callbacks.head_gains": "lightning_peft.callbacks.tuning.head_gains",
    "lightning_peft.callbacks.head_offsets": "lightning_peft.callbacks.tuning.head_offsets",
    "lightning_peft.callbacks.ia3": "lightning_peft.callbacks.tuning.ia3",
    "lightning_peft.callbacks.iti": "lightning_peft.callbacks.edits.iti",
    "lightning_peft.callbacks.knowledge": "lightning_peft.callbacks.edits.knowledge",
    "lightning_peft.callbacks.layer_offsets": "lightning_peft.callbacks.tuning.layer_offsets",
    "lightning_peft.callbacks.lofit": "lightning_peft.callbacks.tuning.lofit",
    "lightning_peft.callbacks.lora": "lightning_peft.callbacks.tuning.lora",
    "lightning_peft.callbacks.lottery": "lightning_peft.callbacks.tuning.lottery",
    "lightning_peft.callbacks.mam": "lightning_peft.callbacks.tuning.mam",
    "lightning_peft.callbacks.modes": "lightning_peft.fitting.train_modes",
    "lightning_peft.callbacks.optimizers": "lightning_peft.fitting.optimizers",
    "lightning_peft.callbacks.options": "lightning_peft.fitting.adapter_callback",
    "lightning_peft.callbacks.p_tuning": "lightning_peft.callbacks.tuning.p_tuning",
    "lightning_peft.callbacks.paging": "lightning_peft.fitting.paging",
    "lightning_peft.callbacks.peft": "lightning_peft.fitting.peft",
    "lightning_peft.callbacks.phases": "lightning_peft.fitting.multi_phase",
    "lightning_peft.callbacks.plan": "lightning_peft.planning.estimate",
    "lightning_peft.callbacks.precision": "lightning_peft.fitting.precision",
    "lightning_peft.callbacks.prefix_tuning": "lightning_peft.callbacks.tuning.prefix_tuning",
    "lightning_peft.callbacks.prompt_tuning": "lightning_peft.callbacks.tuning.prompt_tuning",
    "lightning_peft.callbacks.qlora": "lightning_peft.callbacks.tuning.qlora",
    "lightning_peft.callbacks.read_back": "lightning_peft.fitting.read_back",
    "lightning_peft.callbacks.repe": "lightning_peft.callbacks.edits.repe",
    "lightning_peft.callbacks.report": "lightning_peft.fitting.report",
    "lightning_peft.callbacks.sparse": "lightning_peft.callbacks.tuning.sparse",
    "lightning_peft.callbacks.ssb": "lightning_peft.callbacks.tuning.ssb",
    "lightning_peft.callbacks.ssl": "lightning_peft.callbacks.tuning.ssl",
    "lightning_peft.callbacks.strata": "lightning_peft.callbacks.tuning.strata",
    "lightning_peft.callbacks.strategies": "lightning_peft.fitting.strategies",
    "lightning_peft.callbacks.trained_bytes": "lightning_peft.planning.trained_bytes",
    "lightning_peft.callbacks.unipelt": "lightning_peft.callbacks.tuning.unipelt",
    "lightning_peft.cli.scoring": "lightning_peft.cli.validation",
    "lightning_peft.compare.scoring": "lightning_peft.compare.decoding",
    "lightning_peft.complete": "lightning_peft.fitting.complete",
    "lightning_peft.editing.checkpoints": "lightning_peft.editing.differences",
    "lightning_peft.editing.examples": "lightning_peft.editing.probes.linear",
    "lightning_peft.editing.facts.prompts": "lightning_peft.editing.facts.prompt_tokens",
    "lightning_peft.hyperparameters": "lightning_peft.fitting.hyperparameters",
    "lightning_peft.locking": "lightning_peft.files.locking",
    "lightning_peft.pickles": "lightning_peft.fitting.pickles",
    "lightning_peft.records": "lightning_peft.files.records",
    "lightning_peft.shards": "lightning_peft.fitting.shards",
    "lightning_peft.smollm2": "lightning_peft.cli.smollm2",
    "lightning_peft.sweep.plan": "lightning_peft.sweep.settings",
    "lightning_peft.testing.counts": "lightning_peft.backbone.counts",
    "lightning_peft.trial": "lightning_peft.packing.fallback",
    "lightning_peft.trie": "lightning_peft.packing.prefix_tree",
    "lightning_peft.tuners.backbone": "lightning_peft.backbone",
    "lightning_peft.tuners.backbone.places": "lightning_peft.backbone.parts",
    "lightning_peft.tuners.configs": "lightning_peft.stack.configs",
    "lightning_peft.tuners.folders": "lightning_peft.stack.adapter_files",
    "lightning_peft.tuners.folders.files": "lightning_peft.stack.adapter_files.folder",
    "lightning_peft.tuners.folders.packing": "lightning_peft.stack.adapter_files.rice_code",
    "lightning_peft.tuners.folders.places": "lightning_peft.stack.adapter_files.plain_model",
    "lightning_peft.tuners.folders.plain": "lightning_peft.stack.adapter_files.typed_values",
    "lightning_peft.tuners.folders.probes": "lightning_peft.stack.adapter_files.example_inputs",
    "lightning_peft.tuners.folders.sharded": "lightning_peft.backbone.sharded",
    "lightning_peft.tuners.gates": "lightning_peft.stack.gates",
    "lightning_peft.tuners.quantization": "lightning_peft.backbone.quantization",
    "lightning_peft.tuners.quantized_layers": "lightning_peft.backbone.quantized_layers",
    "lightning_peft.tuners.registration": "lightning_peft.stack.registration",
    "lightning_peft.tuners.stack": "lightning_peft.stack.stack",
    "lightning_peft.tuners.steering": "lightning_peft.stack.steering",
    "lightning_peft.tuners.trunk": "lightning_peft.fitting.trunk",
    "lightning_peft.tuners.ways": "lightning_peft.stack.injection",
    "lightning_peft.tuners.ways.adaption": "lightning_peft.stack.injection.adaption_prompt",
    "lightning_peft.tuners.ways.kinds": "lightning_peft.stack.injection.registry",
    "lightning_peft.tuners.ways.prompts": "lightning_peft.stack.injection.prompt_learning",
    "lightning_peft.tuners.weight_deltas.places": "lightning_peft.tuners.weight_deltas.owners",
    "lightning_peft.whole": "lightning_peft.files.atomic",
    "lightning_peft.window": "lightning_peft.backbone.window",
}
# "module.name" as in 0.1 -> as it is now; the module that has it now ends with `keep_old_names(__name__)`
NAMES: dict[str, str] = {
    "lightning_peft.tuners.stack.Part": "lightning_peft.stack.adapter.Adapter",
    "lightning_peft.tuners.ways.kinds.kind_of": "lightning_peft.stack.injection.registry.injection_for",
    "lightning_peft.callbacks.phases.Phased": "lightning_peft.fitting.multi_phase.MultiPhase",
    "lightning_peft.callbacks.phases.PhasedDeltas": "lightning_peft.fitting.multi_phase.MultiPhaseDeltas",
    "lightning_peft.tuners.configs.with_strength": "lightning_peft.stack.configs.with_scale",
    "lightning_peft.tuners.configs.nearest_names": "lightning_peft.backbone.nearest_names.nearest_names",
}
# "module.Class.argument", the path as it is now, the argument as in 0.1 -> the argument; see `keep_old_arguments`
ARGUMENTS: dict[str, str] = {}

_WARNED: set[str] = set()
_PASSED_OVER = ("importlib", "_frozen_importlib", "lightning_peft")  # frames of these are not the caller's


def new_path(old: str, modules: Mapping[str, str] = MODULES) -> str | None:
    """Return where a module stands now, or None where it has not moved."""
    entry = entry_for(old, modules)
    new = modules[entry] + old[len(entry) :] if entry else old
    return new if new != old else None


def entry_for(path: str, modules: Mapping[str, str] = MODULES) -> str:
    """Return the longest entry that is this path or a package above it, or an empty string."""
    while path and path not in modules:
        path = path.rpartition(".")[0]
    return path


def resolve(path: str) -> Any:
    """Return the object at "module.name"."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def warn_moved(old: str, new: str) -> None:
    """Warn once in a process that `old` is `new` now, at the line that used it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        if str(frame.f_locals.get("name")).startswith(f"{old}."):
            return  # importlib loads a package on the way to a module in it, which has a warning of its own
        frame = frame.f_back
    if old not in _WARNED:
        _WARNED.add(old)
        module = frame.f_globals.get("__name__", "<unknown>")
        registry = frame.f_globals.setdefault("__warningregistry__", {})
        message = f"{old} is now {new}; the old one will be gone in lightning-peft 0.3."
        warnings.warn_explicit(message, FutureWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)


def table(documented: Iterable[str] | None = None) -> str:
    """Return what moved as a table in Markdown.

    Args:
        documented: modules, and names as "module.name": leave out the modules and names that concern none of these.
    """
    shown = {*MODULES, *NAMES}
    if documented is not None:
        paths = set(documented)
        shown = paths & NAMES.keys() | {entry_for(path, MODULES) for path in paths}
    rows = {old: new for old, new in {**MODULES, **NAMES}.items() if old in shown and old != new}
    for key, new in ARGUMENTS.items():
        owner, _, old = key.rpartition(".")
        rows[f"{owner}({old}=…)"] = f"{owner}({new}=…)"
    return "\n".join(["| 0.1 | 0.2 |", "|---|---|", *(f"| `{old}` | `{rows[old]}` |" for old in sorted(rows))])
