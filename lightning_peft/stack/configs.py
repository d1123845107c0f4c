"""peft configurations as plain JSON values, and back."""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.moved.names import keep_old_names

if TYPE_CHECKING:
    from peft import PeftConfig


def config_to_json(config: PeftConfig) -> dict[str, Any]:
    """Return a configuration as JSON-able values for checkpoints: `torch.load(weights_only=True)` refuses objects."""
    return {key: _plain(value) for key, value in config.to_dict().items()}


def config_from_json(values: Mapping[str, Any]) -> PeftConfig:
    """Return the configuration that `config_to_json` described."""
    from peft import PeftConfig

    return PeftConfig.from_peft_type(**dict(values))


def different_fields(a: PeftConfig, b: PeftConfig, computed: bool = False) -> list[str]:
    """Return `name: a's value != b's value` for every field in which two configurations differ.

    Args:
        a, b: the configurations.
        computed: they are edits', of which where they act is a result and no setting.
    """
    left, right = config_to_json(a), config_to_json(b)
    ignored = {"base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version"}
    if computed:
        ignored |= {"heads", "target_modules", "tokens"}
    keys = sorted((left.keys() | right.keys()) - ignored)
    return [f"{k}: {left.get(k)!r} != {right.get(k)!r}" for k in keys if left.get(k) != right.get(k)]


def conflicts(saved: PeftConfig, wanted: PeftConfig, computed: bool = False) -> list[str]:
    """Return the fields, as `different_fields` does, in which an adapter that exists is not what is wanted.

    Fields that the wanted configuration holds only `by_default` are none: there the adapter stays what it is. What a
    field `implies` is not said again.
    """
    left_out = set(getattr(wanted, "by_default", ()))
    different = {text.partition(":")[0]: text for text in different_fields(saved, wanted, computed)}
    for field, others in getattr(wanted, "implies", {}).items():
        left_out |= set(others) if field in different else set()
    return [text for field, text in different.items() if field not in left_out]


def auto_mapping(backbone: nn.Module) -> dict[str, str] | None:
    """Return what peft notes of a base whose task is not known, for `AutoPeftModel`: its class, if transformers'."""
    cls = type(backbone)
    if not cls.__module__.startswith("transformers."):
        return None
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def check_numbers(config: PeftConfig) -> None:
    """Raise `ValueError` naming a setting that is NaN or infinite."""
    for field, value in config_to_json(config).items():
        numbers = value.values() if isinstance(value, Mapping) else [value]
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{type(config).__name__} has {field}={number}, which must be a finite number.")


def with_scale(config: PeftConfig, scale: float) -> PeftConfig:
    """Return the configuration with the scale written into it, so that any reader of the folder gets the same.

    Raises:
        ValueError: the method has no dial.
    """
    config = copy.deepcopy(config)
    if scale == 1.0:
        return config
    if pattern := getattr(config, "alpha_pattern", None):
        vars(config)["alpha_pattern"] = {k: v * scale for k, v in pattern.items()}
    for name in ("lora_alpha", "alpha"):
        if hasattr(config, name):
            setattr(config, name, getattr(config, name) * scale)
            return config
    raise ValueError(f"{type(config).__name__} has no dial, so its scale of {scale} cannot be saved with it.")


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


keep_old_names(__name__)
