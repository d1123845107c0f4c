"""Write adapters into the weights of the modules they are on: exactly, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lightning_peft.backbone.quantization import is_quantized
from lightning_peft.backbone.shared import Own, Sharing
from lightning_peft.stack.injection.injection import Injection
from lightning_peft.stack.injection.rehearsal import check_merges

_HALF = (torch.float16, torch.bfloat16)


def write(backbone: nn.Module, injections: Sequence[Injection], made: list[Own]) -> None:
    """Merge adapters that are not merged yet, inner ones first.

    A weight that another module has too is given to the merged one alone; weights in half precision are computed in
    float32 and rounded once. Without values (on the meta device) only the shapes are gone through.

    Args:
        backbone: the model.
        injections: the adapters, in the order in which they are to be merged.
        made: takes up the parameters that modules got for themselves, so that this can be undone after an error.

    Raises:
        ValueError: a method cannot be merged, or would compute something else merged. What was merged by then stays so.
    """
    for injection in injections:
        injection.check_merge()
    check_merges(backbone, [injection.name for injection in injections])
    has_values = not any(parameter.is_meta for parameter in backbone.parameters())
    sharing = Sharing(backbone)
    for injection in injections:
        for layer in list(injection.layers()):
            if injection.name not in layer.merged_adapters:
                for wrapper in (module for module in layer.modules() if hasattr(module, "base_layer")):
                    made += sharing.separate(wrapper)
                try:
                    with _in_float32(layer):
                        layer.merge(safe_merge=has_values, adapter_names=[injection.name])
                except NotImplementedError as error:
                    raise injection.cannot_merge() from error


@contextmanager
def _in_float32(layer: nn.Module) -> Iterator[None]:
    """Hold half-precision weights in and under a tuner layer in float32 for a while; round them back afterwards.

    Raises:
        ValueError: a weight is larger than its precision holds.
    """
    modules = [module for module in layer.modules() if not is_quantized(module)]
    before = {parameter: parameter.dtype for module in modules for parameter in _own(module)}
    halves = {module: next((p.dtype for p in _own(module) if p.dtype in _HALF), None) for module in modules}
    for parameter, dtype in before.items():
        if dtype in _HALF:
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        # some methods put new parameters in the place of a module's own
        new = {p: dtype for module, dtype in halves.items() if dtype for p in _own(module) if p not in before}
        for parameter, dtype in (before | new).items():
            parameter.data = parameter.data.to(dtype)
    for parameter in before | new:
        if parameter.dtype in _HALF and not parameter.is_meta and not torch.isfinite(parameter).all():
            raise ValueError(
                f"Merged, weights would be larger than {str(parameter.dtype).removeprefix('torch.')} holds."
            )


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]
