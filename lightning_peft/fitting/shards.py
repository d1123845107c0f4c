"""The tensors of a checkpoint that is a folder of shards (torch.distributed.checkpoint), read without unpickling it.

The folder's index is a pickle. It is read here as names and plain values: an object whose class PyTorch writes there
becomes a bare record of its arguments, and an index that names anything else is refused. The shards hold tensors.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.stack.adapter_files.typed_values import AdapterError

INDEX = ".metadata"
_PREFIX = "state_dict."  # of the weights, in what Lightning writes
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
_VALUES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


def read_shards(folder: Path, trust: bool = False) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that is a folder of shards, whole, in this process alone.

    Args:
        folder: the folder.
        trust: let PyTorch unpickle the index, whatever it holds.

    Raises:
        AdapterError: the index names objects that PyTorch does not write there, or index and shards are damaged.
    """
    if trust:
        return _unpickled(folder)
    try:
        index = read_index(folder)
        places = {(at.fqn, getattr(at, "offset", None)): info for at, info in index.storage_data.items()}
        return {
            name.removeprefix(_PREFIX): _tensor(folder, name, entry, places)
            for name, entry in index.state_dict_metadata.items()
            if name.startswith(_PREFIX) and entry.was == "TensorStorageMetadata"
        }
    except AdapterError:
        raise
    except OSError as error:
        raise AdapterError(f"{error.filename or folder} cannot be read: {error.strerror}.") from error
    except Exception as error:  # whatever a damaged index leads to
        raise AdapterError(f"{folder} is damaged: its index and its shards do not fit ({error!r}).") from error


def read_index(folder: Path) -> Any:
    """Read the index of a folder of shards, as records that hold what PyTorch's objects would.

    Raises:
        AdapterError: it names objects that PyTorch does not write there, or is damaged.
    """
    try:
        with open(folder / INDEX, "rb") as file:
            return _Index(file).load()
    except OSError:
        raise
    except _Foreign as error:
        raise AdapterError(
            f"The index of {folder} holds {error}, which PyTorch does not write there and which was not run: give "
            "trust=True (--trust) if you trust its author."
        ) from error
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise AdapterError(f"{folder / INDEX} is truncated or no index of shards.") from error


class _Foreign(Exception):
    """An object in an index that PyTorch does not write there."""


class _Record:
    """A pickle's record of an object: its class's name, the arguments, and its state as attributes."""

    was = ""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _VALUES:
            return _VALUES[module, name]
        if (module, name) in _RECORDS:  # a new class each time: a pickle may also change what it is handed
            return type("_Record", (_Record,), {"was": name})
        raise _Foreign(f"{module}.{name}")


def _tensor(folder: Path, name: str, entry: Any, places: dict[tuple[str, Any], Any]) -> Tensor:
    dtype, size = entry.properties.state[0], torch.Size(entry.size)
    parts = [part for chunk in entry.chunks for part in _parts(folder, name, chunk, places)]
    if sum(part.numel() for _, part in parts) != size.numel():
        raise ValueError(f"the parts of {name} are not the whole of it")
    whole = torch.empty(size, dtype=dtype)
    for at, part in parts:
        whole[at] = part
    return whole


def _parts(
    folder: Path, name: str, chunk: Any, places: dict[tuple[str, Any], Any]
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    info = places[name, chunk.offsets]
    if Path(info.relative_path).name != info.relative_path:
        raise ValueError(f"{info.relative_path!r} is no file of the folder")
    if getattr(info, "transform_descriptors", None):
        raise ValueError("its shards are compressed")
    with open(folder / info.relative_path, "rb") as file:
        file.seek(info.offset)
        part = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
    if tuple(part.shape) != chunk.sizes:
        raise ValueError(f"a part of {name} has another shape")
    yield tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True)), part


def _unpickled(folder: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata.items()
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries
        if name.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}
