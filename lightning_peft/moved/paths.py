"""Old module paths: an old path is the very module that stands at the new one, not a copy of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, ModuleType
from typing import Any

from lightning_peft.moved import MODULES, new_path, warn_moved


def install(modules: Mapping[str, str] = MODULES) -> OldPaths:
    """Let Python import old paths; return the finder that does, which is in `sys.meta_path` now."""
    finder = OldPaths(modules)
    sys.meta_path.insert(0, finder)  # a folder that an update left behind would be found as a package by the others
    return finder


class OldPaths(MetaPathFinder):
    """Find modules by their old paths."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = dict(modules)
        self.packages = {key[:end] for key in modules for end, letter in enumerate(key) if letter == "."}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = new_path(fullname, self.modules)
        if fullname in self.packages and self._is_scattered(fullname, new):
            spec = PathFinder.find_spec(fullname, path) if new is None else None
            if spec is not None and spec.loader is not None:
                return None
            return ModuleSpec(fullname, _Scattered(self.modules), is_package=True)
        real = _locate(new) if new else None
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return ModuleSpec(fullname, _Alias(real), origin=real.origin, is_package=is_package)

    def _is_scattered(self, package: str, new: str | None) -> bool:
        """Return whether modules of a package stand elsewhere than in the package that took its place."""
        below = [key for key in self.modules if key.startswith(f"{package}.")]
        return new is None or any(self.modules[key] != new + key[len(package) :] for key in below)


def _locate(name: str) -> ModuleSpec | None:
    """Return a module's spec, or None where there is no such module, without importing the packages that it is in.

    importlib holds its global lock while it asks a finder (`_find_spec`, Python 3.11): a finder that imports could wait
    for a thread that is importing, which waits for that lock.
    """
    module, package = sys.modules.get(name), name.rpartition(".")[0]
    if module is not None and module.__spec__ is not None:
        return module.__spec__
    if not package:
        return PathFinder.find_spec(name)
    parent = _locate(package)
    if parent is None or parent.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, parent.submodule_search_locations)


class _Alias(Loader):
    """Load the module at the new path as the one at the old path."""

    def __init__(self, real: ModuleSpec) -> None:
        self.real = real

    def exec_module(self, module: ModuleType) -> None:
        # importlib goes on with what stands here, and leaves the attributes of that module alone
        sys.modules[module.__name__] = importlib.import_module(self.real.name)
        warn_moved(module.__name__, self.real.name)

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code at the new path: `python -m` runs that."""
        warn_moved(fullname, self.real.name)
        loader: Any = self.real.loader
        return loader.get_code(self.real.name)


class _Scattered(Loader):
    """Make a package without files, whose attributes are looked up where they stand now."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = modules

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__
        new = new_path(package, self.modules)

        def answer(name: str) -> object:
            if f"{package}.{name}" in self.modules:
                return importlib.import_module(f"{package}.{name}")
            if new is None or name.startswith("__"):
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(importlib.import_module(new), name)
            warn_moved(f"{package}.{name}", f"{new}.{name}")
            return value

        vars(module)["__getattr__"] = answer
