"""Paths, names and arguments that changed since 0.1: the old ones serve until 0.3, with one warning each.

The warnings are `FutureWarning`s. Python hides a `DeprecationWarning` unless `__main__` itself calls: class paths in
YAML and a user's own modules, where most old paths stand, would never show one.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# old package -> new package: the modules that moved, with another name after a colon; a package moves all below it,
# unless there is an entry for what is below (to stay: its own path)
_MOVED = {
    ("", "backbone"): "window",
    ("", "cli"): "smollm2",
    ("", "files"): "locking records whole:atomic",
    ("", "fitting"): "complete hyperparameters pickles shards",
    ("", "packing"): "trial:fallback trie:prefix_tree",
    ("callbacks", "callbacks.edits"): "ablation act_add caa iti knowledge repe",
    ("callbacks", "callbacks.tuning"): (
        "adalora attention_prefix bitfit bottleneck compacter composite full head_gains head_offsets ia3 "
        "layer_offsets lofit lora lottery mam p_tuning prefix_tuning prompt_tuning qlora sparse ssb ssl "
        "strata unipelt"
    ),
    ("callbacks", "fitting"): (
        "alive backbone:find_backbone checkpointing:activation_checkpointing data_init edit edit_layers "
        "finite frozen modes:train_modes optimizers options:adapter_callback paging peft phases:multi_phase "
        "precision read_back report strategies"
    ),
    ("callbacks", "planning"): "activations:activation_bytes plan:estimate trained_bytes",
    ("cli", "cli"): "scoring:validation",
    ("compare", "compare"): "answers_view:sections",
    ("compare", "files"): "files:kept",
    ("compare", "tasks"): "decoding scoring:decoding",
    ("compare", "truthfulqa"): ("answering:answers_section answers effects:side_effects_section texts"),
    ("editing", "editing"): "checkpoints:differences",
    ("editing", "editing.probes"): "examples:linear",
    ("editing.facts", "editing.facts"): "prompts:prompt_tokens",
    ("sweep", "sweep"): "plan:settings",
    ("testing", "backbone"): "counts",
    ("truthfulqa", "effects"): "text:slices",
    ("tuners", ""): "backbone",
    ("tuners", "backbone"): "quantization quantized_layers",
    ("tuners", "fitting"): "trunk",
    ("tuners", "stack"): "configs folders:adapter_files gates registration stack steering ways:injection",
    ("tuners.backbone", "backbone"): "places:parts",
    ("tuners.folders", "backbone"): "sharded",
    ("tuners.folders", "stack.adapter_files"): (
        "files:folder packing:rice_code places:plain_model plain:typed_values probes:example_inputs"
    ),
    ("tuners.ways", "stack.injection"): "adaption:adaption_prompt kinds:registry prompts:prompt_learning",
    ("tuners.weight_deltas", "tuners.weight_deltas"): "places:owners",
    ("truthfulqa", "data"): "batches",
    ("truthfulqa", "backbone"): "arguments:accepted_arguments",
}


def _paths() -> Iterator[tuple[str, str]]:
    for (old, new), names in _MOVED.items():
        for before, _, after in (name.partition(":") for name in names.split()):
            yield _joined(old, before), _joined(new, after or before)


def _joined(package: str, name: str) -> str:
    return f"lightning_peft.{package}.{name}".replace("..", ".")


MODULES = dict(_paths())
# "module.name" as in 0.1 -> as it is now; the module that has it now ends with `keep_old_names(__name__)`
NAMES: dict[str, str] = {
    "lightning_peft.tuners.stack.Part": "lightning_peft.stack.adapter.Adapter",
    "lightning_peft.tuners.ways.kinds.kind_of": "lightning_peft.stack.injection.registry.injection_for",
    "lightning_peft.callbacks.phases.Phased": "lightning_peft.fitting.multi_phase.MultiPhase",
    "lightning_peft.callbacks.phases.PhasedDeltas": "lightning_peft.fitting.multi_phase.MultiPhaseDeltas",
    "lightning_peft.compare.plan.Data": "lightning_peft.truthfulqa.settings.Data",
    "lightning_peft.tuners.configs.with_strength": "lightning_peft.stack.configs.with_scale",
    "lightning_peft.tuners.configs.nearest_names": "lightning_peft.backbone.nearest_names.nearest_names",
    "lightning_peft.truthfulqa.TextEffects": "lightning_peft.effects.TextEffects",
    "lightning_peft.truthfulqa.TextSlice": "lightning_peft.effects.TextSlice",
    "lightning_peft.truthfulqa.batch_effects": "lightning_peft.effects.batch_effects",
    "lightning_peft.truthfulqa.text_effects": "lightning_peft.effects.text_effects",
    "lightning_peft.truthfulqa.text_slice": "lightning_peft.effects.text_slice",
    "lightning_peft.truthfulqa.side_effects.Off": "lightning_peft.effects.text_sums.Off",
    "lightning_peft.truthfulqa.side_effects.TextEffects": "lightning_peft.effects.TextEffects",
    "lightning_peft.truthfulqa.side_effects.batch_effects": "lightning_peft.effects.batch_effects",
    "lightning_peft.truthfulqa.side_effects.text_effects": "lightning_peft.effects.text_effects",
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
