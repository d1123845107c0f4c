"""Checkpoints with adapters as files: read without running anything, and exported as peft folders."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.backbone.modules import eager_key, flat_key
from lightning_peft.fitting.checkpoint_names import META, join
from lightning_peft.fitting.pickles import read_file, unread
from lightning_peft.fitting.shards import read_index, read_shards
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.adapter_files.saving import read_config, write_described
from lightning_peft.stack.adapter_files.typed_values import Adapters, check_plain


def read_checkpoint(path: str | Path, map_location: Any = "cpu", trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint with adapters: tensors and plain values, and of anything else only its name (`unread`).

    Args:
        path: the checkpoint, a file or the folder that FSDP2 writes.
        map_location: as in `torch.load`.
        trust: unpickle it whole, which runs the code that it names.

    Raises:
        AdapterError: it is damaged, or holds no adapters, or not as this package writes them.
    """
    path = Path(path)
    checkpoint = read_file(path / "meta.pt" if path.is_dir() else path, map_location, trust)
    if path.is_dir() and isinstance(checkpoint, dict):
        checkpoint["state_dict"] = _as_saved(read_shards(path, trust), checkpoint.get(META))
    check_adapters(checkpoint, str(path))
    return checkpoint


def check_readable(path: str | Path) -> None:
    """Raise `AdapterError` in one sentence where a Trainer cannot read a checkpoint with adapters as it is."""
    if strange := unread(read_checkpoint(path)):
        (place, kind), more = next(iter(strange.items())), len(strange) - 1
        raise AdapterError(
            f"{path} holds {place}, a {kind}{f', and {more} more that are no plain values' if more else ''}: give the "
            "Trainer's method weights_only=False, which runs code of the file, if you trust its author, or save the "
            "module with plain hyperparameters."
        )


def export_checkpoint(path: str | Path, folder: str | Path, backbone: str | None = None, trust: bool = False) -> Path:
    """Turn an adapter-only Lightning checkpoint into the plain peft folder that `save_adapter` would write.

    Args:
        path: the checkpoint, a file or the folder that FSDP2 writes; no model is built.
        folder: where to write.
        backbone: which backbone's adapters, where the module had several.
        trust: as in `load_from_checkpoint`; nothing that is exported needs it, but an index of shards may.

    Returns:
        The folder.

    Raises:
        AdapterError: the file holds no adapters, or those of several backbones and none was named.
    """
    checkpoint = read_checkpoint(path, "cpu", trust)
    backbones = checkpoint[META]["backbones"]
    names = ", ".join(map(repr, backbones))
    if backbone is None and len(backbones) > 1:
        raise AdapterError(f"{path} holds adapters of several backbones, {names}: name one.")
    name = next(iter(backbones)) if backbone is None else backbone
    if name not in backbones:
        raise AdapterError(f"{path} holds no adapters of {name!r}, but of {names}.")
    described, state = backbones[name], checkpoint["state_dict"]
    saved = {join(name, key) for part in described["parts"] for key in part["keys"].values()}
    if lost := sorted(saved - state.keys()):
        raise AdapterError(f"{path} is damaged: it lacks {len(lost)} tensors of its adapters, the first is {lost[0]}.")
    weights = [{key: state[join(name, saved)] for key, saved in part["keys"].items()} for part in described["parts"]]
    return write_described(described, weights, Path(folder), base=None)


def outside_backbones(path: str | Path, trust: bool = False) -> list[str]:
    """Return the names of weights that belong to no adapter, such as a head's: no peft folder holds them."""
    checkpoint = read_checkpoint(path, "cpu", trust)
    adapter = {
        join(name, saved)
        for name, described in checkpoint[META]["backbones"].items()
        for part in described["parts"]
        for saved in part["keys"].values()
    }
    return [key for key in checkpoint["state_dict"] if key not in adapter]


def check_written(names: Mapping[str, str], path: Path) -> bool:
    """Read back the names in a checkpoint, and say whether they could be read.

    Args:
        names: the names that must be in it, as `trained_inside` returns them.
        path: the file, or the folder that FSDP2 writes.

    Raises:
        AdapterError: something is not in it.
    """
    try:
        saved = _saved_keys(path)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError, AdapterError):
        return False  # not written yet, or by a plugin in a format of its own
    if missing := [name for name, live in names.items() if not {name, live} & saved]:
        raise AdapterError(
            f"{path} lacks {len(missing)} of {len(names)} trained tensors, the first is {missing[0]}: keep what comes "
            "after the module's on_save_checkpoint, such as a CheckpointIO plugin, from leaving them out."
        )
    return True


def _saved_keys(path: Path) -> set[str]:
    """Return the names of a checkpoint's weights, none where it does not describe any adapters."""
    if path.is_dir():
        checkpoint = torch.load(path / "meta.pt", weights_only=True, map_location="cpu")
        keys = {key.removeprefix("state_dict.") for key in read_index(path).state_dict_metadata}
    else:
        checkpoint = read_file(path)
        keys = set(checkpoint["state_dict"])
    return keys if META in checkpoint else set()


def _as_saved(shards: dict[str, Tensor], meta: Any) -> dict[str, Tensor]:
    """Return the content of a folder of shards, under the names that a file would have."""
    renamed = meta.get("renamed") if isinstance(meta, dict) else None
    if not isinstance(renamed, dict):  # an earlier release did not note what it saved under names of the module
        return {eager_key(flat_key(name)): value for name, value in shards.items()}
    return {renamed.get(name, name): value for name, value in shards.items()}


def check_adapters(checkpoint: Any, source: str) -> None:
    """Raise `AdapterError` where a checkpoint holds no adapters, or not as this package writes them."""
    if not isinstance(checkpoint, dict) or META not in checkpoint:
        raise AdapterError(f"{source} holds no adapters: it was not written with a lightning_peft callback.")
    check_plain(checkpoint[META], Adapters, f"What {source} says of its adapters")
    if strange := unread(checkpoint[META]):
        raise AdapterError(
            f"What {source} says of its adapters holds a {next(iter(strange.values()))}, no plain value."
        )
    for described in checkpoint[META]["backbones"].values():
        for part in described["parts"]:
            read_config(part["config"], f"What {source} says of adapter {part['name']!r}")
    state = checkpoint.get("state_dict", {})  # which a strategy may have taken out of it
    if not isinstance(state, dict):
        raise AdapterError(f"{source} is damaged: its state_dict is no dict.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterError(f"{source} is damaged: {str(key)[:80]!r} of its state_dict is no tensor.")
