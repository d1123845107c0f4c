"""The places of AdapterHub's adapters in one model: their names there and here, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from lightning_peft.adapterhub.names import ARCHITECTURES, Architecture, Block
from lightning_peft.backbone.modules import base_modules
from lightning_peft.stack.adapter_files.folder import AdapterError


@dataclass(frozen=True)
class Place:
    """One place of an adapter.

    Args:
        layer: the block's number in AdapterHub's count; a decoder's go on from the encoder's.
        theirs: the module there, from inside the base model.
        ours: the matrix here, or the block, by its full name.
    """

    layer: int
    theirs: str
    ours: str


@dataclass(frozen=True)
class AdapterPlace(Place):
    """One place of a bottleneck adapter.

    Args:
        before: the module here whose input is the residual stream before the part.
        behind: the module here that gives the stream behind it; None where no module does.
        norm: whether that is a norm of the part's output and the stream.
    """

    before: str
    behind: str | None
    norm: bool


class Places:
    """All places in a model.

    Args:
        model: a transformers model.

    Raises:
        AdapterError: AdapterHub's names for this type of model are not known here.
    """

    def __init__(self, model: nn.Module) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in ARCHITECTURES:
            raise AdapterError(
                f"Adapters of AdapterHub are imported for models of the types {', '.join(ARCHITECTURES)}, not for "
                f"{kind or type(model).__name__}."
            )
        self.architecture: Architecture = ARCHITECTURES[kind]
        self.modules = dict(base_modules(model))
        name = str(getattr(model, "base_model_prefix", ""))
        self._inside = f"{name}." if name in self.modules else ""

    def adapters(self, option: str, left_out: Collection[int] = ()) -> list[AdapterPlace]:
        """Return the places of bottleneck adapters that one of AdapterHub's options (`mh_adapter`, …) asks for."""
        places = []
        for layer, number, block in self._blocks(left_out):
            if option in block.adapters:
                site, inside = block.adapters[option], self._inside + block.ours.format(number)
                theirs = f"{block.theirs.format(number)}.{site.theirs}"
                behind = None if site.behind is None else f"{inside}.{site.behind}".rstrip(".")
                places.append(
                    AdapterPlace(
                        layer, theirs, f"{inside}.{site.last}", f"{inside}.{site.before}", behind, norm=site.norm
                    )
                )
        return places

    def matrices(self, kind: str, left_out: Collection[int] = ()) -> list[Place]:
        """Return the matrices of a kind that `Block.matrices` lists."""
        places = (
            self._place(layer, number, block, names)
            for layer, number, block in self._blocks(left_out)
            for names in block.matrices.get(kind, ())
        )
        return [place for place in places if place.ours in self.modules]

    def prefixes(self, left_out: Collection[int] = ()) -> dict[str, list[Place]]:
        """Return the attentions that see prefixes, by AdapterHub's name of what they have in common."""
        places: dict[str, list[Place]] = {}
        for layer, number, block in self._blocks(left_out):
            for shared, names in block.prefixes.items():
                places.setdefault(shared, []).append(self._place(layer, number, block, names))
        return places

    def blocks(self) -> list[Place]:
        """Return the blocks themselves."""
        return [
            Place(layer, block.theirs.format(number), self._inside + block.ours.format(number))
            for layer, number, block in self._blocks(())
        ]

    def in_order(self, places: Collection[AdapterPlace]) -> list[AdapterPlace]:
        """Return places in the order of the model's modules, in which peft adapts them."""
        order = {name: i for i, name in enumerate(self.modules)}
        return sorted(places, key=lambda place: order[place.ours])

    def layers(self) -> int:
        """Return the number of blocks."""
        return sum(1 for _ in self._blocks(()))

    def _blocks(self, left_out: Collection[int]) -> Iterator[tuple[int, int, Block]]:
        """Give each block's number in all, its number among its kind, and its names."""
        layer = 0
        for block in self.architecture.blocks:
            number = 0
            while self._inside + block.ours.format(number) in self.modules:
                if layer not in left_out:
                    yield layer, number, block
                layer, number = layer + 1, number + 1

    def _place(self, layer: int, number: int, block: Block, names: tuple[str, str]) -> Place:
        theirs, ours = names
        inside = self._inside + block.ours.format(number)
        return Place(layer, f"{block.theirs.format(number)}.{theirs}", f"{inside}.{ours}")
