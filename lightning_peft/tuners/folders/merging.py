"""Write adapters into their base for good: a plain transformers folder that needs neither this package nor peft."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.tuners.backbone.modules import standalone_name
from lightning_peft.tuners.backbone.shapes import shapes_only
from lightning_peft.tuners.folders.bases import (
    base_config,
    check_dtype,
    check_new,
    fitting_class,
    named_base,
    save_tokenizer,
)
from lightning_peft.tuners.folders.saving import load_adapter
from lightning_peft.tuners.stack import stack_of


def merge_pretrained(adapter: str | Path, output: str | Path, base: str | None = None, dtype: str = "auto") -> str:
    """Merge a saved adapter, or stack, into a pretrained transformers model and save the result as one.

    Everything is checked on a model without values before any weights are read: that the adapter fits the base, that
    its methods can be merged, and that the result has a place in a plain model of that class.

    Args:
        adapter: a folder that `load_adapter` reads.
        output: where to write the model and, where the base has one, its tokenizer; must be new or empty.
        base: a folder or a name on the hub; default: the one the adapter names.
        dtype: the dtype to load the base in and to save in; `"auto"` is the base's own.

    Returns:
        The name of the class that was saved.

    Raises:
        AdapterError: the adapter cannot be read or is for another base, or for something that is not transformers'.
        ValueError: a method cannot be merged, the base is quantised or unknown, or `output` is not empty.
    """
    adapter, output = Path(adapter), Path(output)
    check_new(output)
    check_dtype(dtype)
    base = base or named_base(adapter)
    cls, plain = _check(adapter, base)
    backbone = cls.from_pretrained(base, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    load_adapter(backbone, adapter)
    stack_of(backbone).merge()
    merged = _plain_state(backbone)
    plain.load_state_dict({name: merged[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    if changed := [name for name, value in plain.state_dict().items() if not torch.equal(value, merged[name])]:
        raise ValueError(f"{base} shares {changed[0]} with another weight, and only one of the two was trained.")
    plain.config.dtype = backbone.dtype
    plain.generation_config = backbone.generation_config if plain.can_generate() else None
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as made:
        plain.save_pretrained(Path(made, "model"))
        save_tokenizer(base, Path(made, "model"))
        if output.exists():
            output.rmdir()
        shutil.move(Path(made, "model"), output)
    return type(plain).__name__


def _check(adapter: Path, base: str) -> tuple[Any, Any]:
    """The class that the adapter was made for, and a model of it without values, after every check."""
    config = base_config(adapter, base)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{base} is quantised, and adapters cannot be written into packed weights: name its original.")
    cls, trial = fitting_class(adapter, base, config)
    with shapes_only():
        plain = cls.from_pretrained(base)
        _check_mergeable(trial, adapter, plain)
    return cls, plain


def _check_mergeable(trial: nn.Module, adapter: Path, plain: nn.Module) -> None:
    """Merge without values, which raises where a method cannot, and see that nothing came out that has no place."""
    before = _plain_state(trial).keys()
    for part in stack_of(trial).parts:
        part.injection.check_merge()
    for part in stack_of(trial).parts:
        for layer in part.injection.layers():
            layer.merge(safe_merge=False, adapter_names=[part.name])
    if new := sorted(_plain_state(trial).keys() - before):
        raise ValueError(
            f"Merging {adapter} gives {len(new)} weights that a plain {type(trial).__name__} has no place for, the "
            f"first is {new[0]}: keep the adapter beside its base."
        )
    if lost := sorted(plain.state_dict().keys() - before):
        raise ValueError(
            f"Merging {adapter} is not known for {lost[0]}, which it wraps: keep the adapter beside its base."
        )


def _plain_state(backbone: nn.Module) -> dict[str, Any]:
    """The state under the names it has without adapters; the adapters' own tensors are among it."""
    from peft.utils.other import ModulesToSaveWrapper

    state = {standalone_name(backbone, name): value for name, value in backbone.state_dict().items()}
    for name, module in backbone.named_modules():
        if isinstance(module, ModulesToSaveWrapper):  # holds a trained copy, which takes the original's place
            trained = module.modules_to_save[module.active_adapters[-1]].state_dict()
            state |= {standalone_name(backbone, f"{name}.{key}"): value for key, value in trained.items()}
    return state
