"""The arguments that an object was made with, as plain values: what results depend on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def described(value: Any) -> Any:
    """Return a JSON-able description that is the same in every process.

    Objects are described by their class and its arguments: those of a dataclass are its fields, those of a task what it
    was made with, those of anything else its public attributes.

    Example:
        >>> from lightning_peft.tasks import Measure
        >>> described([Path("runs"), 1.5, None])
        ['runs', 1.5, None]
        >>> described(Measure("Accuracy", "share right"))["init_args"]["better"]
        1
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): described(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [described(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    arguments: Mapping[str, Any] | None
    if dataclasses.is_dataclass(value):
        arguments = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        arguments = getattr(value, "_made_with", None)
        if arguments is None:
            attributes = getattr(value, "__dict__", {})
            arguments = {name: attributes[name] for name in sorted(attributes) if not name.startswith("_")}
    kind = type(value)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": described(arguments)}


def bound_arguments(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a class by name, defaults among them; none where they do not fit it."""
    try:
        bound = inspect.signature(kind).bind(*args, **kwargs)
    except TypeError:  # which making the object says better
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def option_names(function: Any) -> set[str] | None:
    """Return the names of the options that a method takes behind its first argument; None where it takes any."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}
