"""The folder that is to be evaluated: which base, which adapter, how strong."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.generation.sources import is_adapter as is_adapter
from lightning_peft.generation.sources import is_model as is_model
from lightning_peft.positions import check_policy
from lightning_peft.stack.adapter_files.bases import named_base
from lightning_peft.stack.adapter_files.saving import load_adapter
from lightning_peft.stack.checks import check_scale
from lightning_peft.stack.stack import adapters
from lightning_peft.stack.steering import reposition

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Chosen:
    """A base model and what acts on it.

    Args:
        base: a folder, a name on the hub, or the model itself.
        adapter: a folder of adapters; None: there is none.
        scale: their strength, 1 as saved.
        positions: the tokens that edits act on; None: as saved.
    """

    base: str | PreTrainedModel
    adapter: Path | None
    scale: float
    positions: str | None

    def describe(self) -> dict[str, Any]:
        """Return all on which numbers depend, as JSON has it; of the adapter also its content's SHA-256."""
        base = self.base if isinstance(self.base, str) else self.base.name_or_path
        described: dict[str, Any] = {"base": base, "adapter": None}
        if self.adapter is not None:
            described |= {"adapter": str(self.adapter), "adapter_sha256": _digest(self.adapter)}
            described |= {"scale": self.scale, "positions": self.positions}
        return described


def choose(
    pretrained: str | PreTrainedModel | None,
    adapter: str | Path | None,
    peft: str | Path | None,
    scale: float,
    positions: str | None,
) -> Chosen:
    """Return what the arguments of the model type name; see there.

    Raises:
        AdapterError: the adapter names no base, and none is given.
        ValueError: they contradict each other, or name what does not exist.
    """
    if adapter is not None and peft is not None:
        raise ValueError(f"adapter={adapter} and peft={peft} name the same thing: leave one of the two out.")
    folder = adapter if peft is None else peft
    check_scale(scale)
    if positions is not None:
        check_policy(positions)
    if folder is None:
        if pretrained is None:
            raise ValueError("Name an adapter's folder (adapter=edit), or a model (pretrained=models/baked).")
        if scale != 1 or positions is not None:
            raise ValueError("scale and positions are those of an adapter: give its folder (adapter=edit) as well.")
        return Chosen(pretrained, None, 1.0, None)
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: adapter must be one that an adapter was saved in.")
    if is_model(path):
        raise ValueError(f"{path} is a whole model and no adapter: give it as the model (pretrained={path}).")
    return Chosen(named_base(path) if pretrained is None else pretrained, path, float(scale), positions)


def put_on(model: nn.Module, chosen: Chosen, strict_base: bool = True) -> None:
    """Put the adapter on a model, to stay there.

    Raises:
        AdapterError: it cannot be read, or is for another base model.
        ValueError: it cannot have this strength, or has no positions to change.
    """
    assert chosen.adapter is not None
    parts = load_adapter(model, chosen.adapter, strict_base=strict_base)
    stack = adapters(model)
    for part in parts:
        if chosen.scale == 0:
            stack.enable(False, part.name)  # serves methods without a scaling too
        elif chosen.scale != 1:
            stack.scale(chosen.scale, part.name)
    where = chosen.positions
    if where is not None and not sum([reposition(part, where) for part in parts]):
        raise ValueError(f"{chosen.adapter} is not limited to positions: leave positions out.")
    model.eval()


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".json", ".safetensors"):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
