"""One adapter as a peft folder on disk: written whole or not at all, read with every check."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "lightning_peft.json"
COMPRESSED = "adapter_model.compressed.safetensors"  # in place of the weights; see compression.py
ORDER = "stack.json"


class AdapterError(ValueError):
    """A saved adapter cannot be used: unreadable, incomplete, not finite, or made for another base model."""


def write_folders(
    root: Path,
    adapters: Mapping[str, tuple[PeftConfig, Mapping[str, Tensor], dict[str, Any]]],
    weights: str = WEIGHTS,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write one adapter as a peft folder, or several as a subfolder each with their order in `stack.json`.

    Everything is written beside its place and renamed once all of it is there. What says that a folder is whole, its
    configuration or the order, goes first and comes last: a crash leaves no mixture of old and new.

    Args:
        root: the folder; made if need be.
        adapters: for each name, its configuration, tensors and our notes (fingerprint, how it was computed).
        weights: the name of the file of tensors.
        check: is shown what was written while nothing of it is in its place, and raises where that is wrong.
    """
    from safetensors.torch import save_file

    root.parent.mkdir(parents=True, exist_ok=True)
    places = {name: name if len(adapters) > 1 else "" for name in adapters}
    with tempfile.TemporaryDirectory(dir=root.parent) as made:
        for name, (config, tensors, notes) in adapters.items():
            folder = Path(made, places[name])
            folder.mkdir(exist_ok=True)
            contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(contiguous, folder / weights, metadata={"format": "pt"})
            (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n")
            config = copy.deepcopy(config)
            config.inference_mode = True  # as peft saves it
            config.save_pretrained(str(folder))
        if check is not None:
            check(Path(made))
        Path(made, ORDER).write_text(json.dumps({"parts": list(adapters)}, indent=2) + "\n")
        for file in (ORDER, CONFIG, *(f"{place}/{CONFIG}" for place in places.values() if place)):
            (root / file).unlink(missing_ok=True)
        for place in places.values():
            (root / place).mkdir(parents=True, exist_ok=True)
            for stale in {WEIGHTS, COMPRESSED} - {weights}:
                (root / place / stale).unlink(missing_ok=True)
            for file in (weights, NOTES, CONFIG):
                os.replace(Path(made, place, file), root / place / file)
        if len(adapters) > 1:
            os.replace(Path(made, ORDER), root / ORDER)


def adapter_folders(root: Path) -> list[Path]:
    """The folders that a saved adapter or stack consists of, innermost first.

    Raises:
        AdapterError: the stack's order cannot be read.
    """
    if not (root / ORDER).exists():
        return [root]
    try:
        return [root / Path(name).name for name in json.loads((root / ORDER).read_text())["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{root / ORDER} is truncated or not the order of a stack: {error!r}.") from error


def read_folder(folder: Path) -> tuple[PeftConfig, dict[str, Tensor], dict[str, Any]]:
    """Read a peft folder: its configuration, its tensors and our notes (`{}` in a folder made by plain peft).

    Raises:
        AdapterError: a file is missing, truncated or not what it should be.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = COMPRESSED if (folder / COMPRESSED).is_file() else WEIGHTS
    for name in (CONFIG, weights):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} is not an adapter folder: it has no {name}.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{folder / CONFIG} is not a peft configuration: {error!r}.") from error
    config.inference_mode = False
    try:
        tensors = load_file(folder / weights)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / weights} is truncated or not a safetensors file: {error}.") from error
    if weights == COMPRESSED:
        from lightning_peft.tuners.folders.compression import restore

        try:
            tensors = restore(tensors, folder)
        except ValueError as error:
            raise AdapterError(f"{folder / weights} cannot be read: {error}") from error
    try:
        notes = json.loads((folder / NOTES).read_text()) if (folder / NOTES).is_file() else {}
    except ValueError as error:
        raise AdapterError(f"{folder / NOTES} is not JSON: {error}.") from error
    if not isinstance(notes, dict):
        raise AdapterError(f"{folder / NOTES} is not what this package writes.")
    return config, tensors, notes


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `AdapterError` naming the first tensor that holds NaN or infinity."""
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterError(f"{source}: {key} holds NaN or infinite values.")
