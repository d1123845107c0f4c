"""Make this package's methods full citizens of peft, in whichever order the two are imported.

This is the only place that knows how peft keeps its list of methods. `PeftModel.from_pretrained` on a folder written
with one of our methods works after `import lightning_peft` alone, although importing this package does not import
peft: if peft is already loaded the methods are registered at once, else right after peft's own import.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_with_peft(methods: Sequence[str]) -> None:
    """Register this package's methods now if peft is loaded, else as soon as it is. Calling it again does nothing.

    Args:
        methods: modules that call `register_method` when they are imported.
    """
    if "peft" in sys.modules and hasattr(sys.modules["peft"], "PeftModel"):
        _import(methods)
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft(methods))


def register_method(name: str, config_cls: type, model_cls: type) -> None:
    """Add one method to peft's enum of types and to its mappings.

    Args:
        name: lower-case name; its upper-case form becomes the `PeftType`.
        config_cls: the `PeftConfig` subclass.
        model_cls: the `BaseTuner` subclass; its `prefix` is the parameter prefix.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType, register_peft_method

    member = add_peft_type(name.upper())
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)  # type: ignore[attr-defined]
    assert member in list(PeftType)


def add_peft_type(name: str) -> str:
    """Add a member to `peft.PeftType` and return it; an existing member is returned as it is.

    `register_peft_method` demands that the name be a member of the enum, and Python's enums are closed once
    defined, so the member is made by hand, in the way the enum machinery itself does.
    """
    from peft.utils import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)


class _AfterPeft(MetaPathFinder):
    """A finder that finds peft as Python would, and registers our methods once its import has finished."""

    def __init__(self, methods: Sequence[str]) -> None:
        self.methods = methods

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        # it stays in place until peft runs: transformers asks whether there is a peft, and does not import it
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self.methods)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader, methods: Sequence[str]) -> None:
        self.loader, self.methods = loader, methods

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # peft must see its own loader, e.g. for importlib.resources
        module.__spec__.loader = module.__loader__ = self.loader
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterPeft)]
        self.loader.exec_module(module)
        _import(self.methods)
