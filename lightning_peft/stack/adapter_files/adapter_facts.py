"""What is known of a saved adapter: its kind, method and numbers, how it was made, each as a model card says it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.stack.adapter_files.names import COMPRESSED, NOTES, WEIGHTS
from lightning_peft.stack.adapter_files.readme import code, public_name
from lightning_peft.stack.adapter_files.typed_values import AdapterError, Notes, check_plain, read_json

_UNTOLD = {  # fields of a configuration that are said elsewhere, or say nothing
    *("alpha", "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "positions"),
    *("revision", "runtime_config", "task_type", "heads"),
}
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


@dataclass(frozen=True)
class AdapterFacts:
    """What a card says of one adapter.

    Args:
        config: its configuration.
        notes: our notes on it; empty in a folder that peft has written.
        parameters: how many numbers it has; None where its weights are not in the folder.
        size: bytes of the file of weights.
        compressed: whether that file is compressed.
    """

    config: Any
    notes: Mapping[str, Any]
    parameters: int | None
    size: int
    compressed: bool

    @property
    def kind(self) -> str:
        """The name of peft's type."""
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    @property
    def package(self) -> str | None:
        """The package to import before peft knows this type; None where the type is peft's own."""
        package = type(self.config).__module__.partition(".")[0]
        return None if package == "peft" else package

    @property
    def base(self) -> str | None:
        return public_name(self.config.base_model_name_or_path)

    @property
    def task(self) -> str:
        task = self.config.task_type
        return str(getattr(task, "value", task))

    @property
    def record(self) -> Mapping[str, Any]:
        return self.notes.get("record") or {}

    @property
    def title(self) -> str:
        """The method's name as Markdown."""
        name, _ = self.method
        return name if name in {name for name, _ in papers().values()} else code(name)

    @property
    def cited(self) -> str:
        """The method's name with its paper, as Markdown."""
        _, paper = self.method
        return f"{self.title} ([arXiv:{paper}](https://arxiv.org/abs/{paper}))" if paper else self.title

    @property
    def method(self) -> tuple[str, str | None]:
        """The method's name, and its paper's number at arXiv."""
        name, paper = papers().get(self.kind, (self.kind, None))
        made = self.record.get("method")
        if not isinstance(made, str):
            return name, paper
        return papers().get(made, (made, paper))


def read_facts(folder: Path, config: Any) -> AdapterFacts:
    """Return what is known of the adapter in a folder, whose configuration is given."""
    try:
        notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
        check_plain(notes, Notes, str(folder / NOTES))
    except AdapterError:  # of which no writer of this package knows
        notes = {}
    compressed = (folder / COMPRESSED).is_file()
    file = folder / (COMPRESSED if compressed else WEIGHTS)
    known = file.is_file()
    parameters = _count(file, compressed) if known else None
    return AdapterFacts(config, notes, parameters, file.stat().st_size if known else 0, compressed)


def _count(file: Path, compressed: bool) -> int:
    from safetensors import safe_open

    if compressed:
        from lightning_peft.stack.adapter_files.compression import count

        return count(file)
    with safe_open(file, "pt") as tensors:
        keys = tensors.keys()
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in keys)


def made(facts: AdapterFacts) -> str:
    """Say in a line how the weights came about, how strong they are and where they act."""
    strength = getattr(facts.config, "alpha", None)
    dial = f"; strength {code(f'alpha={strength:g}')}" if isinstance(strength, int | float) else ""
    where = getattr(facts.config, "positions", None)
    dial += f", at {code(where)} positions" if isinstance(where, str) else ""
    if not facts.notes:
        return f"saved by peft{dial}"
    known = {key: value for key, value in facts.record.items() if key != "method" and not key.endswith("hash")}
    shown = {key: value for key, value in known.items() if isinstance(value, str | int | float) or value is None}
    shown |= {key: value for key, value in known.items() if key == "weights"}
    details = ", ".join(code(f"{key}={_plain(value)}") for key, value in shown.items() if value is not None)
    how = "computed, without gradient descent" if facts.notes.get("computed") else "trained"
    if facts.record.get("adapters"):
        how = "computed from other adapters"
    return f"{how}{dial}{f'; {details}' if details else ''}"


def data(facts: AdapterFacts) -> str:
    """Return the hashes of what the weights were computed from, as they were recorded."""
    hashes = list(dict.fromkeys(_hashes(facts.record)))
    if not hashes:
        return "no hash of it was recorded"
    return f"SHA-256 {', '.join(map(code, hashes))} of what it was computed from, as recorded in {code(NOTES)}"


def _hashes(record: object) -> Iterator[str]:
    """Yield the hashes of data in a record, and in those of adapters that it was made from."""
    if isinstance(record, Mapping):
        if isinstance(record.get("data_hash"), str):
            yield record["data_hash"]
        for value in record.values():
            yield from _hashes(value)
    elif isinstance(record, list):
        for value in record:
            yield from _hashes(value)


def settings(config: Any) -> str:
    """Return the fields of a configuration that are not their defaults."""
    shown = []
    for field in sorted(dataclasses.fields(config), key=lambda field: field.name):
        value = getattr(config, field.name, None)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in _UNTOLD and value is not None and value != default:
            shown.append(code(f"{field.name}={_plain(value)}"))
    return ", ".join(shown)


def _plain(value: object) -> str:
    """Return a short text of a value, the same each time, in which a path is only its last part."""
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:\\", value):
        value = public_name(value)
    return _SHOWN.repr(getattr(value, "value", value))


@functools.cache
def papers() -> dict[str, tuple[str, str | None]]:
    """Return names and numbers at arXiv by peft's type, or by the method that a record names."""
    content = json.loads(Path(__file__).with_name("papers.json").read_text(encoding="utf-8"))
    return {key: (name, paper) for key, (name, paper) in content.items()}
