"""The base model of an adapter that AdapterHub saved, in the class that had the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_peft.adapterhub.folder import read_adapter, read_head
from lightning_peft.stack.adapter_files.bases import check_dtype


def load_base_for(folder: Path, base: str, model_class: str | None = None, dtype: str = "auto") -> Any:
    """Load the base model, in evaluation mode.

    Args:
        folder: AdapterHub's folder.
        base: a folder of transformers, or a name on the hub.
        model_class: the class of transformers to load; default the one that had the adapter, or for AdapterHub's own
            classes the base's.
        dtype: to load in; `"auto"` is the base's own.

    Raises:
        AdapterError: the adapter cannot be read.
        ValueError: the base, the class or the dtype is unknown, or the class has weights that neither the base nor the
            adapter's folder holds.
    """
    import transformers

    check_dtype(dtype)
    saved, head = read_adapter(folder), read_head(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{base} is neither a folder with a transformers config.json nor a model that is reached on the hub."
        ) from error
    cls = _class(model_class) if model_class else _class(saved.model_class, *(config.architectures or ()))
    if config.model_type != getattr(cls.config_class, "model_type", config.model_type):
        raise ValueError(f"{base} is a model of the type {config.model_type}, which no {cls.__name__} can be.")
    kept: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    model, loaded = cls.from_pretrained(base, dtype=kept, output_loading_info=True)
    lacking = sorted(set(loaded["missing_keys"]) - (set(head.tensors) if head else set()))
    if lacking:
        raise ValueError(
            f"{base} has no weights for {lacking[0]} of a {cls.__name__}, and {folder} has none either: name a class "
            "whose weights it has by --model-class."
        )
    return model.eval()


def _class(*names: str) -> Any:
    """Return the first of these classes that transformers has."""
    import transformers

    for name in names:
        if name and isinstance(cls := getattr(transformers, name, None), type) and hasattr(cls, "from_pretrained"):
            return cls
    raise ValueError(
        f"transformers has no model of the class {', '.join(filter(None, names)) or 'that had the adapter'}: name one "
        "by --model-class."
    )
