"""Task arithmetic: adapters added, negated, interpolated and merged, into an adapter again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_peft.backbone.fingerprint import mismatch
from lightning_peft.editing.lora_sums import Factors, concatenated, factorised, lora_written, read_factors
from lightning_peft.editing.task_vectors import align, task_vector, written
from lightning_peft.stack.adapter_files.as_lora import is_low_rank
from lightning_peft.stack.adapter_files.folder import (
    AdapterError,
    adapter_folders,
    check_finite,
    read_folder,
    write_folders,
)

Method = Literal["sum", "ties", "dare", "dare_ties"]


def combine(
    folders: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    method: Method = "sum",
    density: float = 0.2,
    rank: int | None = None,
    seed: int = 0,
) -> Path:
    """Combine saved adapters of one kind and one base into one.

    With `τ` an adapter's change of its base (Ilharco et al. 2023, arXiv:2212.04089): `"sum"` is `Σ w τ`, so that
    weights `[1, 1]` add, `[-1]` negates, `[1 - t, t]` interpolates. `"ties"` (Yadav et al. 2023, arXiv:2306.01708)
    keeps the `density` largest entries of each `w τ`, elects each entry's sign by their sum, and averages those that
    have it. `"dare"` (Yu et al. 2023, arXiv:2311.03099) drops entries at random, `1 - density` of them, divides the
    rest by `density`, and sums; `"dare_ties"` elects and averages what DARE leaves.

    LoRA's change is `scaling * B A`, and so is that of what `as_lora` can write as one (AdaLoRA, LoRTA). Its sum is
    exact, and ranks add up. Singular values cut the results of TIES and DARE, and a sum with `rank`, to a rank; the
    record in the folder says how much of its squared norm was kept. Head and layer offsets and weight deltas come out
    exactly. Of sparse deltas, `density` counts among stored entries.

    Args:
        folders: peft folders of LoRA or what `as_lora` writes as one, head offsets (gains too), layer offsets or weight
            deltas.
        output: where to write; existing adapter files there are replaced.
        weights: one for each folder; default 1.
        method: `"sum"`, `"ties"`, `"dare"` or `"dare_ties"`.
        density: the share of entries that TIES and DARE keep, in (0, 1].
        rank: of the LoRA that comes out; default the sum of ranks for `"sum"`, else the largest rank given.
        seed: of DARE's choice.

    Returns:
        The folder, which `load_adapter` and `PeftModel.from_pretrained` read.

    Raises:
        AdapterError: other kinds, other bases, or what has no sum.
        ValueError: wrong arguments.
    """
    weights = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    _check_arguments(folders, weights, method, density, rank)
    loaded = [_read(Path(path)) for path in folders]
    _check_same(folders, loaded)
    config, notes = loaded[0][0], [entry[2] for entry in loaded]
    record: dict[str, Any] = {"method": f"task arithmetic, {method}", "weights": weights}
    if method != "sum":
        record |= {"density": density} | ({"seed": seed} if method.startswith("dare") else {})
    record["adapters"] = [
        {"folder": Path(path).name, "record": note.get("record", {})} for path, note in zip(folders, notes, strict=True)
    ]
    if is_low_rank(config):
        adapters = [read_factors(c, t, str(path)) for path, (c, t, _) in zip(folders, loaded, strict=True)]
        factors = concatenated(adapters, weights)
        if method != "sum" or rank is not None:
            products = [
                {key: weight * value.product() for key, value in adapter.items()}
                for adapter, weight in zip(adapters, weights, strict=True)
            ]
            rank = rank or max(value.A.shape[0] for adapter in adapters for value in adapter.values())
            factors, record["kept_squared_norm"] = _cut(merge(products, method, density, seed), factors, rank)
        combined = lora_written(config, factors)
    else:
        if rank is not None:
            raise ValueError(f"rank is LoRA's, and {folders[0]} is a {type(config).__name__}.")
        form, entries = align([task_vector(c, t, str(path)) for path, (c, t, _) in zip(folders, loaded, strict=True)])
        weighted = [{key: w * value for key, value in entry.items()} for entry, w in zip(entries, weights, strict=True)]
        combined = written(form, merge(weighted, method, density, seed))
    about: dict[str, Any] = {"fingerprint": next(filter(None, (note.get("fingerprint") for note in notes)), {})}
    about |= {"computed": any(note.get("computed", False) for note in notes), "record": record}
    write_folders(Path(output), {"default": (*combined, about)})
    return Path(output)


def merge(
    vectors: Sequence[Mapping[str, Tensor]], method: Method, density: float = 0.2, seed: int = 0
) -> dict[str, Tensor]:
    """Merge task vectors, weights already multiplied in, entry by entry.

    Args:
        vectors: place -> change; a place that a vector has not counts as zeros there.
        method: see `combine`.
        density: share of its entries, over all its places together, that each vector keeps in TIES and DARE.
        seed: of DARE's choice.

    Example:
        >>> import torch
        >>> merge([{"w": torch.tensor([4.0, 1.0, -3.0])}, {"w": torch.tensor([2.0, 0.5, 5.0])}], "ties", density=0.7)
        {'w': tensor([3., 0., 5.])}
    """
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    if method != "sum":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vectors = [_thinned(vector, method, density) for vector in vectors]
    merged = {}
    for key in dict.fromkeys(key for vector in vectors for key in vector):
        like = next(vector[key] for vector in vectors if key in vector)
        every = torch.stack([vector.get(key, torch.zeros_like(like)) for vector in vectors])
        elects = method in ("ties", "dare_ties")
        merged[key] = disjoint_merge(every, calculate_majority_sign_mask(every)) if elects else every.sum(0)
    return merged


def _thinned(vector: Mapping[str, Tensor], method: Method, density: float) -> dict[str, Tensor]:
    """Keep the largest entries of a task vector (TIES), or some at random, divided by their share (DARE)."""
    from peft.utils.merge_utils import magnitude_based_pruning, random_pruning

    flat = torch.cat([value.flatten() for value in vector.values()])
    pruned = magnitude_based_pruning(flat, density) if method == "ties" else random_pruning(flat, density, rescale=True)
    parts = pruned.split([value.numel() for value in vector.values()])
    return {key: part.reshape(value.shape) for (key, value), part in zip(vector.items(), parts, strict=True)}


def _cut(products: Mapping[str, Tensor], like: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], float]:
    """Return factors of a rank for every product, and the share of the squared norm that they have."""
    parts = {key: factorised(product, like[key], rank) for key, product in products.items()}
    whole, retained = sum(part[1] for part in parts.values()), sum(part[2] for part in parts.values())
    return {key: part[0] for key, part in parts.items()}, retained / whole if whole else 1.0


def _read(folder: Path) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    subfolders = adapter_folders(folder)
    if len(subfolders) > 1:
        names = ", ".join(path.name for path in subfolders)
        raise AdapterError(f"{folder} holds a stack of adapters: name one of its subfolders ({names}).")
    config, tensors, notes = read_folder(subfolders[0])
    check_finite(tensors, str(folder))
    return config, tensors, notes


def _check_arguments(
    folders: Sequence[Any], weights: Sequence[float], method: str, density: float, rank: int | None
) -> None:
    if not folders or len(weights) != len(folders):
        raise ValueError(f"Each adapter needs one weight, but there are {len(folders)} adapters and {len(weights)}.")
    if not all(abs(weight) < float("inf") for weight in weights):
        raise ValueError(f"Weights must be finite numbers, got {list(weights)}.")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}.")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")


def _check_same(folders: Sequence[Any], loaded: Sequence[tuple[Any, Any, dict[str, Any]]]) -> None:
    """Raise `AdapterError` unless all are of one kind and for one base."""
    first, _, _ = loaded[0]
    known: tuple[Any, dict[str, Any]] | None = None
    for folder, (config, _, notes) in zip(folders, loaded, strict=True):
        if config.peft_type != first.peft_type and not (is_low_rank(config) and is_low_rank(first)):
            kinds = f"{folders[0]} is a {type(first).__name__} and {folder} a {type(config).__name__}"
            raise AdapterError(f"Only adapters of one kind have a sum: {kinds}.")
        fingerprint = notes.get("fingerprint")
        if fingerprint and known is None:
            known = (folder, fingerprint)
        elif fingerprint and known and (difference := mismatch(known[1], fingerprint)):
            raise AdapterError(f"{known[0]} and {folder} were made for different base models: {difference}.")
