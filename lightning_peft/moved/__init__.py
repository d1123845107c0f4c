"""What has another path, name or argument than in 0.1: the old one serves until 0.3, with one warning each.

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
MODULES: dict[str, str] = {}
# "module.name" as in 0.1 -> as it is now; the module that has it now ends with `keep_old_names(__name__)`
NAMES: dict[str, str] = {}
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
