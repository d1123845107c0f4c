"""AdapterHub's folder of one adapter, read with every check and without running anything in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.adapter_files.typed_values import read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_CONFIG = "head_config.json"
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")


@dataclass(frozen=True)
class SavedAdapter:
    """The content of a folder that `model.save_adapter` of AdapterHub wrote.

    Args:
        folder: the folder.
        name: the adapter's name.
        model_type: transformers' name of the architecture; empty where an old version did not write it.
        model_class: the class of the model that had the adapter, which may be AdapterHub's own; empty likewise.
        config: the method's configuration, or a string that names it.
        version: of the library.
        kind: `"text_task"` or `"text_lang"`, of the first versions.
        tensors: the parameters, by their names there.
    """

    folder: Path
    name: str
    model_type: str
    model_class: str
    config: Mapping[str, Any] | str
    version: str
    kind: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class SavedHead:
    """The prediction head in such a folder.

    Args:
        model_class: the class of the model that had it.
        name: the head's name; empty where it is that of a transformers class.
        tensors: its parameters, by their names there.
    """

    model_class: str
    name: str
    tensors: Mapping[str, Tensor]


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter.

    Raises:
        AdapterError: there is none, or a file is damaged or of other content than it should be.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise AdapterError(f"{folder} is not a folder with an adapter of AdapterHub: it has no {CONFIG}.")
    values = _read_object(file)
    if "peft_type" in values:
        raise AdapterError(f"{folder} is a peft folder already, which lightning_peft.load_adapter reads as it is.")
    config = values.get("config")
    if not isinstance(config, dict | str) or not config or not isinstance(values.get("name"), str):
        raise AdapterError(f"{file} is not AdapterHub's: it needs the adapter's name and its config.")
    texts = {key: values.get(key) or "" for key in ("model_type", "model_class", "version", "type")}
    if strange := [key for key, value in texts.items() if not isinstance(value, str)]:
        raise AdapterError(f"{file} is not AdapterHub's: its {strange[0]} is {values[strange[0]]!r}, not a text.")
    tensors = _read_tensors(folder, WEIGHTS, "an adapter")
    return SavedAdapter(
        folder,
        values["name"],
        texts["model_type"],
        texts["model_class"],
        config,
        texts["version"],
        texts["type"],
        tensors,
    )


def read_head(folder: Path) -> SavedHead | None:
    """Read the prediction head that was saved beside the adapter; None where there is none.

    Raises:
        AdapterError: a file is missing, damaged or of other content than it should be.
    """
    if not (folder / HEAD_CONFIG).is_file():
        return None
    values = _read_object(folder / HEAD_CONFIG)
    model_class, name = values.get("model_class"), values.get("name") or ""
    if not isinstance(model_class, str) or not isinstance(name, str):
        raise AdapterError(f"{folder / HEAD_CONFIG} is not AdapterHub's: it does not say what model the head is of.")
    return SavedHead(model_class, name, _read_tensors(folder, HEAD_WEIGHTS, "a head"))


def unread_files(folder: Path) -> list[str]:
    """Return the names of files with tensors that `read_adapter` and `read_head` leave alone."""
    read = {next((name for name in WEIGHTS if (folder / name).is_file()), "")}
    if (folder / HEAD_CONFIG).is_file():
        read.add(next((name for name in HEAD_WEIGHTS if (folder / name).is_file()), ""))
    names = (path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".safetensors"))
    return sorted(name for name in names if name not in read)


def _read_object(file: Path) -> dict[str, Any]:
    values = read_json(file)
    if not isinstance(values, dict):
        raise AdapterError(f"{file} is not AdapterHub's: it holds no object.")
    return values


def _read_tensors(folder: Path, names: tuple[str, str], what: str) -> dict[str, Tensor]:
    safe, pickled = (folder / name for name in names)
    if safe.is_file():
        return _read_safetensors(safe)
    if not pickled.is_file():
        raise AdapterError(f"{folder} has the configuration of {what}, but neither {names[0]} nor {names[1]}.")
    return _read_pickle(pickled)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is truncated or not a safetensors file: {error}.") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of `torch.save`, of which torch reads tensors and plain values alone."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, LookupError, AttributeError) as error:
        raise AdapterError(
            f"{file} is damaged, or holds more than tensors, which are all that is read of it."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise AdapterError(f"{file} holds something else than tensors by their names.")
    return dict(tensors)
