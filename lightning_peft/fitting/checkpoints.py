"""Lightning checkpoints that hold only what was trained or computed, and their way back into a module.

A checkpoint keeps the adapters, whatever stands outside the backbone (heads, metrics), and under the key
`"lightning_peft"` a JSON-able description of each backbone's stack: base fingerprint, every part's configuration,
and which tensor of a peft folder each entry is. So it can be exported without a model.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import eager_key, state_tensors, uncompiled, with_nested_keys
from lightning_peft.backbone.sharded import has_shards, is_sharded, write
from lightning_peft.fitting.checkpoint_files import check_adapters, read_checkpoint
from lightning_peft.fitting.checkpoint_names import META, checkpoint_names, is_inside, join, saved_name
from lightning_peft.fitting.hyperparameters import check_arguments, leave_out_modules, take_out_unread
from lightning_peft.fitting.pickles import unread
from lightning_peft.stack.adapter_files.folder import AdapterError, check_finite, check_kind
from lightning_peft.stack.adapter_files.saving import add_read, read_config
from lightning_peft.stack.configs import conflicts, different_fields
from lightning_peft.stack.injection.head_training import saved_heads, without_heads
from lightning_peft.stack.outer_generate import heed_outer_generate
from lightning_peft.stack.stack import AdapterStack, check_same_keys, find_stacks, stack_of

# the entries of a Lightning checkpoint that hold module weights; the second is written by weight-averaging callbacks
_STATES = ("state_dict", "current_model_state")

M = TypeVar("M", bound=nn.Module)
States = dict[str, dict[str, Tensor]]  # an entry of a checkpoint that holds weights -> live name -> tensor


def fill_in(module: nn.Module, checkpoint: dict[str, Any]) -> States:
    """Add trained tensors inside the backbones to a checkpoint's states, where the module's own state lacks them.

    A module may leave entries out of its `state_dict()`, or rename them, by overriding it or by hooks. Outside the
    backbones that is its own affair.

    Args:
        module: the LightningModule the checkpoint is made from.
        checkpoint: changed in place.

    Returns:
        What is trained inside the backbones, for each state.
    """
    tensors, stacks = state_tensors(module), find_stacks(module)
    trained = [live for live in checkpoint_names(module, stacks, tensors).values() if is_inside(live, stacks)]
    # of an average there is no other source, and of a sharded tensor none that one process could read alone
    ours = {name: tensors[name].detach() for name in trained if not is_sharded(tensors[name])}
    filled = {}
    for entry in _STATES:
        if entry in checkpoint:
            elsewhere = not checkpoint[entry] and has_shards(module)  # gathered by another process
            if not elsewhere and (entry == _STATES[-1] or _STATES[-1] not in checkpoint):
                checkpoint[entry] = {**ours, **checkpoint[entry]}
            filled[entry] = {name: checkpoint[entry][name] for name in trained if name in checkpoint[entry]}
    return filled


def keep_adapters(module: nn.Module, checkpoint: dict[str, Any], filled: States | None = None) -> None:
    """Take the frozen backbone out of a Lightning checkpoint and describe its adapters, in place.

    It is taken out of the hyperparameters too, where it was an argument of the module.

    Args:
        module: the LightningModule the checkpoint was made from; without adapters nothing is changed.
        checkpoint: the checkpoint that `Trainer.save_checkpoint` is about to write.
        filled: what `fill_in` returned, where something that may have left entries out has had the checkpoint since.

    Raises:
        AdapterError: two tensors would be saved under one name, or something that was trained inside a backbone is
            missing and cannot be filled in.
    """
    stacks = find_stacks(module)
    if not stacks:
        return
    filled = filled or fill_in(module, checkpoint)
    names = checkpoint_names(module, stacks)
    outside: dict[str, list[str]] = {}
    renamed: dict[str, str] = {}
    for entry in filled:
        own_state = checkpoint.get(entry) or {}
        state = {**filled[entry], **own_state}
        # a sharded tensor is asked for by the name it has in the module
        sharded = {live: saved for saved, live in names.items() if live in state and is_sharded(state[live])}
        to_save = {live if live in sharded else saved: state[live] for saved, live in names.items() if live in state}
        renamed |= sharded
        missing = [live for live in names.values() if live not in state and is_inside(live, stacks)]
        if missing and own_state:  # where it is gathered in one process, the others have nothing
            raise AdapterError(
                f"The checkpoint would lack {len(missing)} trained tensors, the first is {missing[0]}: let "
                f"{type(module).__name__}.state_dict() hold them."
            )
        lives = set(names.values())
        added = {name: value for name, value in own_state.items() if name not in lives and not is_inside(name, stacks)}
        checkpoint[entry] = to_save | added
        left_out = [saved for saved, live in names.items() if live not in state]
        outside = outside or {"added": list(added), "left_out": left_out}
    described = {}
    for name, stack in stacks.items():
        description = described[saved_name(module, f"{name}.").rstrip(".")] = stack.describe()
        for part in description["parts"]:
            part["keys"] = {eager_key(key): saved_name(stack.backbone, live) for key, live in part["keys"].items()}
    checkpoint[META] = {"version": 1, "backbones": described, "outside": outside, "renamed": renamed}
    if modules := leave_out_modules(module, checkpoint):
        checkpoint[META]["left_out"] = modules


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
        source: the checkpoint's name in messages.
        complete: also add the module's own backbone weights, so that a strict load passes.
        strict_base: refuse an adapter made for another base model, instead of warning once; default: as the callback
            that adapted the module was told.

    Raises:
        AdapterError: not a checkpoint of adapters, another base, other settings, other keys or shapes, or values that
            are not finite.
    """
    check_adapters(checkpoint, source)
    for name, described in checkpoint[META]["backbones"].items():
        try:
            backbone = module.get_submodule(name)
        except AttributeError:
            raise AdapterError(f"{source} adapts {name!r}, which {type(module).__name__} does not have.") from None
        stack = stack_of(uncompiled(backbone))
        stack.strict_base = stack.strict_base if strict_base is None else strict_base
        heads = saved_heads(read_config(part["config"], source) for part in described["parts"])
        stack.check_base(described["fingerprint"], source, heads)
        _rebuild(stack, described["parts"], source)
    heed_outer_generate(module)
    stacks, tensors = find_stacks(module), state_tensors(module)
    names, noted = checkpoint_names(module, stacks, tensors), checkpoint[META].get("outside", {})
    for entry in _STATES:
        if entry not in checkpoint:
            continue
        added = {key: value for key, value in checkpoint[entry].items() if key in noted.get("added", ())}
        stored = {key: value for key, value in checkpoint[entry].items() if key not in added}
        state = _with_saved_names(stored, names)
        if not noted:  # an earlier release kept what is outside, whatever it was
            added = {key: state.pop(key) for key in state.keys() - names if not is_inside(key, stacks)}
        expected = names.keys() - set(noted.get("left_out", ()))
        check_same_keys(expected, set(state), f"{source} and {type(module).__name__}")
        live_names = {saved: names[saved] for saved in state}
        for saved, live in live_names.items():
            if state[saved].shape != tensors[live].shape:
                shapes = f"{tuple(state[saved].shape)} in {source}, {tuple(tensors[live].shape)} in the module"
                raise AdapterError(f"{saved} has different shapes: {shapes}.")
            check_kind(state[saved], tensors[live], f"{source}: {saved}")
        check_finite(state, source)
        if entry == _STATES[0]:  # the module's own `load_state_dict` may leave out or rename what it does not know
            for saved, live in live_names.items():
                if is_inside(live, stacks):
                    write(tensors[live], state[saved])
        whole_state = _whole_state(module) if complete else {}
        checkpoint[entry] = whole_state | {names[saved]: value for saved, value in state.items()} | added


def restore_sharded(module: nn.Module, path: str | Path) -> None:
    """Restore a module that is spread over processes, and check it as `restore_adapters` does.

    FSDP2's strategy reads the weights before any hook is called, and passes over those it does not find.

    Args:
        module: the LightningModule.
        path: the checkpoint, a file or a folder with one part for each process; every process reads it.

    Raises:
        AdapterError: as `restore_adapters`.
    """
    checkpoint = read_checkpoint(path, "cpu")
    restore_adapters(module, checkpoint, "the checkpoint")
    state = state_tensors(module)
    for name, value in checkpoint["state_dict"].items():
        if name in state:
            write(state[name], value)


def load_from_checkpoint(
    cls: type[M],
    path: str | Path,
    map_location: Any = None,
    strict_base: bool = True,
    trust: bool = False,
    **kwargs: Any,
) -> M:
    """Load a LightningModule and its adapters from an adapter-only checkpoint, without a Trainer.

    Args:
        cls: the LightningModule class; its backbone is built as usual and is not in the checkpoint.
        path: the checkpoint, a file or the folder that FSDP2 writes.
        map_location: as in `torch.load`.
        strict_base: refuse an adapter made for another base model, instead of warning once.
        trust: unpickle hyperparameters that are no plain values, and whatever else is in the file: this runs the code
            that it names.
        **kwargs: arguments of `cls`, over those saved in the checkpoint.

    Returns:
        The module, its adapters in place and loaded.

    Raises:
        AdapterError: as `restore_adapters`; or the class needs an argument that the checkpoint does not hold, or
            holds as an object that is not read without `trust`.
    """
    checkpoint = read_checkpoint(path, map_location or "cpu", trust)
    whole = not unread(checkpoint)
    missing = checkpoint[META].get("left_out", {}) | take_out_unread(checkpoint)
    check_arguments(cls, missing, kwargs, checkpoint, str(path))
    file: Any = path
    if not whole or Path(path).is_dir():  # Lightning reads files whole, and such as are open
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
    with warnings.catch_warnings():
        # Lightning builds the module without adapters, so every adapter key is a stranger to it at first
        warnings.filterwarnings("ignore", message="Found keys that are")
        module = cls.load_from_checkpoint(  # type: ignore[attr-defined]
            file, map_location=map_location, strict=False, weights_only=not trust, **kwargs
        )
    restore_adapters(module, checkpoint, str(path), strict_base=strict_base)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module


class AdapterCheckpointMixin:
    """Give a LightningModule a `load_from_checkpoint` that brings the adapters back: `class M(AdapterCheckpointMixin, L.LightningModule)`."""  # noqa: E501

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if META in checkpoint:
            assert isinstance(self, nn.Module)
            restore_adapters(self, checkpoint, "the checkpoint", complete=True)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def _with_saved_names(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a checkpoint's state under saved names, of which `names` gives the live ones."""
    # a module with AdapterCheckpointMixin comes here twice, the second time with live names
    saved = {live: name for name, live in names.items()}
    if not set(state) <= set(names) and set(state) <= set(saved):
        return {saved[live]: value for live, value in state.items()}
    return dict(with_nested_keys(state, names))


def _rebuild(stack: AdapterStack, parts: list[dict[str, Any]], source: str) -> None:
    """Make the stack's parts those described; a part already present must have the same settings."""
    saved = {part["name"]: read_config(part["config"], source) for part in parts}
    for part in stack.parts:
        if part.name not in saved:
            raise AdapterError(f"{source} has no adapter {part.name!r}; it has {', '.join(map(repr, saved))}.")
        present, expected = part.config, saved[part.name]
        if not saved_heads([expected]):  # as before heads were trained with the adapter: it is continued as it was made
            present, expected = (without_heads(config, saved_heads([present])) for config in (present, expected))
        if differences := conflicts(expected, present, part.computed):
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
        with stack.changing():
            for part in reversed(list(stack.parts)):
                stack.remove(part.name)
            for part_json in parts:
                add_read(stack, saved[part_json["name"]], part_json["name"], part_json["computed"], None, source)
    for part_json in parts:
        stack[part_json["name"]].record = part_json["record"]
        if part_json["strength"] != 1.0:
            stack.scale(part_json["strength"], part_json["name"])


def _whole_state(module: nn.Module) -> dict[str, Any]:
    """Return all that a strict load asks for."""
    parts = module.named_modules(remove_duplicate=False)
    extra = {name: part for name, part in parts if type(part).get_extra_state is not nn.Module.get_extra_state}
    return state_tensors(module) | {join(name, "_extra_state"): part.get_extra_state() for name, part in extra.items()}
