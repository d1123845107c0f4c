"""Every trainable parameter in exactly one optimizer group, no frozen one in any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer


def repair(module: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Put trainable parameters that no optimizer knows in the place of frozen ones, inside the existing group.

    LightningCLI's `--optimizer`, and any optimizer made in `__init__`, is built from `module.parameters()` before a
    callback can inject anything: it would hold frozen weights, no adapter, and train nothing without a warning.

    Returns:
        How many parameters were added.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in trainable if id(p) not in known]
    added = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            trained = [p for p in group["params"] if p.requires_grad]
            if len(trained) < len(group["params"]):
                # the group held the backbone, so this is where its adapters belong
                added += len(missing)
                group["params"][:] = trained + missing  # in place: LBFGS keeps the list itself
                missing = []
        # a group may be left without parameters; torch accepts that, and schedulers count groups
        for parameter in [p for p in optimizer.state if not p.requires_grad]:
            del optimizer.state[parameter]
    return added


def check(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise `ValueError` in one sentence unless something is trainable and all of it is in exactly one group."""
    names = {id(p): name for name, p in module.named_parameters()}
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"Nothing in {type(module).__name__} is trainable.")
    held = Counter(id(p) for o in optimizers for group in o.param_groups for p in group["params"])
    if missing := [names[p] for p in trainable if p not in held]:
        raise ValueError(
            f"{len(missing)} trainable parameters are in no optimizer, the first is {min(missing)}: build the "
            "optimizer from `self.parameters()` in `configure_optimizers`."
        )
    if twice := [names.get(p, "?") for p, count in held.items() if count > 1]:
        raise ValueError(f"{len(twice)} parameters are in more than one optimizer group, the first is {min(twice)}.")


def held(optimizers: Sequence[Optimizer]) -> int:
    """Return how many parameters the optimizers hold."""
    return sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
