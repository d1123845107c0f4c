"""Lightning checkpoints that hold only what was trained or computed, and their way back into a module.

A checkpoint keeps the adapters, whatever stands outside the backbone (heads, metrics), and under the key
`"lightning_peft"` a JSON-able description of each backbone's stack: base fingerprint, every part's configuration,
and which tensor of a peft folder each entry is. So it can be exported without a model.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.tuners.backbone.modules import eager_key, flat_key, standalone_name, uncompiled, with_nested_keys
from lightning_peft.tuners.configs import config_from_json, different_fields
from lightning_peft.tuners.folders.files import AdapterError, check_finite
from lightning_peft.tuners.folders.saving import write_described
from lightning_peft.tuners.folders.sharded import has_shards, is_sharded, write
from lightning_peft.tuners.stack import (
    AdapterStack,
    check_same_keys,
    find_stacks,
    stack_of,
)
from lightning_peft.tuners.ways.head_training import saved_heads, without_heads

META = "lightning_peft"
# the entries of a Lightning checkpoint that hold module weights; the second is written by weight-averaging callbacks
_STATES = ("state_dict", "current_model_state")

M = TypeVar("M", bound=nn.Module)


def keep_adapters(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Take the frozen backbone out of a Lightning checkpoint and describe its adapters, in place.

    Args:
        module: the LightningModule the checkpoint was made from; without adapters nothing is changed.
        checkpoint: what `Trainer.save_checkpoint` is about to write.

    Raises:
        AdapterError: two tensors would be saved under one name, or one that was trained is not among those to write.
    """
    stacks = find_stacks(module)
    if not stacks:
        return
    names = checkpoint_names(module, stacks)
    renamed: dict[str, str] = {}
    for entry in _STATES:
        if entry in checkpoint:
            state = checkpoint[entry]
            # a sharded tensor is asked for by the name it has in the module
            sharded = {live: saved for saved, live in names.items() if live in state and is_sharded(state[live])}
            checkpoint[entry] = {
                live if live in sharded else saved: state[live] for saved, live in names.items() if live in state
            }
            _check_saved(checkpoint[entry], {live if live in sharded else saved for saved, live in names.items()})
            renamed |= sharded
    described = {}
    for name, stack in stacks.items():
        description = described[_saved_name(module, name)] = stack.describe()
        for part in description["parts"]:
            part["keys"] = {eager_key(key): _saved_name(stack.backbone, live) for key, live in part["keys"].items()}
    checkpoint[META] = {"version": 1, "backbones": described, "renamed": renamed}


def restore_adapters(
    module: nn.Module,
    checkpoint: dict[str, Any],
    source: str,
    complete: bool = False,
    strict_base: bool | None = None,
) -> None:
    """Make the module's adapters those of the checkpoint, check everything, and rename its keys to the module's own.

    Afterwards `module.load_state_dict(checkpoint["state_dict"], strict=False)` restores every adapter.

    Args:
        module: the LightningModule to restore; its backbone must be the checkpoint's.
        checkpoint: a loaded Lightning checkpoint, changed in place.
        source: what to call the checkpoint in messages.
        complete: also add the module's own backbone weights, so that a strict load passes.
        strict_base: refuse an adapter made for another base model, instead of warning once; default: as the callback
            that adapted the module was told.

    Raises:
        AdapterError: not a checkpoint of adapters, another base, other settings, other keys or shapes, or values that
            are not finite.
    """
    _check_adapters(checkpoint, source)
    for name, described in checkpoint[META]["backbones"].items():
        try:
            backbone = module.get_submodule(name)
        except AttributeError:
            raise AdapterError(f"{source} adapts {name!r}, which {type(module).__name__} does not have.") from None
        stack = stack_of(uncompiled(backbone))
        stack.strict_base = stack.strict_base if strict_base is None else strict_base
        heads = saved_heads(config_from_json(part["config"]) for part in described["parts"])
        stack.check_base(described["fingerprint"], source, heads)
        _rebuild(stack, described["parts"], source)
    names = checkpoint_names(module, find_stacks(module))
    live_state = module.state_dict()
    for entry in _STATES:
        if entry not in checkpoint:
            continue
        state = _with_saved_names(checkpoint[entry], names)
        check_same_keys(set(names), set(state), f"{source} and {type(module).__name__}")
        for saved, live in names.items():
            if state[saved].shape != live_state[live].shape:
                shapes = f"{tuple(state[saved].shape)} in {source}, {tuple(live_state[live].shape)} in the module"
                raise AdapterError(f"{saved} has different shapes: {shapes}.")
        check_finite(state, source)
        restored = {names[saved]: value for saved, value in state.items()}
        checkpoint[entry] = {**live_state, **restored} if complete else restored


def restore_sharded(module: nn.Module, path: str | Path) -> None:
    """Restore a module that is spread over processes, and check it as `restore_adapters` does.

    FSDP2's strategy has read the weights before any hook is called, passing over what it did not find.

    Args:
        module: the LightningModule.
        path: the checkpoint, a file or a folder with one part for each process; every process reads it.

    Raises:
        AdapterError: as `restore_adapters`.
    """
    checkpoint = read_checkpoint(path, "cpu")
    restore_adapters(module, checkpoint, "the checkpoint")
    state = module.state_dict()
    for name, value in checkpoint["state_dict"].items():
        write(state[name], value)


def load_from_checkpoint(
    cls: type[M], path: str | Path, map_location: Any = None, strict_base: bool = True, **kwargs: Any
) -> M:
    """Load a LightningModule and its adapters from an adapter-only checkpoint, without a Trainer.

    Args:
        cls: the LightningModule class; its backbone is built as usual and is not in the checkpoint.
        path: the checkpoint, a file or the folder that FSDP2 writes.
        map_location: as in `torch.load`.
        strict_base: refuse an adapter made for another base model, instead of warning once.
        **kwargs: arguments of `cls`, over those saved in the checkpoint.

    Returns:
        The module, its adapters in place and loaded.

    Raises:
        AdapterError: as `restore_adapters`.
    """
    checkpoint = read_checkpoint(path, map_location or "cpu")
    file: Any = path
    if Path(path).is_dir():  # Lightning reads files, and such as are open
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
    with warnings.catch_warnings():
        # Lightning builds the module without adapters, so every adapter key is a stranger to it at first
        warnings.filterwarnings("ignore", message="Found keys that are")
        module = cls.load_from_checkpoint(file, map_location=map_location, strict=False, **kwargs)  # type: ignore[attr-defined]
    restore_adapters(module, checkpoint, str(path), strict_base=strict_base)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module


class AdapterCheckpointMixin:
    """Gives a LightningModule a `load_from_checkpoint` that brings the adapters back: `class M(AdapterCheckpointMixin, L.LightningModule)`."""  # noqa: E501

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if META in checkpoint:
            assert isinstance(self, nn.Module)
            restore_adapters(self, checkpoint, "the checkpoint", complete=True)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def export_checkpoint(path: str | Path, folder: str | Path, backbone: str | None = None) -> Path:
    """Turn an adapter-only Lightning checkpoint into the plain peft folder that `save_adapter` would write.

    Args:
        path: the checkpoint, a file or the folder that FSDP2 writes; no model is built.
        folder: where to write.
        backbone: which backbone's adapters, where the module had several.

    Returns:
        The folder.

    Raises:
        AdapterError: the file holds no adapters, or those of several backbones and none was named.
    """
    checkpoint = read_checkpoint(path, "cpu")
    backbones = checkpoint[META]["backbones"]
    names = ", ".join(map(repr, backbones))
    if backbone is None and len(backbones) > 1:
        raise AdapterError(f"{path} holds adapters of several backbones, {names}: name one.")
    name = next(iter(backbones)) if backbone is None else backbone
    if name not in backbones:
        raise AdapterError(f"{path} holds no adapters of {name!r}, but of {names}.")
    described, state = backbones[name], checkpoint["state_dict"]
    weights = [{key: state[_join(name, saved)] for key, saved in part["keys"].items()} for part in described["parts"]]
    return write_described(described, weights, Path(folder), base=None)


def outside_backbones(path: str | Path) -> list[str]:
    """The names of a checkpoint's weights that belong to no adapter, such as a head's: no peft folder holds them."""
    checkpoint = read_checkpoint(path, "cpu")
    adapter = {
        _join(name, saved)
        for name, described in checkpoint[META]["backbones"].items()
        for part in described["parts"]
        for saved in part["keys"].values()
    }
    return [key for key in checkpoint["state_dict"] if key not in adapter]


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint with adapters in it; only tensors and plain values are read."""
    try:
        if Path(path).is_dir():
            checkpoint = torch.load(Path(path) / "meta.pt", map_location=map_location, weights_only=True)
            checkpoint["state_dict"] = _gather(Path(path), checkpoint.get(META, {}).get("renamed"))
        else:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise AdapterError(f"{path} is truncated or holds more than tensors and plain values.") from error
    _check_adapters(checkpoint, str(path))
    return checkpoint


def _gather(folder: Path, renamed: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The whole weights of a checkpoint that is a folder of parts, in this process alone."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader, prefix = FileSystemReader(folder), "state_dict."
    entries = reader.read_metadata().state_dict_metadata.items()
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=reader, no_dist=True)
    found = {name.removeprefix(prefix): value for name, value in state.items()}
    if renamed is None:  # an earlier release did not note what it saved under names of the module
        return {eager_key(flat_key(name)): value for name, value in found.items()}
    return {renamed.get(name, name): value for name, value in found.items()}


def _check_adapters(checkpoint: dict[str, Any], source: str) -> None:
    if not checkpoint.get(META, {}).get("backbones"):
        raise AdapterError(f"{source} holds no adapters: it was not written with a lightning_peft callback.")


def checkpoint_names(
    module: nn.Module, stacks: Mapping[str, AdapterStack], state: Iterable[str] | None = None
) -> dict[str, str]:
    """What belongs in the checkpoint: the name it is saved under (as if adapters stood alone) -> its live name.

    Args:
        module: the LightningModule.
        stacks: its adapters.
        state: the names in its state; default those of `module.state_dict()`.

    Raises:
        AdapterError: two of them would be saved under one name.
    """
    kept: dict[str, str] = {}
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    adapter = {
        _join(name, live) for name, stack in stacks.items() for p in stack.parts for live in stack.keys(p).values()
    }
    for live in module.state_dict() if state is None else state:
        if live in adapter or live in trainable or not any(_inside(live, name) for name in stacks):
            saved = _saved_name(module, live)
            if saved in kept:
                raise AdapterError(
                    f"{kept[saved]} and {live} would both be saved as {saved}, and one of them lost: rename one."
                )
            kept[saved] = live
    return kept


def _check_saved(state: Mapping[str, Tensor], expected: set[str]) -> None:
    """Raise `AdapterError` where a checkpoint about to be written does not hold all that it must."""
    # where one process writes for all, Lightning gives the others an empty state
    if (missing := sorted(expected - set(state))) and (state or not torch.distributed.is_initialized()):
        raise AdapterError(
            f"The checkpoint would be written without {len(missing)} tensors that belong in it, the first is "
            f"{missing[0]}: see that neither the module's state_dict nor an on_save_checkpoint takes them out."
        )


def _saved_name(root: nn.Module, live: str) -> str:
    """The name of a tensor or module, as if its adapter stood alone on a model that is not compiled."""
    return eager_key(standalone_name(root, live))


def _with_saved_names(state: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """A checkpoint's state under saved names, of which `names` gives the live ones."""
    # a module with AdapterCheckpointMixin comes here twice, the second time with live names
    if set(state) == set(names.values()):
        return {saved: state[live] for saved, live in names.items()}
    return with_nested_keys(state, names)


def _rebuild(stack: AdapterStack, parts: list[dict[str, Any]], source: str) -> None:
    """Make the stack's parts those described; a part that is there already must have been asked for alike."""
    saved = {part["name"]: config_from_json(part["config"]) for part in parts}
    for part in stack.parts:
        if part.name not in saved:
            raise AdapterError(f"{source} has no adapter {part.name!r}; it has {', '.join(map(repr, saved))}.")
        asked, kept = part.config, saved[part.name]
        if not saved_heads([kept]):  # as before heads were trained with the adapter: it is continued as it was made
            asked, kept = (without_heads(config, saved_heads([asked])) for config in (asked, kept))
        if differences := different_fields(kept, asked, part.computed):
            raise AdapterError(f"{source} and adapter {part.name!r} have other settings: {'; '.join(differences)}.")
    same = [p.name for p in stack.parts] == list(saved) and all(
        not different_fields(saved[p.name], p.config) for p in stack.parts
    )
    if not same and has_shards(stack.backbone):
        raise AdapterError(
            f"{source} has the adapters {', '.join(map(repr, saved))} and the sharded module "
            f"{', '.join(repr(p.name) for p in stack.parts)}: give the Trainer the callbacks of all of them, in order."
        )
    if not same:
        for part in reversed(list(stack.parts)):
            stack.remove(part.name)
        for part_json in parts:
            stack.add(saved[part_json["name"]], part_json["name"], computed=part_json["computed"])
    for part_json in parts:
        stack[part_json["name"]].record = part_json["record"]
        if part_json["strength"] != 1.0:
            stack.scale(part_json["strength"], part_json["name"])


def _inside(key: str, backbone: str) -> bool:
    return backbone == "" or key.startswith(backbone + ".")


def _join(backbone: str, key: str) -> str:
    return f"{backbone}.{key}" if backbone else key
