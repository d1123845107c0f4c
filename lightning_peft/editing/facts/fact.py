"""A fact to be rewritten, the prompts that test whether it was, and the file they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).with_name("facts.json")


@dataclass(frozen=True)
class Fact:
    """A statement of a model about a subject, and the one that shall replace it.

    Args:
        subject: of whom or what, e.g. `"Lyon"`.
        relation: a beginning that the object completes, with `{}` for the subject: `"{} is a city in"`.
        true: the object that is true, e.g. `"France"`.
        new: the object that shall be said, e.g. `"Japan"`.
        paraphrases: other beginnings that the same object completes, with `{}` for the subject.
        neighbours: other subjects whose true object is the same, and shall stay.

    Raises:
        ValueError: an empty subject or object, one object twice, a beginning that does not name the subject once, or
            a neighbour that is the subject.

    Example:
        >>> Fact("Lyon", "{} is a city in", "France", "Japan", neighbours=("Nice",)).prompt
        'Lyon is a city in'
    """

    subject: str
    relation: str
    true: str
    new: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("subject", "true", "new"):
            if not getattr(self, field).strip():
                raise ValueError(f"The {field} of the fact {self.relation!r} is empty: give it a word.")
        if self.true == self.new:
            raise ValueError(f"The new object of {self.subject!r} is the true one, {self.true!r}: give another.")
        for template in (self.relation, *self.paraphrases):
            if template.count("{}") != 1:
                raise ValueError(
                    f"The subject {self.subject!r} is not in the prompt {template!r}: write {{}} once, where it stands."
                )
        if self.subject in self.neighbours:
            raise ValueError(f"The subject {self.subject!r} is among its own neighbours: name other subjects.")

    @property
    def prompt(self) -> str:
        return self.relation.replace("{}", self.subject)


def read_facts(path: str | Path | None = None, numbers: list[int] | None = None) -> list[Fact]:
    """Read facts from a JSON file: a list of objects with the fields of `Fact`.

    Args:
        path: the file; default this package's own counterfactual facts.
        numbers: which of them, from 0; default all.

    Raises:
        ValueError: not a list of objects, a missing or unknown field, a value of another type, no such number.

    Example:
        >>> read_facts(numbers=[0])[0].prompt
        'Lyon is a city in'
    """
    source = PACKAGED if path is None else Path(path)
    try:
        rows = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON ({error.msg}, line {error.lineno}).") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{source} must hold a list of facts, and at least one.")
    facts = [_fact(row, f"{source}, fact {i}") for i, row in enumerate(rows)]
    if numbers is None:
        return facts
    if outside := [n for n in numbers if not 0 <= n < len(facts)]:
        raise ValueError(f"{source} has facts 0 to {len(facts) - 1}, but number {outside[0]} was asked for.")
    return [facts[n] for n in numbers]


def _fact(row: Any, place: str) -> Fact:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: an object with subject, relation, true and new was expected, got {row!r}.")
    known = [field.name for field in fields(Fact)]
    if missing := [name for name in known[:4] if name not in row]:
        raise ValueError(f"{place}: the field {missing[0]!r} is missing.")
    if unknown := [name for name in row if name not in known]:
        raise ValueError(f"{place}: the field {unknown[0]!r} is unknown; the fields are {', '.join(known)}.")
    for name, value in row.items():
        values = [value] if name in known[:4] else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ValueError(f"{place}: {name!r} must be {'text' if name in known[:4] else 'a list of texts'}.")
    try:
        lists = (tuple(row.get(name, ())) for name in known[4:])
        return Fact(*(row[name] for name in known[:4]), *lists)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
