"""Old names: of what is in a module, and of the arguments of a class."""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_peft.moved import ARGUMENTS, MODULES, NAMES, new_path, resolve, warn_moved

C = TypeVar("C", bound=type)


def keep_old_names(module: str, names: Mapping[str, str] = NAMES, modules: Mapping[str, str] = MODULES) -> None:
    """Let a module answer to the names that it had in 0.1; its last line is `keep_old_names(__name__)`.

    It sets the module's `__getattr__`, before one that is there already: one written out in the module would keep type
    checkers from seeing a misspelt import.
    """
    renamed = {}
    for old, new in names.items():
        home, _, name = old.rpartition(".")
        if module in (home, new_path(home, modules)):
            renamed[name] = (old, new)
    namespace = vars(sys.modules[module])
    otherwise = namespace.get("__getattr__")

    def answer(name: str) -> object:
        if name in renamed:
            warn_moved(*renamed[name])
            return resolve(renamed[name][1])
        if otherwise is not None:
            return otherwise(name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    namespace["__getattr__"] = answer


def keep_old_arguments(cls: C, arguments: Mapping[str, str] = ARGUMENTS) -> C:
    """Let a class take the arguments that it had in 0.1, by keyword and in YAML; a decorator, also above `@dataclass`.

    Raises:
        TypeError: when an object is made with an argument by its old and by its new name.
    """
    untyped: Any = cls
    path, init = f"{cls.__module__}.{cls.__qualname__}", untyped.__init__
    renamed = {key.removeprefix(f"{path}."): new for key, new in arguments.items() if key.rpartition(".")[0] == path}
    parameters = inspect.signature(init).parameters

    @functools.wraps(init)
    def translated(self: object, *args: object, **kwargs: object) -> None:
        for old in renamed.keys() & kwargs.keys():
            new = renamed[old]
            # a parser gives every default
            if new in kwargs and (new not in parameters or kwargs[new] != parameters[new].default):
                raise TypeError(f"{cls.__name__} was given {old} and {new}, which is its name now: leave {old} out.")
            warn_moved(f"{path}({old}=…)", f"{path}({new}=…)")
            kwargs[new] = kwargs.pop(old)
        init(self, *args, **kwargs)

    vars(translated)["__signature__"] = _with_old(parameters, renamed)
    translated.__annotations__ = {old: init.__annotations__.get(new, Any) for old, new in renamed.items()}
    translated.__annotations__ |= init.__annotations__
    untyped.__init__ = translated
    return cls


def _with_old(parameters: Mapping[str, inspect.Parameter], renamed: Mapping[str, str]) -> inspect.Signature:
    """Return the signature that jsonargparse reads: it takes the old names too, and asks for neither of the two.

    The default SUPPRESS keeps an argument that is not given out of what jsonargparse makes and saves.
    """
    kind = inspect.Parameter.KEYWORD_ONLY
    optional = dict(parameters)
    for old, new in renamed.items():
        annotation = parameters[new].annotation if new in parameters else Any
        optional[old] = inspect.Parameter(old, kind, default=argparse.SUPPRESS, annotation=annotation)
        if new in parameters and parameters[new].default is inspect.Parameter.empty:
            optional[new] = parameters[new].replace(kind=kind, default=argparse.SUPPRESS)
    return inspect.Signature(sorted(optional.values(), key=lambda parameter: parameter.kind))
