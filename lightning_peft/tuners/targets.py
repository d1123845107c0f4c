"""Which modules to adapt where the user names none."""

from __future__ import annotations

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
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if known is not None:
        return list(known)
    get_output = getattr(backbone, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    names = [name for name, module in base_modules(backbone) if name and is_linear(module) and module is not output]
    if not names:
        raise ValueError(f"{type(backbone).__name__} has no linear layer to adapt; name the target_modules.")
    return names


def base_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The backbone's own modules under the names they have without adapters, adapters' modules left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: set[nn.Module] = set()
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            inside |= set(module.modules()) - set(base.modules())
        if module not in inside:
            yield standalone_key(name + ".").rstrip("."), module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product: `nn.Linear` (quantised ones included) or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
