"""An adapter's change of its base as vectors that can be summed: head and layer offsets, weight deltas."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.stack.adapter_files.folder import AdapterError

if TYPE_CHECKING:
    from peft import PeftConfig

_MODEL, _LAYER = "base_model.model.", ".layer_edits.layer_offsets"
_VALUES, _INDICES, _BITS = (f"weight_deltas.{kind}." for kind in ("values", "indices", "bits"))


@dataclass(frozen=True)
class TaskVector:
    """An adapter's change of its base, at its saved strength.

    Args:
        config: of the adapter.
        entries: place -> change: of one head, of a module's output, of a parameter.
        sparse: of parameters of which some entries are stored: which, counted through the flattened parameter; their
            entries are flat.
        settings: what must be the same in adapters that are summed.
    """

    config: PeftConfig
    entries: dict[str, Tensor]
    sparse: dict[str, Tensor] = field(default_factory=dict)
    settings: tuple[Any, ...] = ()


def task_vector(config: PeftConfig, tensors: Mapping[str, Tensor], source: str) -> TaskVector:
    """Return the task vector of a saved adapter.

    Args:
        config: its configuration.
        tensors: under the keys of its folder.
        source: the folder, for messages.

    Raises:
        AdapterError: what the adapter adds is no vector.
    """
    kind = peft_kind(config)
    if kind not in _KINDS:
        raise AdapterError(
            f"{source} is a {type(config).__name__}, whose change of the base is no vector that could be summed: "
            f"LORA, {', '.join(_KINDS)} have one."
        )
    if getattr(config, "gate", None) is not None or getattr(config, "operation", "add") != "add":
        raise AdapterError(f"{source} acts by how its inputs are (a gate, an ablation), which is no vector to sum.")
    if whole := getattr(config, "modules_to_save", None):
        raise AdapterError(f"{source} holds whole modules ({', '.join(whole)}), which are no change.")
    return _KINDS[kind][0](config, tensors, source)


def align(vectors: Sequence[TaskVector]) -> tuple[TaskVector, list[dict[str, Tensor]]]:
    """Give a place one shape in all vectors that have it; of sparse parameters the entries that any of them has.

    Returns:
        A vector that says how the result is stored, and every vector's entries, in float32 at least.

    Raises:
        AdapterError: they act at different positions, or one place has different shapes.
    """
    first = vectors[0]
    if len({vector.settings for vector in vectors}) > 1:
        settings = " and ".join(sorted({str(vector.settings) for vector in vectors}))
        raise AdapterError(f"These adapters act in different ways and have no sum: {settings}.")
    places = list(dict.fromkeys(place for vector in vectors for place in vector.entries))
    aligned: list[dict[str, Tensor]] = [{} for _ in vectors]
    sparse = {}
    for place in places:
        having = [vector for vector in vectors if place in vector.entries]
        dense = [vector.entries[place] for vector in having if place not in vector.sparse]
        if len({value.shape for value in dense}) > 1:
            raise AdapterError(f"{place} has different shapes in these adapters: they are of different models.")
        if dense:
            shape, indices = dense[0].shape, None
        else:
            indices = sparse[place] = torch.cat([vector.sparse[place] for vector in having]).unique()
            shape = indices.shape
        for vector, entries in zip(vectors, aligned, strict=True):
            if place in vector.entries:
                entries[place] = _spread(vector, place, shape, indices)
    return TaskVector(_united(vectors), first.entries, sparse, first.settings), aligned


def written(form: TaskVector, entries: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return configuration and tensors of the adapter that adds these entries; `form` comes from `align`."""
    return _KINDS[peft_kind(form.config)][1](form, entries)


def peft_kind(config: PeftConfig) -> str:
    """Return the name of an adapter's kind, such as `LORA`."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _united(vectors: Sequence[TaskVector]) -> PeftConfig:
    config: Any = copy.deepcopy(vectors[0].config)
    if hasattr(config, "add_missing"):
        config.add_missing = any(getattr(vector.config, "add_missing", False) for vector in vectors)
    return config


def _spread(vector: TaskVector, place: str, shape: torch.Size, indices: Tensor | None) -> Tensor:
    """Return one vector's entries at a place: of this shape, or at the stored indices."""
    value = vector.entries[place]
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if place not in vector.sparse:
        return value
    where = vector.sparse[place] if indices is None else torch.searchsorted(indices, vector.sparse[place])
    return value.new_zeros(shape.numel()).index_copy(0, where, value).reshape(shape)


# -- head offsets -----------------------------------------------------------------------------------------------------


def _read_heads(config: Any, tensors: Mapping[str, Tensor], source: str) -> TaskVector:
    if config.parameters == "lofit":
        raise AdapterError(f"{source} holds scales of heads, of which none is chosen yet: train it to its end.")
    entries = {}
    for key in (key for key in tensors if key.endswith(".head_offsets")):
        vectors, name = tensors[key], key.removeprefix(_MODEL).removesuffix(".head_offsets")
        if config.parameters == "gains":
            vectors = vectors * tensors[f"{key}_directions"]
        heads = range(len(vectors)) if config.heads is None else sorted(config.heads[name])
        for head, vector in zip(heads, vectors, strict=True):
            entries[f"{name}:{head}"] = vector * config.alpha
    return TaskVector(config, entries, settings=(f"positions={config.positions!r}", f"head_dim={config.head_dim}"))


def _write_heads(form: TaskVector, entries: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    config: Any = form.config
    heads: dict[str, list[int]] = {}
    for place in entries:
        name, _, head = place.rpartition(":")
        heads.setdefault(name, []).append(int(head))
    config.heads = {name: sorted(numbers) for name, numbers in sorted(heads.items())}
    config.target_modules, config.alpha, config.parameters = list(config.heads), 1.0, "offsets"
    return config, {
        f"{_MODEL}{name}.head_offsets": torch.stack([entries[f"{name}:{head}"] for head in numbers])
        for name, numbers in config.heads.items()
    }


# -- layer offsets ----------------------------------------------------------------------------------------------------


def _read_layers(config: Any, tensors: Mapping[str, Tensor], source: str) -> TaskVector:
    entries = {key.removeprefix(_MODEL).removesuffix(_LAYER): value * config.alpha for key, value in tensors.items()}
    return TaskVector(config, entries, settings=(f"positions={config.positions!r}", f"tokens={config.tokens}"))


def _write_layers(form: TaskVector, entries: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    config: Any = form.config
    config.target_modules, config.exclude_modules, config.alpha = sorted(entries), None, 1.0
    return config, {f"{_MODEL}{name}{_LAYER}": value for name, value in entries.items()}


# -- weight deltas ----------------------------------------------------------------------------------------------------


def _read_deltas(config: Any, tensors: Mapping[str, Tensor], source: str) -> TaskVector:
    from lightning_peft.tuners.weight_deltas.config import unpack

    if config.pruned:
        raise AdapterError(f"{source} sets weights to 0, which is no change that could be scaled or summed.")
    entries, sparse = {}, {}
    for key in (key for key in tensors if _VALUES in key):
        name = key.removeprefix(_MODEL).replace(_VALUES, "")
        entries[name] = tensors[key] * config.alpha
        if (indices := key.replace(_VALUES, _INDICES)) in tensors:
            sparse[name] = tensors[indices].long()
        elif (bits := key.replace(_VALUES, _BITS)) in tensors:
            sparse[name] = unpack(tensors[bits], 8 * len(tensors[bits])).nonzero()[:, 0]
    return TaskVector(config, entries, sparse)


def _write_deltas(form: TaskVector, entries: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    config: Any = form.config
    config.target_parameters, config.alpha, config.masked, config.packed = sorted(entries), 1.0, None, None
    config.kept = {name: len(indices) for name, indices in form.sparse.items()} or None
    tensors = {}
    for name, value in entries.items():
        owner, _, parameter = name.rpartition(".")
        before = f"{_MODEL}{owner}." if owner else _MODEL
        tensors[f"{before}{_VALUES}{parameter}"] = value
        if name in form.sparse:
            tensors[f"{before}{_INDICES}{parameter}"] = form.sparse[name].int()
    return config, tensors


_KINDS = {
    "HEAD_OFFSETS": (_read_heads, _write_heads),
    "LAYER_OFFSETS": (_read_layers, _write_layers),
    "WEIGHT_DELTAS": (_read_deltas, _write_deltas),
}
