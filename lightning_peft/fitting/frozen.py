"""A check that nothing of a frozen backbone is trained beside its adapter."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.modules import base_modules
from lightning_peft.stack.stack import find_stacks


def check_frozen(module: nn.Module) -> None:
    """Raise `ValueError` where a weight of a backbone is trained that belongs to no adapter.

    A checkpoint would hold it, and no loading would know it; the adapter's folder would not hold it at all.
    """
    for prefix, stack in find_stacks(module).items():
        adapter_ids = {id(parameter) for part in stack.parts for parameter in stack.parameters(part).values()}
        trained = [
            ".".join(filter(None, (prefix, name, key)))
            for name, child in base_modules(stack.backbone)
            for key, parameter in child.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in adapter_ids
        ]
        if trained:
            raise ValueError(
                f"{len(trained)} weights of the frozen backbone are trained beside its adapter, the first is "
                f"{trained[0]}, and no checkpoint of adapters could bring them back: leave them frozen, name their "
                "modules in train_head, or train them by BitFit, TopLayers or FullFineTuning."
            )
