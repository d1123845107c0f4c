"""Plain values that were read from a file, held against the types they must have."""

from __future__ import annotations

import functools
import json
import reprlib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, is_typeddict

import torch

from lightning_peft.stack.adapter_files.names import is_folder_name


class AdapterError(ValueError):
    """A saved adapter cannot be used: unreadable, incomplete, not finite, or made for another base model."""


@dataclass(frozen=True)
class Fits:
    """A condition on a value besides its type, for `Annotated`."""

    test: Callable[[Any], bool]
    words: str


Name = Annotated[str, Fits(is_folder_name, "a name of letters, digits, - and _")]
# JSON knows integers of any length
Number = Annotated[float, Fits(lambda number: isinstance(number, float) or abs(number) < 2**1000, "a number")]
Finite = Annotated[float, Fits(lambda number: abs(number) < 2**1000, "a finite number")]
DType = Annotated[
    str, Fits(lambda s: isinstance(d := getattr(torch, s, None), torch.dtype) and d.is_floating_point, "a float dtype")
]


class Sample(TypedDict):
    """A sample of the values of one tensor of the base."""

    dtype: DType
    values: list[Number]


class Fingerprint(TypedDict):
    """A base's fingerprint, as `tuners.backbone.fingerprint` returns it."""

    names: str
    model_type: NotRequired[str | None]
    samples: dict[str, Sample]


class Nothing(TypedDict):
    """An empty object: of a base that is not known."""


class Notes(TypedDict):
    """The content of `lightning_peft.json`."""

    fingerprint: NotRequired[Fingerprint | Nothing]
    computed: NotRequired[bool]
    record: NotRequired[dict[str, Any] | None]


class Config(TypedDict):
    """The fields of `adapter_config.json` that are checked before peft reads it."""

    peft_type: NotRequired[str | None]
    base_model_name_or_path: NotRequired[str | None]
    task_type: NotRequired[str | None]
    target_modules: NotRequired[list[str] | str | None]
    modules_to_save: NotRequired[list[str] | None]


class Order(TypedDict):
    """The content of `stack.json`: the names of the parts' folders, innermost first."""

    parts: Annotated[list[Name], Fits(lambda names: 0 < len(names) == len(set(names)), "a list of different names")]


class Described(TypedDict):
    """One part in the description of a stack (`AdapterStack.describe`), as in a checkpoint."""

    name: Name
    config: Config
    task_type: NotRequired[str | None]
    computed: bool
    strength: Finite
    record: dict[str, Any] | None
    keys: dict[str, str]


class Backbone(TypedDict):
    """The description of a stack, as `AdapterStack.describe` returns it."""

    fingerprint: Fingerprint | Nothing
    auto_mapping: NotRequired[dict[str, str] | None]
    parts: Annotated[
        list[Described],
        Fits(lambda parts: 0 < len(parts) == len({part["name"] for part in parts}), "parts of different names"),
    ]


class Adapters(TypedDict):
    """The entry `"lightning_peft"` of a Lightning checkpoint."""

    version: int
    backbones: Annotated[dict[str, Backbone], Fits(bool, "at least one backbone")]
    left_out: NotRequired[dict[str, str]]
    outside: NotRequired[dict[str, list[str]]]
    renamed: NotRequired[dict[str, str]]


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        AdapterError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is truncated or not JSON: {error}.") from error


def check_plain(value: Any, kind: Any, source: str) -> None:
    """Raise `AdapterError` in one sentence unless a value is of a type.

    Args:
        value: of dicts, lists, strings, numbers, booleans and None.
        kind: a `TypedDict`, which may lack keys that the value has; `list[…]`, `dict[str, …]`, unions, `Annotated`
            with `Fits`; or a plain type.
        source: where it was read, for the message.
    """
    if problem := _problem(value, kind, ""):
        raise AdapterError(f"{source} is not what this package writes: {problem}.")


def _problem(value: Any, kind: Any, where: str) -> str | None:
    """Return what is wrong with a value at some place in a file, in words; None where nothing is."""
    if _may_lack(kind):
        (kind,) = typing.get_args(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    at = f"{where} is" if where else "it is"
    if origin is Annotated:
        problem = _problem(value, arguments[0], where)
        if problem is None and not arguments[1].test(value):
            problem = f"{at} {reprlib.repr(value)}, not {arguments[1].words}"
        return problem
    if origin in (typing.Union, types.UnionType):
        problems = [_problem(value, option, where) for option in arguments]
        return None if None in problems else problems[0]
    if is_typeddict(kind):
        if type(value) is not dict:
            return f"{at} {reprlib.repr(value)}, not an object"
        if kind is Nothing:
            return f"{at} not empty" if value else None
        fields = _fields(kind)
        if missing := [name for name, field in fields.items() if name not in value and not _may_lack(field)]:
            return f"{where or 'it'} has no {missing[0]}"
        inner = ((value[name], field, _join(where, name)) for name, field in fields.items() if name in value)
    elif origin is list:
        if type(value) is not list:
            return f"{at} {reprlib.repr(value)}, not a list"
        if arguments[0] is Number and all(type(item) is float for item in value):
            return None  # of samples there are thousands
        inner = ((item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is dict:
        if type(value) is not dict or not all(type(key) is str for key in value):
            return f"{at} {reprlib.repr(value)}, not an object"
        inner = ((item, arguments[1], _join(where, key)) for key, item in value.items())
    elif kind is Any:
        return None
    else:
        expected = type(None) if kind is None else kind
        fits = type(value) in (int, float) if expected is float else type(value) is expected
        return None if fits else f"{at} {reprlib.repr(value)}, not a {expected.__name__}"
    return next(filter(None, (_problem(*item) for item in inner)), None)


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _may_lack(field: Any) -> bool:
    return typing.get_origin(field) is NotRequired


def _join(where: str, key: str) -> str:
    shown = reprlib.repr(key)[1:-1]
    return f"{where}.{shown}" if where else shown
