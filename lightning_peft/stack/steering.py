"""Put a saved adapter on a model for a while, at any strength and at other positions than it was saved with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.backbone.modules import uncompiled
from lightning_peft.positions import check_policy
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.adapter_files.folder import adapter_folders, read_folder
from lightning_peft.stack.adapter_files.saving import load_adapter
from lightning_peft.stack.checks import check_scale
from lightning_peft.stack.injection.initialisation import check_undoable
from lightning_peft.stack.stack import AdapterStack, find_stacks, stack_of


@contextmanager
def steering(
    model: nn.Module,
    adapter: str | Path,
    scale: float = 1.0,
    positions: str | None = None,
    strict_base: bool = True,
) -> Iterator[list[Adapter]]:
    """Adapt the model by a saved adapter for a while; afterwards it is as before, bit for bit, also on an exception.

    `model.generate` and plain calls work as ever: an edit of answer positions begins at the last token of the prompt
    that `generate` is given (see `lightning_peft.positions` for other calls). Contexts can be nested; the inner adapter
    then acts on top of the outer one.

    Args:
        model: the module the adapter was made for, e.g. a transformers model; it may carry adapters already.
        adapter: a folder that `load_adapter` reads: an edit, a tuned adapter, or a stack of them.
        scale: the dial: 1 as saved, 0 equal to the model without it bit for bit, negative reversed. A head that was
            trained whole beside the adapter is not scaled.
        positions: which tokens an edit acts on, in place of those it was saved with; see `lightning_peft.tokens`.
        strict_base: refuse an adapter made for another base model, instead of warning once.

    Yields:
        The parts that were put on, innermost first.

    Raises:
        AdapterError: the folder cannot be read, or is for another base model.
        ValueError: the adapter has no strength or no positions to change, unknown positions, it cannot go on top of
            what the model carries, or it began by changing the base's weights, as PiSSA does.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_peft import save_adapter, steering
        >>> from lightning_peft.editing import head_offsets_config, head_sites
        >>> from lightning_peft.stack.stack import stack_of
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40)).eval()
        >>> stack = stack_of(model)
        >>> part = stack.add(head_offsets_config(head_sites(model), [(0, 1)]), "edit", computed=True)
        >>> for tensor in stack.tensors(part).values():
        ...     _ = tensor.normal_()
        >>> folder = save_adapter(model, tempfile.mkdtemp())
        >>> stack.remove("edit")
        >>> prompt = torch.tensor([[3, 4, 5]])
        >>> with steering(model, folder, scale=2.0):
        ...     steered = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
        >>> stack.parts
        []
    """
    check_scale(scale)
    if positions is not None:
        check_policy(positions)
    folders = adapter_folders(Path(adapter))
    for folder in folders:
        check_undoable(read_folder(folder)[0], folder.name, "taken off again")
    stack = _stack_on(uncompiled(model))
    if any(getattr(module, "merged", False) for module in stack.backbone.modules()):
        raise ValueError("The model has adapters merged into its weights: unmerge them before steering.")
    trained = [parameter for parameter in stack.backbone.parameters() if parameter.requires_grad]
    before = set(stack.backbone.modules())
    parts: list[Adapter] = []
    try:
        for folder in folders:
            parts += load_adapter(stack.backbone, folder, _free_name(stack), strict_base)
        for module in set(stack.backbone.modules()) - before:
            module.training = False  # of a saved adapter no dropout is wanted
        for part in parts:
            _set_strength(stack, part, scale)
        if positions is not None and not sum(reposition(part, positions) for part in parts):
            raise ValueError(f"{adapter} is not limited to positions: leave positions out.")
        yield parts
    finally:
        for part in reversed(parts):
            stack.remove(part.name)
        for parameter in trained:  # what is put on freezes what is below
            parameter.requires_grad_(True)


def reposition(part: Adapter, positions: str) -> bool:
    """Let an edit act on other tokens than it was made for; return False where it has no positions to change.

    Raises:
        ValueError: unknown positions, or the edit cannot have them.
    """
    if not hasattr(part.config, "positions"):
        return False
    part.config = _with_positions(part.config, positions)
    for layer in part.injection.layers():
        for values, value in (("policies", positions), ("configs", part.config)):
            if part.name in getattr(layer, values, {}):
                getattr(layer, values)[part.name] = value
    return True


def _with_positions(config: Any, positions: str) -> Any:
    config = copy.copy(config)
    config.positions = positions
    config.__post_init__()  # which checks them
    return config


def _stack_on(model: nn.Module) -> AdapterStack:
    """Return the stack on the model, or the one inside it where there is one already."""
    stacks = list(find_stacks(model).values())
    return stacks[0] if len(stacks) == 1 else stack_of(model)


def _free_name(stack: AdapterStack) -> str:
    number = 1
    while (name := f"steering{number}") in stack:
        number += 1
    return name


def _set_strength(stack: AdapterStack, part: Adapter, scale: float) -> None:
    if scale == 0:
        stack.enable(False, part.name)  # serves methods without a scaling too
    elif scale != 1:
        stack.scale(scale, part.name)
