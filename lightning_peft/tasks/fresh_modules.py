"""Whether a task makes the same module each time, and one whose learning rate a row can set."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_RATES = (1e-3, 7e-4)  # two that no schedule turns into each other


def fresh_module(task: str, make: Callable[[], L.LightningModule]) -> L.LightningModule:
    """Return the module of a second call, of which that of the first has had the same weights.

    One is in memory at a time. What stands on the meta device is not compared.

    Args:
        task: the name of its class.
        make: its `module`.

    Raises:
        ValueError: two calls gave one module, or two with other weights.
    """
    first = make()
    a, before = _fingerprint(first), weakref.ref(first)
    del first
    gc.collect()  # Lightning's modules may hold themselves
    module = make()
    if before() is module:
        raise ValueError(
            f"{task}.module must return a new module each time, for rows adapt it; it returned the same one twice."
        )
    b = _fingerprint(module)
    different = [name for name in a | b if a.get(name) != b.get(name)]
    if different:
        more = f" and {len(different) - 1} more differ" if len(different) > 1 else " differs"
        raise ValueError(
            f"{task}.module must give the same weights each time, for they are what rows are compared on: set the seed "
            f"in it, such as torch.manual_seed(0), before it makes new ones; {different[0]}{more}."
        )
    return module


def check_learning_rate(module: L.LightningModule) -> None:
    """Raise `ValueError` where setting `learning_rate` of a module changes none of its optimizers.

    A module that makes no optimizer without a Trainer is not judged.
    """
    name = type(module).__name__
    if not hasattr(module, "learning_rate"):
        raise ValueError(
            f"{name} has no attribute learning_rate for a row to set: let its configure_optimizers use "
            "self.learning_rate."
        )
    rate: Any = getattr(module, "learning_rate")  # noqa: B009 - which no LightningModule declares
    try:
        with _all_trained(module):
            first, second = (_rates(module, rate) for rate in _RATES)
    except Exception:  # it needs a Trainer, or what a callback adds
        return
    finally:
        setattr(module, "learning_rate", rate)  # noqa: B010
    if first and first == second:
        raise ValueError(
            f"{name}.configure_optimizers does not use self.learning_rate, which each row sets: its optimizer has lr "
            f"{first[0]['lr']:g} whatever it is set to; let it use lr=self.learning_rate."
        )


def _fingerprint(module: L.LightningModule) -> dict[str, str]:
    """Return a hash of each parameter and buffer that has values, by name."""
    tensors = chain(module.named_parameters(), module.named_buffers())
    return {name: _hash(tensor) for name, tensor in tensors if not is_lazy(tensor) and tensor.device.type != "meta"}


def _hash(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    try:
        values = plain.reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError):  # a sparse or packed tensor without plain bytes
        return str(tensor.shape)
    return hashlib.blake2b(values.data, digest_size=16).hexdigest()


@contextmanager
def _all_trained(module: L.LightningModule) -> Iterator[None]:
    """Let all parameters be trained for a while: of a frozen module an optimizer would have none."""
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _rates(module: L.LightningModule, rate: float) -> list[dict[str, Any]]:
    """Return what each group of a module's optimizers says of its learning rate, `max_lr` of a schedule among it."""
    setattr(module, "learning_rate", rate)  # noqa: B010 - which no LightningModule declares
    made: Any = module.configure_optimizers()
    groups = [group for optimizer in _optimizers(made) for group in optimizer.param_groups]
    return [{name: value for name, value in group.items() if "lr" in name.split("_")} for group in groups]


def _optimizers(made: Any) -> Iterator[torch.optim.Optimizer]:
    """Give the optimizers in what `configure_optimizers` returned."""
    if isinstance(made, torch.optim.Optimizer):
        yield made
    elif isinstance(made, dict):
        yield from _optimizers(made.get("optimizer"))
    elif isinstance(made, list | tuple):
        for one in made:
            yield from _optimizers(one)
