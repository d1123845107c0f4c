"""Adapters to and from plain peft folders, alone or stacked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.backbone.find_backbone import find_backbone, is_lightning_module
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.adapter_files.folder import CONFIG, AdapterError, adapter_folders, read_folder, write_folders
from lightning_peft.stack.configs import config_from_json, with_scale
from lightning_peft.stack.injection.head_training import saved_heads
from lightning_peft.stack.injection.registry import injection_for
from lightning_peft.stack.outer_generate import heed_outer_generate
from lightning_peft.stack.stack import AdapterStack, adapters, find_stacks, stack_of

if TYPE_CHECKING:
    from peft import PeftConfig

# what peft raises where a setting is not of its type, which it does not check
_WRONG_TYPES = (AttributeError, KeyError, IndexError, TypeError, OverflowError)


def save_adapter(module: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of `module` as peft folders.

    One adapter becomes one folder that `PeftModel.from_pretrained` reads, of a type of this package's own after `import
    lightning_peft`; its README, a model card, says so. Several become a subfolder each, under
    their names, with their order in `stack.json`. Files appear complete or not at all.

    Args:
        module: a LightningModule or backbone that carries adapters.
        folder: where to write; existing adapter files there are replaced.

    Returns:
        The folder.
    """
    stack = adapters(module)
    described = stack.describe()
    weights = [stack.tensors(part) for part in stack.parts]
    return write_described(described, weights, Path(folder), base=_base_name(stack.backbone))


def write_described(
    described: Mapping[str, Any], weights: list[dict[str, Tensor]], folder: Path, base: str | None
) -> Path:
    """Write a stack by its description (`AdapterStack.describe`) and each part's tensors, as `save_adapter` does."""
    by_name = {}
    for part, tensors in zip(described["parts"], weights, strict=True):
        config = with_scale(config_from_json(part["config"]), part["strength"])
        config.task_type = config.task_type or part.get("task_type")
        if config.task_type is None:
            config.auto_mapping = config.auto_mapping or described.get("auto_mapping")
        config.base_model_name_or_path = config.base_model_name_or_path or base
        if hasattr(config, "compacted"):
            config, tensors = config.compacted(tensors)
        notes = {"fingerprint": described["fingerprint"], "computed": part["computed"], "record": part["record"]}
        by_name[part["name"]] = (config, _unshared(tensors), notes)
    write_folders(folder, by_name)
    return folder


def load_adapter(
    backbone: nn.Module, folder: str | Path, name: str | None = None, strict_base: bool = True
) -> list[Adapter]:
    """Put a saved adapter, or a saved stack of them, on a backbone; folders of plain peft serve as well as ours.

    Args:
        backbone: the model to adapt, which this freezes; or a LightningModule, whose backbone is meant: the one that
            carries adapters already, else the one that callbacks find.
        folder: a peft folder, or a folder of them with `stack.json`.
        name: the name to give a single adapter; default `"default"`, or the subfolder's.
        strict_base: refuse an adapter made for another base model, instead of warning once.

    Returns:
        The parts added, innermost first.

    Raises:
        AdapterError: unreadable, truncated or foreign files, another base model, values that are not finite.
        ValueError: a LightningModule with no backbone, or several.
    """
    folder = Path(folder)
    folders = adapter_folders(folder)
    stack, added = _stack_in(backbone), []
    stack.strict_base = strict_base
    contents = [read_folder(path) for path in folders]
    heads = saved_heads(config for config, _, _ in contents)
    with stack.reading_base_once():
        for path, (_, _, notes) in zip(folders, contents, strict=True):
            stack.check_base(notes.get("fingerprint", {}), str(path), heads)
        try:
            for path, (config, tensors, notes) in zip(folders, contents, strict=True):
                part_name = path.name if len(folders) > 1 else name or "default"
                config.inference_mode = injection_for(config).is_final(config, tensors)
                part = add_read(
                    stack, config, part_name, notes.get("computed", False), notes.get("record"), str(path / CONFIG)
                )
                added.append(part)
                stack.load_tensors(part, tensors, str(path), part.injection.noted)
        except Exception:
            for part in reversed(added):
                stack.remove(part.name)
            raise
    heed_outer_generate(backbone)
    return added


def _stack_in(module: nn.Module) -> AdapterStack:
    if not is_lightning_module(module):
        return stack_of(module)
    return (
        adapters(module) if find_stacks(module) else stack_of(module.get_submodule(find_backbone(module, None) or ""))
    )


def read_config(values: Mapping[str, Any], source: str) -> PeftConfig:
    """Return the configuration in a checkpoint.

    Raises:
        AdapterError: it is none.
    """
    try:
        return config_from_json(values)
    except (ValueError, *_WRONG_TYPES) as error:
        raise AdapterError(f"{source} holds no peft configuration: {error!r}.") from error


def add_read(
    stack: AdapterStack,
    config: PeftConfig,
    name: str,
    computed: bool,
    record: dict[str, Any] | None,
    source: str,
) -> Adapter:
    """Put an adapter on a stack as it was read from a file.

    Raises:
        AdapterError: a setting is not of the type that it should be.
        ValueError: as `AdapterStack.add`.
    """
    try:
        return stack.add(config, name, computed, record)
    except _WRONG_TYPES as error:
        raise AdapterError(f"{source} has a setting of the wrong type: {error!r}.") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each with memory of its own: safetensors writes no two views of the same."""
    seen: set[int] = set()
    unshared = {}
    for key, value in tensors.items():
        memory = value.untyped_storage().data_ptr()
        unshared[key] = value.clone() if memory in seen else value
        seen.add(memory)
    return unshared


def _base_name(backbone: nn.Module) -> str | None:
    return getattr(getattr(backbone, "config", None), "_name_or_path", None) or None
