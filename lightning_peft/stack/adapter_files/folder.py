"""One adapter as a peft folder on disk: written whole or not at all, read with every check."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.stack.adapter_files.model_card import write_adapter_card, write_stack_card
from lightning_peft.stack.adapter_files.names import COMPRESSED, CONFIG, NOTES, ORDER, README, WEIGHTS
from lightning_peft.stack.adapter_files.readme import may_write
from lightning_peft.stack.adapter_files.replacing import finish, replacing
from lightning_peft.stack.adapter_files.typed_values import AdapterError, Config, Notes, Order, check_plain, read_json

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "COMPRESSED",
    "CONFIG",
    "NOTES",
    "ORDER",
    "WEIGHTS",
    "AdapterError",
    "adapter_folders",
    "check_finite",
    "check_kind",
    "read_folder",
    "write_folders",
]


def write_folders(
    root: Path,
    adapters: Mapping[str, tuple[PeftConfig, Mapping[str, Tensor], dict[str, Any]]],
    weights: str = WEIGHTS,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write one adapter as a peft folder, or several as a subfolder each with their order in `stack.json`.

    Each folder gets a model card, unless it has a README of the user's own.

    Whenever this is cut off, `adapter_folders` returns the folders from before, or all of these.

    Args:
        root: the folder; made if need be.
        adapters: for each name, its configuration, tensors and our notes (fingerprint, how it was computed).
        weights: the name of the file of tensors.
        check: is called with the staged folder before any file is in its place, and raises where it is wrong.
    """
    from safetensors.torch import save_file

    places = {name: f"{name}/" if len(adapters) > 1 else "" for name in adapters}
    files = [place + file for place in places.values() for file in (weights, NOTES, CONFIG)]
    files += [place + README for place in dict.fromkeys([*places.values(), ""]) if may_write(root / place)]
    with replacing(root, [*files, ORDER] if len(adapters) > 1 else files) as staged:
        for name, (config, tensors, notes) in adapters.items():
            folder = staged / places[name]
            contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(contiguous, folder / weights, metadata={"format": "pt"})
            (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n")
            config = copy.deepcopy(config)
            config.inference_mode = True  # as peft saves it
            config.save_pretrained(str(folder))
            write_adapter_card(folder, config, root / places[name])
        if len(adapters) > 1:
            write_stack_card(staged, {name: config for name, (config, _, _) in adapters.items()}, root)
            (staged / ORDER).write_text(json.dumps({"parts": list(adapters)}, indent=2) + "\n")
        if check is not None:
            check(staged)


def adapter_folders(root: Path) -> list[Path]:
    """Return the folders that a saved adapter or stack consists of, innermost first.

    Raises:
        AdapterError: the stack's order cannot be read.
    """
    finish(root)
    if not (root / ORDER).exists():
        return [root]
    order = read_json(root / ORDER)
    check_plain(order, Order, str(root / ORDER))
    return [root / name for name in order["parts"]]


def read_folder(folder: Path) -> tuple[PeftConfig, dict[str, Tensor], dict[str, Any]]:
    """Read a peft folder: its configuration, its tensors and our notes (`{}` in a folder made by plain peft).

    Raises:
        AdapterError: a file is missing, truncated or of other content than it should be.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = COMPRESSED if (folder / COMPRESSED).is_file() else WEIGHTS
    for name in (CONFIG, weights):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} is not an adapter folder: it has no {name}.")
    check_plain(read_json(folder / CONFIG), Config, str(folder / CONFIG))
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
        from lightning_peft.stack.adapter_files.compression import restore

        try:
            tensors = restore(tensors, folder)
        except ValueError as error:
            raise AdapterError(f"{folder / weights} cannot be read: {error}") from error
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    check_plain(notes, Notes, str(folder / NOTES))
    return config, tensors, notes


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `AdapterError` naming the first tensor that holds NaN or infinity."""
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterError(f"{source}: {key} holds NaN or infinite values.")


def check_kind(saved: Tensor, live: Tensor, what: str) -> None:
    """Raise `AdapterError` unless both hold floating-point numbers, or neither does."""
    if saved.is_floating_point() != live.is_floating_point():
        raise AdapterError(f"{what} holds {saved.dtype} where the model has {live.dtype}.")
