"""Several interventions in one call, each on a row of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite
from lightning_peft.editing.iti import HeadEdit
from lightning_peft.positions import check_policy, tracking


class RowOffsets:
    """Context manager under which a call of one row gives P rows, the p-th of them moved by the p-th displacement.

    The one row becomes P rows at the first projection that any of them moves: all that lies below is computed once.
    Each row then is what a `HeadOffsets` adapter of that displacement gives alone.

    Args:
        backbone: a causal language model; its attention must add its output to the residual stream by broadcasting, as
            transformers' do.
        displacements: for each moved projection, by full name, `[P, H * head_dim]`, what is added to its input.
        positions: where: a selection of `lightning_peft.tokens`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> with RowOffsets(model, {"model.layers.1.self_attn.o_proj": torch.randn(3, 32)}):
        ...     model(torch.tensor([[5, 6, 7]])).logits.shape
        torch.Size([3, 3, 40])
    """

    def __init__(self, backbone: nn.Module, displacements: Mapping[str, Tensor], positions: str = "answer") -> None:
        check_policy(positions)
        if len({len(rows) for rows in displacements.values()}) != 1:
            raise ValueError("Every projection needs displacements of the same number of rows, and there must be one.")
        self.displacements = dict(displacements)
        self.positions = positions
        self._modules = {name: backbone.get_submodule(name) for name in displacements}
        self._tracking = tracking(backbone)  # it ends with this object
        self._positions = self._tracking.__enter__()
        self._entered = ExitStack()

    def __len__(self) -> int:
        return len(next(iter(self.displacements.values())))

    def __enter__(self) -> RowOffsets:
        for name, module in self._modules.items():
            hook = module.register_forward_pre_hook(self._mover(self.displacements[name]))
            self._entered.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def _mover(self, rows: Tensor) -> Any:
        def move(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            mask = self._positions.mask(self.positions).to(x.device)
            if x.dim() != 3 or mask.shape[1] != x.shape[1] or (len(rows) > 1 and len(mask) > 1):
                raise ValueError(
                    f"{len(rows)} rows can be made of a call of one row and of projections of three dimensions; the "
                    f"call has {len(mask)}, and a projection's input the shape {tuple(x.shape)}."
                )
            return (x + mask.to(x.dtype)[..., None] * rows.to(x)[:, None], *rest)

        return move


def displacements(sites: Sequence[HeadSite], edits: Sequence[tuple[HeadEdit, float]]) -> dict[str, Tensor]:
    """Return what each edit, at its strength, adds to the input of each projection that any of them moves.

    Args:
        sites: from `head_sites`.
        edits: `(edit, alpha)`.

    Returns:
        By the projection's name, `[P, H * head_dim]`, zero where an edit does not move it.
    """
    added: dict[str, Tensor] = {}
    for row, (edit, alpha) in enumerate(edits):
        offsets = edit.offsets(sites)
        for layer in {layer for layer, _ in edit.heads}:
            site = sites[layer]
            heads = sorted(head for edited_layer, head in edit.heads if edited_layer == layer)  # as the offsets are
            at = added.setdefault(site.name, torch.zeros(len(edits), site.num_heads, site.head_dim))
            at[row, heads] = alpha * offsets[site.name]
    return {site.name: added[site.name].flatten(1) for site in sites if site.name in added}
