"""One adapter as a peft folder on disk: written whole or not at all, read with every check."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "lightning_peft.json"


class AdapterError(ValueError):
    """A saved adapter cannot be used: unreadable, incomplete, not finite, or made for another base model."""


def write_folder(folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and our notes (fingerprint, how it was computed).

    Every file is written beside its place and renamed, the configuration last: a folder with one is complete.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.inference_mode = True  # as peft saves it
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(contiguous, Path(made, WEIGHTS), metadata={"format": "pt"})
        Path(made, NOTES).write_text(json.dumps(notes, indent=2) + "\n")
        config.save_pretrained(made)
        for name in (WEIGHTS, NOTES, CONFIG):
            os.replace(Path(made, name), folder / name)


def read_folder(folder: Path) -> tuple[PeftConfig, dict[str, Tensor], dict[str, Any]]:
    """Read a peft folder: its configuration, its tensors and our notes (`{}` in a folder made by plain peft).

    Raises:
        AdapterError: a file is missing, truncated or not what it should be.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} is not an adapter folder: it has no {name}.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG} is not a peft configuration: {error}") from error
    config.inference_mode = False
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / WEIGHTS} is truncated or not a safetensors file: {error}") from error
    notes_file = folder / NOTES
    try:
        notes = json.loads(notes_file.read_text()) if notes_file.is_file() else {}
    except json.JSONDecodeError as error:
        raise AdapterError(f"{notes_file} is not JSON: {error}") from error
    return config, tensors, notes


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `AdapterError` naming the first tensor that holds NaN or infinity."""
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterError(f"{source}: {key} holds NaN or infinite values.")
