"""The names in an adapter's folder: those of its files and those of its parts."""

from __future__ import annotations

import re

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "lightning_peft.json"
COMPRESSED = "adapter_model.compressed.safetensors"  # in place of the weights; see compression.py
ORDER = "stack.json"
README = "README.md"  # the model card
_LONGEST = 100  # bytes; file systems allow 255, and names get endings


def is_folder_name(name: object) -> bool:
    """Return whether a name can be a folder's, and leads nowhere else.

    Example:
        >>> is_folder_name("lora"), is_folder_name("../lora"), is_folder_name("")
        (True, False, False)
    """
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-]+", name)) and len(name.encode()) <= _LONGEST


def check_folder_name(name: object, what: str) -> None:
    """Raise `ValueError` unless a name can be a folder's, and leads nowhere else.

    Args:
        name: the name.
        what: the owner of the name, as the beginning of the message.
    """
    if not is_folder_name(name):
        shown = repr(name) if len(repr(name)) <= _LONGEST else f"{repr(name)[:_LONGEST]}…"
        raise ValueError(f"{what} consists of letters, digits, - and _, at most {_LONGEST} of them, unlike {shown}.")
