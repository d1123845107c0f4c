"""The base model that a saved adapter was made for: its name, its class, the model; and where results are written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_peft.backbone.shapes import shapes_only
from lightning_peft.stack.adapter_files.folder import CONFIG, AdapterError, adapter_folders, read_folder
from lightning_peft.stack.adapter_files.saving import load_adapter
from lightning_peft.stack.stack import OtherBaseWarning

# transformers' classes to try for the base, after the one its config names; the adapter's fingerprint tells which it is
_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
)


def named_base(adapter: Path) -> str:
    """Return the base that an adapter's own configuration names.

    Raises:
        AdapterError: it names none.
    """
    for folder in adapter_folders(adapter):
        config, _, _ = read_folder(folder)
        if config.base_model_name_or_path:
            return config.base_model_name_or_path
    raise AdapterError(f"{adapter / CONFIG} names no base model: give it with --base.")


def load_base(
    adapter: str | Path, base: str | None = None, dtype: str = "auto", strict_base: bool = True
) -> tuple[Any, str]:
    """Load the pretrained transformers model that an adapter was made for, without the adapter.

    Args:
        adapter: a folder that `load_adapter` reads.
        base: a folder or a name on the hub; default: the one the adapter names.
        dtype: to load in; `"auto"` is the base's own.
        strict_base: refuse an adapter made for another base model, instead of warning once.

    Returns:
        The model, in evaluation mode, and the base's folder or name.

    Raises:
        AdapterError: the adapter cannot be read or is for another base, or for something that is not transformers'.
        ValueError: the base or the dtype is unknown.
    """
    adapter = Path(adapter)
    check_dtype(dtype)
    base = base or named_base(adapter)
    config = base_config(adapter, base)
    if getattr(config, "quantization_config", None) is not None:  # of which there are no shapes without its weights
        cls = next(_classes(config))
    else:
        cls, _ = fitting_class(adapter, base, config, strict_base)
    return cls.from_pretrained(base, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).eval(), base


def base_config(adapter: Path, base: str) -> Any:
    """Return the base's configuration.

    Raises:
        AdapterError: the adapter was not made for a transformers model.
        ValueError: there is no such base.
    """
    from transformers import AutoConfig

    fingerprints = [read_folder(folder)[2].get("fingerprint", {}) for folder in adapter_folders(adapter)]
    if any(f and f.get("model_type") is None for f in fingerprints):
        raise AdapterError(
            f"{adapter} was made for a module that is not a transformers model, which no transformers folder can hold: "
            "load the module with lightning_peft.load_from_checkpoint, call lightning_peft.adapters(module).merge() "
            "and save what you need of module.state_dict()."
        )
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{base} is neither a folder with a transformers config.json nor a model that is reached on the hub."
        ) from error


def fitting_class(adapter: Path, base: str, config: Any, strict_base: bool = True) -> tuple[Any, Any]:
    """Return the class of model that the adapter was made for, and one with the adapter, both without values.

    With `strict_base=False` it is the first in which the adapter has its places, and nothing is said of another base.

    Raises:
        ValueError: it was made for no class of model that the base has.
    """
    misfit: ValueError | None = None
    for cls in _classes(config):
        with shapes_only():
            try:
                trial = cls.from_pretrained(base)
            except (ValueError, OSError):  # this architecture has no such class
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", OtherBaseWarning)
                    load_adapter(trial, adapter, strict_base=strict_base)
            except ValueError as error:
                misfit = misfit or error
                continue
            return cls, trial
    raise misfit or ValueError(f"transformers has no class for the model in {base}.")


def check_dtype(dtype: str) -> None:
    """Raise `ValueError` unless it is `"auto"` or names a torch dtype."""
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be auto or name a torch dtype such as bfloat16, got {dtype!r}.")


def check_new(output: Path) -> None:
    """Raise `ValueError` unless a folder can be written there without touching existing files."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: name another to write to.")


def save_tokenizer(base: str, folder: Path) -> None:
    """Copy the base's tokenizer or processor, where it has one."""
    from transformers import AutoImageProcessor, AutoTokenizer

    for cls in (AutoTokenizer, AutoImageProcessor):
        try:
            cls.from_pretrained(base).save_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it has none, which is no fault


def _classes(config: Any) -> Iterator[Any]:
    """Return the classes a base may have been loaded with, the one its config names first."""
    import transformers

    for name in (*(config.architectures or ()), *_CLASSES):
        if (cls := getattr(transformers, name, None)) is not None:
            yield cls
