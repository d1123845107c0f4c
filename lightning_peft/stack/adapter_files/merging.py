"""Write adapters into their base for good: a plain transformers folder that needs neither this package nor peft."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import standalone_name
from lightning_peft.backbone.shapes import shapes_only
from lightning_peft.files.atomic import new_folder
from lightning_peft.stack.adapter_files.bases import (
    base_config,
    check_dtype,
    check_new,
    fitting_class,
    named_base,
    save_tokenizer,
)
from lightning_peft.stack.adapter_files.model_card import write_written_card, written_parts
from lightning_peft.stack.adapter_files.plain_model import PlainModel, plain_model
from lightning_peft.stack.adapter_files.saving import load_adapter
from lightning_peft.stack.adapter_files.verifying import Verification, reference
from lightning_peft.stack.adapter_files.verifying import verify as verify_folder
from lightning_peft.stack.stack import OtherBaseWarning, stack_of


@dataclass(frozen=True)
class Merged:
    """The result of merging.

    Args:
        cls: the name of the model's class.
        untied: weights that the base shares and the result has for themselves, since the adapter changed one alone.
        verification: how the result was compared with the adapted base; None where that was not asked for.
    """

    cls: str
    untied: tuple[str, ...]
    verification: Verification | None


def merge_pretrained(
    adapter: str | Path,
    output: str | Path,
    base: str | None = None,
    dtype: str = "auto",
    verify: bool = True,
    strict_base: bool = True,
) -> Merged:
    """Merge a saved adapter, or stack, into a pretrained transformers model and save the result as one.

    Everything is checked on a model without values before any weights are read: that the adapter fits the base, that
    its methods can be merged, and that the result has a place in a plain model of that class. The written model is
    then loaded and compared with base and adapter, and appears under its name only if it is the same: its outputs for
    an input that the model takes, in float32 to 1e-5 of the largest, in half precision to three times what rounding
    the base does, and every weight with the merge in float32, rounded.

    Args:
        adapter: a folder that `load_adapter` reads.
        output: where to write the model and, where the base has one, its tokenizer; must be new or empty.
        base: a folder or a name on the hub; default: the one the adapter names.
        dtype: the dtype to save in; `"auto"` is the base's own.
        verify: compare. Models are loaded one after the other, the base in float32; leave it out for one that is too
            large for this.
        strict_base: refuse an adapter made for another base model, instead of warning once.

    Raises:
        AdapterError: the adapter cannot be read or is for another base, or for something that is not transformers'.
        ValueError: a method cannot be merged, the base is quantised or unknown, `output` is not empty, or what was
            written is not the same. Nothing is left of it then.
    """
    adapter, output = Path(adapter), Path(output)
    check_new(output)
    check_dtype(dtype)
    base = base or named_base(adapter)
    cls = _check(adapter, base, strict_base)
    with new_folder(output) as folder:
        plain = _write(cls, adapter, base, dtype, folder, strict_base)
        save_tokenizer(base, folder)
        verification = _verify(cls, plain, adapter, base, folder, strict_base) if verify else None
        note = f"{verification}." if verification else "Not verified."
        write_written_card(folder, written_parts(adapter), base, plain.cls.__name__, [note])
    return Merged(plain.cls.__name__, plain.untied, verification)


def _check(adapter: Path, base: str, strict_base: bool) -> Any:
    """Make every check that needs no values, and return the class that the adapter was made for."""
    config = base_config(adapter, base)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{base} is quantised, and adapters cannot be written into packed weights: name its original.")
    cls, trial = fitting_class(adapter, base, config, strict_base)
    before = plain_state(trial)
    with shapes_only():
        stack_of(trial).merge()
        after = plain_state(trial)
        if new := sorted(after.keys() - before.keys()):
            raise ValueError(
                f"Merging {adapter} gives {len(new)} weights that a plain {type(trial).__name__} has no place for, the "
                f"first is {new[0]}: keep the adapter beside its base."
            )

        def changed(name: str) -> bool:
            return after.get(name) is not before.get(name)

        plain = plain_model(trial, lambda a, b: after.get(a) is after.get(b) or (changed(a) and changed(b)))
    if lost := sorted(plain.names - before.keys()):
        raise ValueError(
            f"Merging {adapter} is not known for {lost[0]}, which it wraps: keep the adapter beside its base."
        )
    return cls


def _write(cls: Any, adapter: Path, base: str, dtype: str, folder: Path, strict_base: bool) -> PlainModel:
    """Merge and save, then release the model."""
    backbone = cls.from_pretrained(base, dtype="auto")
    target = backbone.dtype if dtype == "auto" else getattr(torch, dtype)
    if backbone.dtype not in (target, torch.float32):  # rounded once, after merging
        del backbone
        backbone = cls.from_pretrained(base, dtype=torch.float32)
    load_adapter(backbone, adapter, strict_base=strict_base)
    stack_of(backbone).merge()
    merged = plain_state(backbone)
    with shapes_only():
        plain = plain_model(backbone, lambda a, b: _nearly_equal(merged[a], merged[b], target))
    plain.save({n: _rounded(n, merged[n], target, backbone) for n in plain.names}, backbone, target, folder)
    return plain


def _verify(cls: Any, plain: PlainModel, adapter: Path, base: str, folder: Path, strict_base: bool) -> Verification:
    gc.collect()

    def expected(model: Any) -> Mapping[str, Tensor]:
        stack_of(model).merge()
        return plain_state(model)

    def load(dtype: torch.dtype) -> Any:
        return cls.from_pretrained(base, dtype=dtype).eval()

    def adapt(model: Any) -> None:
        load_adapter(model, adapter, strict_base=strict_base)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OtherBaseWarning)  # it has been said
        origin = reference(load, adapt, expected, plain.dtypes, plain.dtype)
    return verify_folder(folder, plain.cls, plain.dtype, origin)


def _nearly_equal(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two weights are the same but for rounding."""
    return a.shape == b.shape and float((a - b).abs().max()) <= 2 * torch.finfo(dtype).eps * float(a.abs().max())


def _rounded(name: str, value: Tensor, dtype: torch.dtype, backbone: Any) -> Tensor:
    """Return a weight in the precision in which transformers would load it."""
    in_float32 = {*(backbone._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        in_float32 |= {*(backbone._keep_in_fp32_modules or ())}
    if not value.is_floating_point() or in_float32 & set(name.split(".")):
        return value
    return value.to(dtype)


def plain_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the state under its names without adapters; the adapters' own tensors are among it."""
    from peft.utils.other import ModulesToSaveWrapper

    state = {standalone_name(backbone, name): value for name, value in backbone.state_dict(keep_vars=True).items()}
    for name, module in backbone.named_modules():
        if isinstance(module, ModulesToSaveWrapper):  # holds a trained copy, which takes the original's place
            trained = module.modules_to_save[module.active_adapters[-1]].state_dict(keep_vars=True)
            state |= {standalone_name(backbone, f"{name}.{key}"): value for key, value in trained.items()}
    return state
