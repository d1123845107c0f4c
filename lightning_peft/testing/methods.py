"""The methods the laws are run on: those of `lightning_peft.callbacks`, by the examples that each gives."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import lightning as L
from torch import nn

from lightning_peft import callbacks
from lightning_peft.backbone.task_heads import task_heads
from lightning_peft.callbacks import AdapterCallback, Quantize
from lightning_peft.fitting.law_example import LawExample


@dataclass(frozen=True)
class Method:
    """A method as the table runs it.

    Args:
        callback: its class.
        example: its settings.
    """

    callback: type[AdapterCallback]
    example: LawExample

    @property
    def needs(self) -> frozenset[str]:
        """The features that an architecture must have, see `Architecture.has`."""
        return frozenset(self.example.needs)

    def make(self) -> AdapterCallback:
        """Return the callback."""
        callback = self.callback(backbone="backbone", **self.example.arguments)
        if self.example.four_bits:
            callback.exempt = {"merge": "what is written into quantised weights is rounded again", **callback.exempt}
        return callback

    def prepare(self, module: L.LightningModule) -> None:
        """Do to a module what comes before anything else, and belongs to the base."""
        if self.example.four_bits:
            Quantize(backbone="backbone").apply(module)

    def count(self, module: L.LightningModule) -> int | None:
        """Return the formula's number for a module of `Architecture`, with a task head inside its backbone whole."""
        backbone = copy.deepcopy(module.get_submodule("backbone"))
        heads = {name: backbone.get_submodule(name) for name in task_heads(backbone)}
        for name in heads:
            backbone.set_submodule(name, nn.Identity())
        adapter = self.make().trainable_parameters(backbone)
        return (
            None if adapter is None else adapter + sum(p.numel() for head in heads.values() for p in head.parameters())
        )


def _methods() -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for callback in (getattr(callbacks, name) for name in callbacks.__all__):
        if issubclass(callback, AdapterCallback) and not callback.computed:
            examples = vars(callback).get("law_examples", {callback.__name__: LawExample()})
            methods |= {row: Method(callback, example) for row, example in examples.items()}
    return methods


METHODS: dict[str, Method] = _methods()
