"""Arguments of a LightningModule that its checkpoint does not hold: left out when it was saved, or not readable."""

from __future__ import annotations

import inspect
import io
import pickle
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.sharded import is_sharded
from lightning_peft.fitting.pickles import type_name, unread
from lightning_peft.stack.adapter_files.typed_values import AdapterError

_KEYS = ("hyper_parameters", "datamodule_hyper_parameters")  # where Lightning puts them
_NAME = "hparams_name"  # of the argument that they are the content of, if there is one
_PLAIN = (torch.dtype, torch.device, torch.Size, OrderedDict, Counter)  # what is read back without running anything


def leave_out_modules(module: nn.Module, checkpoint: dict[str, Any]) -> dict[str, str]:
    """Remove hyperparameters that hold a module, or weights of this one, from a checkpoint that is being written.

    Lightning writes them whole: a backbone that was an argument would be in each checkpoint, and make it unreadable.

    Args:
        module: the LightningModule.
        checkpoint: the checkpoint about to be written, changed in place.

    Returns:
        The module's arguments that were taken out, and their types.
    """
    memory = {_memory(tensor) for tensor in (*module.parameters(), *module.buffers())} - {0}
    left_out: dict[str, dict[str, str]] = {}
    for entry in _KEYS:
        if isinstance(checkpoint.get(entry), dict):
            values = checkpoint[entry]
            left_out[entry] = {name: type_name(type(v)) for name, v in values.items() if _is_heavy(v, memory)}
            checkpoint[entry] = {name: value for name, value in values.items() if name not in left_out[entry]}
    if names := [name for kinds in left_out.values() for name in kinds]:
        warnings.warn(
            f"The checkpoint is written without {', '.join(map(repr, names))}, hyperparameters that hold a module or "
            "its weights: load_from_checkpoint takes them as arguments, and save_hyperparameters(ignore=…) leaves them "
            "out from the start.",
            stacklevel=2,
        )
    return left_out.get(_KEYS[0], {})


def take_out_unread(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Remove the values that could not be read from a checkpoint, in place.

    Returns:
        The module's arguments that are missing, and their types.
    """
    missing: dict[str, str] = {}
    values = checkpoint.get(_KEYS[0])
    if isinstance(values, dict):
        kinds = {name: next(iter(unread(value).values()), None) for name, value in values.items()}
        missing = {name: kind for name, kind in kinds.items() if kind is not None}
        checkpoint[_KEYS[0]] = {name: value for name, value in values.items() if name not in missing}
    elif whole := unread(values):
        missing = {str(checkpoint.get(_NAME) or _KEYS[0]): next(iter(whole.values()))}
    for entry in [entry for entry, value in checkpoint.items() if unread(value)]:
        del checkpoint[entry]
    return missing


def check_arguments(
    cls: type, missing: Mapping[str, str], given: Mapping[str, Any], checkpoint: Mapping[str, Any], source: str
) -> None:
    """Warn of, or raise for, arguments of a class that its checkpoint does not hold.

    Args:
        cls: the LightningModule's class.
        missing: arguments that it was made with and that are not in the checkpoint, and their types.
        given: the arguments that are given besides.
        checkpoint: the checkpoint.
        source: the checkpoint's name in messages.

    Raises:
        AdapterError: the class cannot be made without one of them.
    """
    every = inspect.signature(cls).parameters.items()
    parameters = {name: p for name, p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    holder = checkpoint.get(_NAME)  # an argument that has them all in it
    for name, kind in missing.items():
        argument = holder if isinstance(holder, str) and holder in parameters else name
        if argument in given:
            continue
        problem = f"{source} does not hold {name!r}, which was a {kind}"
        if argument != name or (argument in parameters and parameters[argument].default is inspect.Parameter.empty):
            raise AdapterError(
                f"{problem}, and {cls.__name__} needs it: give load_from_checkpoint the argument {argument}."
            )
        warnings.warn(f"{problem}: {cls.__name__} is made without it; give it as an argument.", stacklevel=3)


class _Nowhere(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)


class _ContentPickler(pickle.Pickler):
    """A pickler that writes nowhere, and notes the modules, tensors and objects inside a value."""

    def __init__(self) -> None:
        super().__init__(_Nowhere())
        self.modules = self.objects = False
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> str | None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        self.modules |= isinstance(value, nn.Module)
        return "seen" if isinstance(value, Tensor | nn.Module) else None  # what is in it is of no interest

    def reducer_override(self, value: object) -> Any:
        self.objects |= not isinstance(value, _PLAIN)
        return NotImplemented


def _is_heavy(value: object, memory: set[int]) -> bool:
    """Return whether a value holds a module, a tensor of this memory, or tensors in objects not read back."""
    pickler = _ContentPickler()
    try:
        pickler.dump(value)
    except Exception:  # it cannot be saved at all, which whoever saves it says best
        return False
    return pickler.modules or any(pickler.objects or _memory(tensor) in memory for tensor in pickler.tensors)


def _memory(tensor: Tensor) -> int:
    local = tensor.to_local() if is_sharded(tensor) else tensor
    try:
        return local.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a kind of tensor without memory of its own
        return 0
