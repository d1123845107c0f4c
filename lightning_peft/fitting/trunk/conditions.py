"""The conditions under which a trunk, the blocks below the first trained one, repeats its result for a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.backbone.structure import Block, blocks


class TrunkError(ValueError):
    """The trunk is not the same for the same row, so it cannot be kept."""


def below_first_trained(backbone: nn.Module) -> tuple[list[Block], str]:
    """Return the blocks below the first that holds a trainable parameter, and that one's name.

    Raises:
        TrunkError: the backbone has no numbered blocks, or the first of them is trained.
    """
    every = blocks(backbone)
    if not every:
        raise TrunkError(f"{type(backbone).__name__} has no numbered list of blocks, so nothing can be left out.")
    for number, block in enumerate(every):
        trained = [name for name, p in block.module.named_parameters() if p.requires_grad]
        if trained and number == 0:
            raise TrunkError(
                f"The first block, {block.name}, is trained ({trained[0]}), so there is nothing below it to keep: "
                f"adapt only later blocks, such as LoRA(layers=[{len(every) - 2}, {len(every) - 1}])."
            )
        if trained:
            return every[:number], block.name
    return every, "the head"


def check_adapters(trunk: list[Block], backbone: nn.Module) -> None:
    """Check that no adapter acts in the trunk that is computed, or depends on where the answer begins."""
    from lightning_peft.stack.stack import stack_of

    parts = stack_of(backbone).parts
    if prompts := [part.name for part in parts if part.enabled and part.injection.changes_every_block]:
        raise TrunkError(
            f"Adapter {prompts[0]!r} puts a prompt before the first block, so all blocks change with it and none can "
            "be left out."
        )
    computed = {part.name for part in parts if part.computed}
    for block in trunk:
        for module in block.module.modules():
            policies = getattr(module, "policies", {})
            for name in getattr(module, "active_adapters", ()):
                if (name in computed and _has(module, name)) or policies.get(name, "all") != "all":
                    raise TrunkError(
                        f"Adapter {name!r} edits {block.name}, below the first trained block: switch it off while "
                        "training, or do not keep the trunk."
                    )


def check_past(arguments: Mapping[str, Any], backbone: nn.Module) -> None:
    if arguments.get("past_key_values") is not None:
        raise TrunkError(
            f"{type(backbone).__name__} is trained with a past, as prefix tuning gives it, so its blocks depend on "
            "more than their input and cannot be left out."
        )


def frozen_tensors(backbone: nn.Module, trunk: list[Block]) -> list[Tensor]:
    """Return parameters and buffers of the trunk, and frozen ones outside blocks, embeddings among them."""
    inside = {id(p) for block in blocks(backbone) for p in block.module.parameters()}
    outside = [p for p in backbone.parameters() if id(p) not in inside and not p.requires_grad]
    return [t for block in trunk for t in (*block.module.parameters(), *block.module.buffers())] + outside


def what_acts(trunk: list[Block], backbone: nn.Module) -> str:
    inside = {m for block in blocks(backbone) for m in block.module.modules()}
    below = {m for block in trunk for m in block.module.modules()}
    for name, module in backbone.named_modules():
        acts = module.training and getattr(module, "p", 0.0)
        if acts and isinstance(module, nn.modules.dropout._DropoutNd) and (module in below or module not in inside):
            return f"{name} is in training mode with p={module.p}; keep backbone_dropout=False"
    return "keep backbone_dropout=False, and the frozen parts in evaluation mode"


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """Return the leaves that a tensor was computed from."""
    stack, seen = [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [following for following, _ in node.next_functions]


def _has(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, attribute, ()) for attribute in layer.adapter_layer_names)
