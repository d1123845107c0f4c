"""Adapters stay in float32 where the Trainer turns the whole module into half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning as L
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_peft.backbone.sharded import is_sharded
from lightning_peft.replaced import replaced, replacements
from lightning_peft.stack.stack import AdapterStack, find_stacks

_CONVERT = "convert_module"


def keep_precise(trainer: L.Trainer) -> None:
    """Leave adapters out when the Trainer next converts the module, under `precision="bf16-true"` or `"16-true"`.

    A small step added to a half-precision weight is rounded away. The frozen backbone takes no steps, so it may be
    half; adapters are small, and peft itself keeps them in float32. Values restored from a checkpoint are not rounded
    either, so that a resumed run goes on exactly.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision) and not replacements(plugin, _CONVERT, _without_adapters):
        replaced(plugin, _CONVERT, _without_adapters, once=True)


def _without_adapters(convert: Callable[[nn.Module], nn.Module], module: nn.Module) -> nn.Module:
    adapter_values = [(parameter, parameter.data) for parameter in _own_parameters(module)]
    if any(is_sharded(parameter) for parameter, _ in adapter_values):
        rank_zero_warn("Sharded adapters are trained in half precision too under a Trainer's true half precision.")
        adapter_values = []
    module = convert(module)
    for parameter, data in adapter_values:
        parameter.data = data
    return module


def check_precise(stack: AdapterStack) -> None:
    """Raise `ValueError` where an adapter would be trained in float16, in which optimizers soon give NaN.

    Methods that compute with copies of the base's own weights train in its precision; bfloat16 has float32's range.
    """
    for part in stack.parts:
        for name, parameter in stack.parameters(part).items():
            if parameter.requires_grad and parameter.dtype == torch.float16:
                raise ValueError(
                    f"{type(part.config).__name__} trains in the base's own precision, and {name} is float16, in which "
                    "small steps are lost: load the base in bfloat16 or float32."
                )


def forget_precise(trainer: L.Trainer) -> None:
    """Undo `keep_precise` where nothing was converted."""
    for link in replacements(trainer.precision_plugin, _CONVERT, _without_adapters):
        link.remove()


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that peft keeps in float32: those of tuner layers under an adapter's name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for stack in find_stacks(module).values():
        names = {part.name for part in stack.parts if not part.injection.trains_copies}
        for layer in stack.backbone.modules():
            if isinstance(layer, BaseTunerLayer):
                for child in layer.children():
                    if isinstance(child, nn.ModuleDict | nn.ParameterDict):
                        for name in names & set(child.keys()):
                            held = child[name]
                            yield from [held] if isinstance(held, nn.Parameter) else held.parameters()
