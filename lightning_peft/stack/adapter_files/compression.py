"""ComPEFT: an adapter as a sparse vector of signs with one scale.

Yadav et al. 2023, arXiv:2311.13171: of the task vector `τ` (what training changed) the largest k% by magnitude are
kept, and `τ' = α σ sign(τ)` there, 0 elsewhere, with σ the standard deviation of τ.

The authors' code (prateeky2806/ComPEFT) takes σ over all of τ, for LoRA as for IA³ and full fine-tuning:
`deviation="all"`. It also has a function that takes σ after the rest was zeroed, `replace_noise_and_constant` in
`src/merge_utils.py`, which nothing there calls: `deviation="kept"`. Values here equal theirs, with σ the sample
standard deviation (ddof 1). Where they differ: they keep `int(k N) + 1` entries and all that tie with the smallest,
here `round(k N)` and of equals the first; they compress a head in `modules_to_save` like the rest.

What training changed is known where the start is: LoRA's B starts at 0, IA³'s vectors at 1, head offsets at 0.
LoRA's A starts at random and its start is not in a saved folder. Given the folder of the untrained adapter
(`initial`), τ is exact for every tensor, and that folder is needed again to read the result; else A itself is taken
for its change, as the authors' code always does. A is then much larger than what training changed, and at a small
density nothing of B may be kept; `scope="tensor"` gives each tensor its own threshold and scale.

Tensors that are not the method's own (heads in `modules_to_save`, biases of the base) are kept as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_peft.stack.adapter_files.folder import (
    COMPRESSED,
    WEIGHTS,
    AdapterError,
    adapter_folders,
    check_finite,
    read_folder,
    write_folders,
)
from lightning_peft.stack.adapter_files.rice_code import entropy_bound, pack_signs, unpack_signs
from lightning_peft.stack.adapter_files.verifying import check_same
from lightning_peft.stack.injection.registry import injection_for

if TYPE_CHECKING:
    from peft import PeftConfig

# what an adapter was computed with, which no training changed
_FIXED = ("_offsets_directions", "_offsets_probe", ".dash_inputs", ".dash_outputs")
_INDEX, _LARGEST_INDEX = "index", 2**28  # bytes, decompressed
_DENSE = "dense."

Deviation = Literal["all", "kept"]
Scope = Literal["adapter", "tensor"]


@dataclass(frozen=True)
class Compression:
    """The numbers of one compression.

    Args:
        parameters: how many numbers were compressed.
        kept: how many of them are not zero.
        dense: how many numbers were kept as they are.
        before: bytes of the adapter's weights file.
        after: bytes of the compressed file.
        coded: of these, bytes of places and signs; the rest is names and what was kept.
        bound: bytes of the entropy bound for places and signs.
        scale: `α σ`; with a scope of tensors, the mean over them.
        raw: tensors whose start is not known and was taken for 0.
        empty: tensors of which nothing was kept.
    """

    parameters: int
    kept: int
    dense: int
    before: int
    after: int
    coded: int
    bound: float
    scale: float
    raw: tuple[str, ...]
    empty: tuple[str, ...]


def keep_largest(change: Tensor, density: float) -> Tensor:
    """Return the signs `[N]`, int8, of the `round(density * N)` largest magnitudes (of equals the first), else 0.

    Example:
        >>> import torch
        >>> keep_largest(torch.tensor([0.5, -3.0, 1.0, -1.0]), 0.5)
        tensor([ 0, -1,  1,  0], dtype=torch.int8)
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    count = round(density * change.numel())
    order = change.abs().sort(descending=True, stable=True).indices[:count]
    signs = torch.zeros(change.numel(), dtype=torch.int8)
    signs[order] = change[order].sign().to(torch.int8)
    return signs


def compress_adapter(
    folder: str | Path,
    output: str | Path,
    density: float = 0.1,
    alpha: float = 1.0,
    deviation: Deviation = "all",
    initial: str | Path | None = None,
    scope: Scope = "adapter",
) -> list[Compression]:
    """Compress a saved adapter, or each adapter of a saved stack, into a folder that `load_adapter` reads.

    Args:
        folder: a peft folder, or a stack of them.
        output: where to write.
        density: share of the entries to keep, in (0, 1]; the paper tries 0.05 to 0.5.
        alpha: the strength of the signs in standard deviations; the paper tries 0.5 to 10.
        deviation: σ over `"all"` entries of τ (the paper's, and what the authors' code does for every method), or over
            τ with the rest zeroed, `"kept"` (a function of theirs that nothing there calls).
        initial: the same adapter before training, saved by `save_adapter`. It is recorded and read again with the
            result, from where it was relative to it.
        scope: threshold and σ over the whole `"adapter"` (the paper's), or over each `"tensor"`.

    Returns:
        What was done, for each adapter, innermost first.

    Raises:
        AdapterError: the folder (or `initial`) cannot be read, is compressed already, or does not fit.
        ValueError: density or alpha are out of range.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a positive number, got {alpha}.")
    folder, output = Path(folder), Path(output)
    folders = adapter_folders(folder)
    starts = [None] * len(folders) if initial is None else adapter_folders(Path(initial))
    if len(starts) != len(folders):
        raise AdapterError(f"{folder} has {len(folders)} adapters and {initial}, its start, has {len(starts)}.")
    if output.resolve() in {folder.resolve(), None if initial is None else Path(initial).resolve()}:
        raise ValueError(f"{output} is what is to be compressed: name another folder to write to.")
    adapters, rows = {}, []
    for path, start in zip(folders, starts, strict=True):
        if (path / COMPRESSED).is_file():
            raise AdapterError(f"{path} is compressed already.")
        config, tensors, notes = read_folder(path)
        check_finite(tensors, str(path))
        target = output / path.name if len(folders) > 1 else output
        packed, numbers = _compress(config, tensors, density, alpha, deviation, start, target, scope)
        adapters[path.name if len(folders) > 1 else "default"] = (config, packed, notes)
        rows.append({"before": (path / WEIGHTS).stat().st_size, "target": target, **numbers})
    write_folders(output, adapters, COMPRESSED)
    return [
        Compression(after=(numbers.pop("target") / COMPRESSED).stat().st_size, **numbers) for numbers in map(dict, rows)
    ]


def decompress_adapter(folder: str | Path, output: str | Path, verify: bool = True) -> Path:
    """Write a compressed adapter, or stack, as plain peft folders that `PeftModel.from_pretrained` reads.

    Args:
        folder: a folder that `compress_adapter` wrote.
        output: where to write.
        verify: read what was written, and compare it with what loading the compressed adapter gives, bit for bit,
            before it takes its place.

    Raises:
        AdapterError: the folder is not compressed or cannot be read.
        ValueError: the written folder is not the same; nothing is left of it then.
    """
    folders = adapter_folders(Path(folder))
    if plain := [path for path in folders if not (path / COMPRESSED).is_file()]:
        raise AdapterError(f"{plain[0]} is not compressed: it has no {COMPRESSED}.")
    sources = {path.name if len(folders) > 1 else "default": path for path in folders}

    def check(written: Path) -> None:
        for name, source in sources.items():
            check_same(written / name if len(sources) > 1 else written, source)

    write_folders(
        Path(output), {name: read_folder(path) for name, path in sources.items()}, check=check if verify else None
    )
    return Path(output)


def restore(packed: Mapping[str, Tensor], folder: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """Restore the adapter's tensors from a compressed file.

    Args:
        packed: the file's tensors.
        folder: where the file stands.
        scale: a factor of the recorded `α σ`.

    Raises:
        ValueError: the file is none that `compress_adapter` writes, or the start it refers to is gone or another.
    """
    try:
        index = _read_index(packed[_INDEX])
        signs = unpack_signs({name: packed[name] for name in ("quotients", "remainders", "negative", "layout")})
        start = _initial(index, folder)
        tensors, offset = {}, 0
        for key, shape, dtype, value, magnitude in index["tensors"]:
            size = torch.Size(shape).numel()
            change = float(magnitude) * scale * signs[offset : offset + size].reshape(shape).float()
            begin = start[key].float() if start else float(value)
            tensors[key] = (begin + change).to(getattr(torch, dtype))
            offset += size
    except (KeyError, TypeError, AttributeError, RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(f"it is not what this package compresses: {error!r}.") from error
    if offset != len(signs):
        raise ValueError(f"it holds {len(signs)} entries where its tensors have {offset}.")
    return tensors | {key.removeprefix(_DENSE): value for key, value in packed.items() if key.startswith(_DENSE)}


def count(file: Path) -> int:
    """Return how many numbers the adapter in a compressed file has."""
    packed = load_file(file)
    sizes = [torch.Size(shape).numel() for _, shape, *_ in _read_index(packed[_INDEX])["tensors"]]
    return sum(sizes) + sum(value.numel() for key, value in packed.items() if key.startswith(_DENSE))


def _compress(
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    density: float,
    alpha: float,
    deviation: Deviation,
    initial: Path | None,
    target: Path,
    scope: Scope,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return one adapter's packed tensors, and the numbers of its `Compression` known before it is written."""
    method_keys = _own_keys(config, tensors)
    if not method_keys:
        raise AdapterError(f"The adapter has no tensors of {config.peft_type} to compress.")
    value = injection_for(config).start or 0.0
    start = None if initial is None else _checked_start(initial, {key: tensors[key] for key in method_keys})
    changes = [(tensors[k].float() - (start[k].float() if start else value)).flatten() for k in method_keys]
    if scope == "tensor":
        coded_parts = [_code(change, density, alpha, deviation) for change in changes]
    else:
        signs, scale = _code(torch.cat(changes), density, alpha, deviation)
        coded_parts = [(part, scale) for part in signs.split([change.numel() for change in changes])]
    signs = torch.cat([part for part, _ in coded_parts])
    index: dict[str, Any] = {
        "version": 1,
        "tensors": [
            [k, list(tensors[k].shape), str(tensors[k].dtype).removeprefix("torch."), value, scale]
            for k, (_, scale) in zip(method_keys, coded_parts, strict=True)
        ],
    }
    if initial is not None:
        index["initial"] = {"folder": os.path.relpath(initial, target), "sha256": _hash(initial)}
    packed = pack_signs(signs)
    coded = sum(tensor.nbytes for tensor in packed.values())
    packed[_INDEX] = torch.frombuffer(bytearray(zlib.compress(json.dumps(index).encode(), 9)), dtype=torch.uint8)
    nonzero = int(signs.count_nonzero())
    numbers = {
        "parameters": len(signs),
        "kept": nonzero,
        "dense": sum(value.numel() for key, value in tensors.items() if key not in method_keys),
        "coded": coded,
        "bound": entropy_bound(nonzero / len(signs)) * len(signs) / 8,
        "scale": sum(scale for _, scale in coded_parts) / len(coded_parts),
        "raw": () if start else tuple(key for key in method_keys if _starts_elsewhere(key, config)),
        "empty": tuple(key for key, (part, _) in zip(method_keys, coded_parts, strict=True) if not part.any()),
    }
    return packed | {_DENSE + key: value for key, value in tensors.items() if key not in method_keys}, numbers


def _code(change: Tensor, density: float, alpha: float, deviation: Deviation) -> tuple[Tensor, float]:
    """Return signs `[N]` and their scale `α σ`, of one vector of changes."""
    signs = keep_largest(change, density)
    spread = change if deviation == "all" else change * signs.abs()
    return signs, alpha * float(spread.std(correction=min(1, spread.numel() - 1)))


def _own_keys(config: PeftConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of the floating-point tensors that the method itself made."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    kind: Any = config.peft_type
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind, "")
    keys = (k for k, v in tensors.items() if v.is_floating_point() and (not prefix or f".{prefix}" in k))
    return sorted(key for key in keys if not key.endswith(_FIXED))


def _starts_elsewhere(key: str, config: PeftConfig) -> bool:
    """Return whether a tensor's start is written nowhere: at random, or computed from the base."""
    if injection_for(config).start is not None:
        return False
    return not ("lora_B" in key.split(".") and getattr(config, "init_lora_weights", True) is True)


def _checked_start(folder: Path, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    _, start, _ = read_folder(folder)
    for key, value in trained.items():
        if key not in start or start[key].shape != value.shape:
            raise AdapterError(f"{folder} is not the start of this adapter: it has no {key} {tuple(value.shape)}.")
    check_finite(start, str(folder))
    return start


def _initial(index: Mapping[str, Any], folder: Path) -> dict[str, Tensor] | None:
    """Return the tensors the adapter started from, if recorded; check that their file is the same still."""
    if "initial" not in index:
        return None
    place = Path(os.path.normpath(folder / index["initial"]["folder"]))
    if not (place / WEIGHTS).is_file() or _hash(place) != index["initial"]["sha256"]:
        raise ValueError(f"it was compressed against its start in {place}, and that is gone or has changed.")
    return read_folder(place)[1]


def _hash(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _read_index(stored: Tensor) -> dict[str, Any]:
    try:
        reader = zlib.decompressobj()  # bounded, so that a small file cannot fill the memory
        index = json.loads(reader.decompress(stored.numpy().tobytes(), _LARGEST_INDEX))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"its index cannot be read: {error}.") from error
    if not isinstance(index, dict) or index.get("version") != 1:
        raise ValueError("its index is of another version.")
    return index
