"""Values that two probes wrote, compared bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Values = dict[str, Any]  # by file and place in it: tensors, numbers, texts

ERROR = "error.json"
_IGNORED = {"peft_version", "pytorch-lightning_version", "seconds", "scoring_seconds", "traceback"}
_UNORDERED = {"target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"}  # sets, saved as lists
_ABSENT = "(absent)"


@dataclass
class Comparison:
    """What was compared of a section.

    Args:
        cases: the number of cases that both sides computed.
        values: the number of tensors, numbers and texts in them.
        differing: for each case that differs, a line for each value that does.
        left_out: for each case that was not compared, why.
    """

    cases: int = 0
    values: int = 0
    differing: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, before: Values, after: Values) -> None:
        """Compare two sides of a case, value by value."""
        self.cases += 1
        names = sorted(before.keys() | after.keys())
        self.values += len(names)
        differences = {name: differs(before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names}
        if lines := [f"{name}: {difference}" for name, difference in differences.items() if difference]:
            self.differing[case] = lines


def compare(before: Path, after: Path) -> Comparison:
    """Compare the cases of two folders, one subfolder a case.

    A case that fails in `before`, or is not there, is left out; one that fails in `after` alone differs.
    """
    comparison = Comparison()
    for case in sorted({path.name for side in (before, after) for path in side.glob("*") if path.is_dir()}):
        if reason := _failure(before / case):
            comparison.left_out[case] = reason
        elif reason := _failure(after / case):
            comparison.differing[case] = [f"{reason} in the present tree"]
        else:
            comparison.add(case, read_values(before / case), read_values(after / case))
    return comparison


def compare_loaded(saved: Path, loaded: Path) -> Comparison:
    """Compare the logits of saved cases with those after loading each from its folder and from its checkpoint."""
    comparison = Comparison()
    for case in sorted(path.name for path in saved.glob("*") if path.is_dir()):
        if reason := _failure(saved / case):
            comparison.left_out[case] = reason
        elif (saved / case / "logits.safetensors").exists():
            expected = load_file(saved / case / "logits.safetensors")
            for source in ("folder", "checkpoint"):
                title = f"{case} from its {source}"
                if reason := _failure(loaded / source / case):
                    comparison.differing[title] = [f"{reason} in the present tree"]
                else:
                    comparison.add(title, expected, load_file(loaded / source / case / "logits.safetensors"))
    return comparison


def read_values(folder: Path) -> Values:
    """Return everything in a folder's files, by file and place in it."""
    values: Values = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = dict(_leaves(_content(path)))
        values |= {f"{path.relative_to(folder)} {place}".rstrip(): value for place, value in content.items()}
    return values


def differs(before: Any, after: Any) -> str | None:
    """Return how two values differ, or None where they are the same to the bit."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return _tensors_differ(before, after)
    if type(before) is type(after) and (before == after or _both_nan(before, after)):
        return None
    return f"{_short(before)} became {_short(after)}"


def _tensors_differ(before: Tensor, after: Tensor) -> str | None:
    if before.dtype != after.dtype or before.shape != after.shape:
        return f"{before.dtype} {list(before.shape)} became {after.dtype} {list(after.shape)}"
    if _bytes(before) == _bytes(after):
        return None
    difference = float((before.double() - after.double()).abs().max())
    return f"differ by up to {difference:.1e}, the largest value is {float(before.double().abs().max()):.1e}"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _both_nan(before: Any, after: Any) -> bool:
    return isinstance(before, float) and math.isnan(before) and math.isnan(after)


def _short(value: Any) -> str:
    text = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _failure(folder: Path) -> str | None:
    """Return why a case has no values, or None if it has them."""
    if not folder.is_dir():
        return "is not there"
    if (folder / ERROR).exists():
        error = json.loads((folder / ERROR).read_text())
        return f"fails ({error['error']}: {error['message'].splitlines()[0]})"
    return None


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _leaves(value: Any, place: str = "", key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested mappings and sequences, by place; an empty one is a value itself."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            if name not in _IGNORED:
                yield from _leaves(item, f"{place}.{name}".lstrip("."), str(name))
    elif isinstance(value, list | tuple | set) and value:
        items = sorted(value, key=str) if key in _UNORDERED or isinstance(value, set) else value
        for i, item in enumerate(items):
            yield from _leaves(item, f"{place}[{i}]")
    else:
        yield place, value
