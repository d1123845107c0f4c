"""Traces of what stands on a module's instances, and their first difference from before."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.replaced import Handle

Traces = dict[tuple[str, str], Any]  # (module, attribute) -> value
_PLAIN = (bool, int, float, str, type(None))


def traces(module: nn.Module) -> Traces:
    """Return the class of every module in `module` and what stands on its instance: children, hooks, anything else.

    Dictionaries, such as those of parameters, children and hooks, are taken apart, and so are configurations; what is
    in them is there itself, not copied.
    """
    values: Traces = {}
    for name, part in module.named_modules():
        values[name, "its class"] = type(part)
        for key, value in vars(part).items():
            # children come and go in another dictionary where one is walked over; in it they are what they were
            values[name, key] = type(value) if key == "_modules" else value
            inner = value if isinstance(value, dict) else value.to_dict() if hasattr(value, "to_dict") else {}
            # hooks have numbers, which differ between two modules that are alike
            names = [number if isinstance(entry, int) else entry for number, entry in enumerate(inner)]
            values |= {(name, f"{key}[{n!r}]"): item for n, item in zip(names, inner.values(), strict=True)}
            values[name, f"the order of {key}"] = tuple(map(str, inner))
    return values


def first_difference(before: Traces, after: Traces) -> str | None:
    """Return in words where two `traces` differ first: something new, missing, or replaced by another object."""
    for place in [*after, *(before.keys() - after.keys())]:
        name, key = place
        where = f"{key} of {name or 'the module'}"
        if place not in before:
            return f"{where} is new"
        if place not in after:
            return f"{where} is missing"
        if not _same(before[place], after[place]):
            return f"{where} is another"
    return None


def handles_on(*owners: Any) -> list[str]:
    """Return the names under which replacements still stand on instances."""
    return [key for owner in owners for key, value in vars(owner).items() if isinstance(value, Handle)]


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, _PLAIN) and a == b
