"""Find the linear layers of a backbone's blocks."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.defaults import every_matrix, takes_adapters
from lightning_peft.backbone.fused import never_called
from lightning_peft.backbone.modules import base_modules, is_linear
from lightning_peft.backbone.structure import blocks


def linear_layers(backbone: nn.Module) -> list[str]:
    """Return the full names of the linear layers of the backbone's blocks, or of all of it where it has no blocks."""
    named = dict(base_modules(backbone))
    inside = [name for block in blocks(backbone) for span in block.spans() for name in span.matrices]
    unreached = never_called(backbone)
    layers = [n for n in inside or every_matrix(backbone) if is_linear(named[n]) and takes_adapters(named[n])]
    return [name for name in layers if name not in unreached]
