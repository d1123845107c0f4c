"""Which modules to adapt where the user names none."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from lightning_peft.tuners.stack import standalone_key


def default_targets(backbone: nn.Module) -> list[str]:
    """peft's own choice for the model's type, else the name of every linear layer but the output embedding.

    Args:
        backbone: a transformers model or any module.

    Raises:
        ValueError: the backbone has no linear layer.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    model_type = getattr(getattr(backbone, "config", None), "model_type", None)
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)  # type: ignore[arg-type]
    if known is not None:
        return list(known)
    get_output = getattr(backbone, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    names = [name for name, module in base_modules(backbone) if name and is_linear(module) and module is not output]
    if not names:
        raise ValueError(f"{type(backbone).__name__} has no linear layer to adapt; name the target_modules.")
    return names


def targets_in_layers(backbone: nn.Module, targets: list[str], layers: list[int]) -> list[str]:
    """The full names of the targets that stand in blocks of these numbers, counted in the outermost numbered list.

    peft's `layers_to_transform` lets targets given by full name through, and is content if one of the blocks exists.

    Args:
        backbone: the model to adapt.
        targets: names or ends of names; one that matches nothing is kept, to be refused with the others.
        layers: block numbers, 0-based.

    Raises:
        ValueError: there is no such block with a target in it.
    """
    unknown, blocks = set(targets), dict[str, int]()
    for name, _ in base_modules(backbone):
        if matching := {target for target in targets if name == target or name.endswith(f".{target}")}:
            unknown -= matching
            if block := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name):
                blocks[name] = int(block[1])
    if not unknown and (absent := sorted(set(layers) - set(blocks.values()))):
        known = ", ".join(map(str, sorted(set(blocks.values())))) or "in no numbered list"
        raise ValueError(f"There is no block {absent[0]} to adapt: the blocks with target modules are {known}.")
    return [name for name, number in blocks.items() if number in layers] + sorted(unknown)


def base_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The backbone's own modules under the names they have without adapters, adapters' modules left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: set[nn.Module] = set()
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside |= set(module.modules()) - set(module.get_base_layer().modules())  # type: ignore[attr-defined]
        if module not in inside:
            yield standalone_key(name + ".").rstrip("."), module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product: `nn.Linear` (quantised ones included) or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
