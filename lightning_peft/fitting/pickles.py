"""Files of `torch.save`, read without running anything: only tensors and plain values are read."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from lightning_peft.stack.adapter_files.typed_values import AdapterError


class Unread:
    """A stand-in for an object or class that a file names: nothing of it was imported, made or run."""

    was = ""  # the name

    def __new__(cls, *_: object) -> Unread:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _UnreadMapping(Unread):
    """A stand-in for a class whose objects are filled as dicts are; they remember its name."""

    def __new__(cls, *_: object) -> Any:
        mapping: OrderedDict[Any, Any] = OrderedDict()
        vars(mapping)["was"] = cls.was
        return mapping


def read_file(path: Path, map_location: Any = "cpu", trust: bool = False) -> Any:
    """Return the content of a file that `torch.save` wrote.

    Args:
        path: the file.
        map_location: as in `torch.load`.
        trust: unpickle it whole, which runs the code that it names.

    Raises:
        AdapterError: it is truncated, no such file at all, or written in a way that only unpickling reads.
        FileNotFoundError: it does not exist.
    """
    unknown: list[str] = []
    try:
        with open(path, "rb"):
            pass  # further errors of the system are of what is in it, such as a place before its beginning
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        if trust:
            return torch.load(path, map_location=map_location, weights_only=False)
        unknown = sorted(_unknown(path))
        try:
            return _read(path, map_location, unknown, Unread)
        except pickle.UnpicklingError:
            if not unknown:
                raise
            return _read(path, map_location, unknown, _UnreadMapping)
    except AdapterError:
        raise
    except Exception as error:  # whatever a damaged file makes of itself
        if trust:
            raise AdapterError(f"{path} is truncated, or cannot be unpickled here: {error!r}.") from error
        if unknown or isinstance(error, pickle.UnpicklingError):
            content = f"more than tensors and plain values ({_shown(unknown[0])})" if unknown else "what cannot be read"
            raise AdapterError(
                f"{path} holds {content}, in a form that only unpickling reads, which runs code: give trust=True "
                "(--trust) if you trust its author."
            ) from error
        raise AdapterError(f"{path} is truncated or damaged.") from error


def unread(value: object) -> dict[str, str]:
    """Return the values left unread in dicts, lists, tuples and sets: place, as `a.b.0`, -> name of the type."""
    type_names: dict[str, str] = {}
    waiting: list[tuple[str, Any]] = [("", value)]
    seen: set[int] = set()
    while waiting:
        place, item = waiting.pop()
        kind = item if isinstance(item, type) else type(item)
        if issubclass(kind, Unread) or (kind is OrderedDict and hasattr(item, "was")):
            type_names[_shown(place)] = _shown(item.was)
        elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            pairs = list(item.items() if isinstance(item, dict) else enumerate(item))
            waiting += [(f"{place}.{key}".lstrip("."), inner) for key, inner in pairs]
            waiting += [(place, key) for key, _ in pairs if isinstance(item, dict)]
    return type_names


def _shown(name: object) -> str:
    """Return a name from a file, on one line and not endless."""
    return " ".join(str(name)[:120].split())


def type_name(kind: type) -> str:
    """Return a type's full name, as a file would have it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _read(path: Path, map_location: Any, unknown: list[str], kind: type) -> Any:
    """Read a file, with objects of `kind` in place of those that PyTorch would not make by itself."""
    stand_ins: list[Any] = [(type(f"Unread[{name}]", (kind,), {"was": name}), name) for name in unknown]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location=map_location, weights_only=True)


def _unknown(path: Path) -> list[str]:
    """Return the names in a file that `torch.load(weights_only=True)` does not know, importing none of them."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError as error:
        raise AdapterError(f"{path} is no checkpoint, or the beginning of it is missing.") from error
