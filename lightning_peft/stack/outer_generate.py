"""Let edits on a part of a model know where answers begin when the whole model generates."""

from __future__ import annotations

from torch import nn

from lightning_peft.positions import tracked


def heed_outer_generate(module: nn.Module) -> None:
    """Note the prompts of every `generate` in `module` that runs a tracked model as a part of its own.

    A language model inside one of pictures and text, say, is called with embeddings and a cache by the outer model's
    `generate`, and by itself could not know its prompt. What is put on goes with the inner model's `Positions`; a
    second call changes nothing.

    Args:
        module: a module that holds adapted models, such as a LightningModule.
    """
    for positions in tracked(module):
        for outer in module.modules():
            if _generates(outer) and _holds(outer, positions.model):
                positions.heed(outer)


def _holds(outer: nn.Module, model: nn.Module) -> bool:
    return outer is not model and any(inner is model for inner in outer.modules())


def _generates(module: nn.Module) -> bool:
    return callable(getattr(type(module), "prepare_inputs_for_generation", None)) and callable(
        getattr(type(module), "generate", None)
    )
