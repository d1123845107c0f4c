"""The tensors of an AdapterHub adapter, each of which must be used."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from lightning_peft.stack.adapter_files.folder import AdapterError

# AdapterHub keeps parameters under the adapter's name in modules of these names
_CONTAINERS = (
    "adapters",
    "loras",
    "prefix_tunings",
    "prefix_gates",
    "shared_parameters",
    "invertible_adapters",
    "refts",
)
# as they were called before version 2
_FORMER = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}


class Tensors:
    """An adapter's tensors by their names in the base model, without the adapter's name; they are taken one by one.

    Args:
        tensors: as they were saved.
        adapter: the adapter's name.
        prefix: the base model's name in models with a head, which not all keys have.
        source: where they were read, for messages.

    Raises:
        AdapterError: there are none, or two of them would have the same name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], adapter: str, prefix: str, source: str) -> None:
        self.source = source
        self._tensors: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}  # the name as it was saved
        for key, tensor in tensors.items():
            name = _plain(key, adapter, prefix)
            if name in self._tensors:
                raise AdapterError(f"{source} holds the same tensor twice: {key} and {self._keys[name]}.")
            self._tensors[name], self._keys[name] = tensor, key
        if not tensors:
            raise AdapterError(f"{source} holds no tensor.")

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor, which then counts as used.

        Args:
            name: its name.
            shape: what it must be; default anything.

        Raises:
            AdapterError: there is none, or it has another shape.
        """
        if name not in self._tensors:
            raise AdapterError(f"{self.source} has no {name}, which its configuration asks for.")
        tensor = self._tensors.pop(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{self.source}: {self._keys[name]} has shape {tuple(tensor.shape)}, but its configuration and the "
                f"base model need {shape}."
            )
        return tensor

    def has(self, name: str) -> bool:
        """Return whether a tensor of this name is there and not yet used."""
        return name in self._tensors

    def take_copies(self, name: str, tensor: Tensor) -> None:
        """Take all tensors whose names end so and whose values are those of `tensor`, which AdapterHub saves often."""
        for other in [key for key in self._tensors if key.endswith(f".{name}")]:
            if self._tensors[other].shape == tensor.shape and torch.equal(self._tensors[other], tensor):
                del self._tensors[other]

    def check_used(self) -> None:
        """Raise `AdapterError` where a tensor was not taken: none may be lost unnoticed."""
        if self._tensors:
            unused = self._keys[min(self._tensors)]
            raise AdapterError(
                f"{self.source} does not fit its configuration and this base model: {len(self._tensors)} of its "
                f"tensors have no place there, the first is {unused}."
            )


def _plain(key: str, adapter: str, prefix: str) -> str:
    parts = [_FORMER.get(part, part) for part in key.removeprefix(f"{prefix}.").split(".")]
    kept = parts[:1]
    for before, part in pairwise(parts):
        if part != adapter or not (before in _CONTAINERS or before.endswith("_adapters")):
            kept.append(part)
    return ".".join(kept)
