"""The prediction head that AdapterHub saved beside an adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_peft.adapterhub.folder import SavedHead
from lightning_peft.adapterhub.part import ROOT, Part
from lightning_peft.backbone.modules import state_tensors
from lightning_peft.backbone.task_heads import task_heads


def with_head(parts: Sequence[Part], head: SavedHead | None, model: nn.Module) -> tuple[list[Part], tuple[str, ...]]:
    """Return the parts with the head, where an adapter's folder can keep it, and a sentence where it cannot.

    A folder of this package keeps a task's head (`modules_to_save`) of a class of transformers. AdapterHub's own heads,
    which its `…AdapterModel` classes have, are modules that no class of transformers has.
    """
    if head is None:
        return list(parts), ()
    heads = task_heads(model)
    own = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    if head.model_class != type(model).__name__ or not head.tensors.keys() <= own:
        return list(parts), (_left_out(head, model),)
    inside = {key: value for key, value in head.tensors.items() if any(key.startswith(f"{name}.") for name in heads)}
    outside = head.tensors.keys() - inside.keys()
    state = state_tensors(model)
    if outside and all(torch.equal(head.tensors[key], state[key]) for key in outside):
        outside = set()  # the base's own: nothing is lost
    if outside:
        return list(parts), (_left_out(head, model),)
    if not inside:
        return list(parts), ()
    used = [name for name in heads if any(key.startswith(f"{name}.") for key in inside)]
    first, *others = parts
    config: Any = copy.copy(first.config)
    config.modules_to_save = used
    return [
        Part(first.name, config, first.tensors | {f"{ROOT}{key}": value for key, value in inside.items()}),
        *others,
    ], ()


def _left_out(head: SavedHead, model: nn.Module) -> str:
    name = type(model).__name__
    if head.model_class == name:
        return (
            f"The head of {name} was trained too and is left out, being no task's: save the whole model in AdapterHub "
            "with save_pretrained, and import with that as the base."
        )
    named = f"The head {head.name!r}" if head.name else "The head"
    return (
        f"{named} of {head.model_class} was left out, since a {name} has no modules of its names: train a head here, "
        "or copy its matrices from AdapterHub's model.heads into a class of transformers."
    )
