"""Calls of a causal language model on packed rows, behind a beginning whose keys and values are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.accepted_arguments import accepted_arguments
from lightning_peft.packing.attention import attention_of
from lightning_peft.positions import answering

if TYPE_CHECKING:
    from transformers import DynamicCache


class Beginning:
    """The beginning that the texts of several calls share: its tokens, and their keys and values in every layer.

    It never forgets a token, whatever the layers' windows are, so that it can be cropped; the masks keep to windows.

    Args:
        backbone: a causal language model of transformers.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.cache = growing_cache(backbone)
        self.tokens: list[int] = []

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if (extra := self.cache.get_seq_length() - length) > 0:
            self.cache.crop(-extra)


def growing_cache(backbone: nn.Module) -> DynamicCache:
    """Return an empty cache of a model that keeps all it is given, also in layers with a sliding window."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=getattr(backbone, "config", None))
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def read_only(cache: DynamicCache) -> DynamicCache:
    """Return a view of a cache: a call reads the cache's content before its own, and leaves nothing in it.

    It is of one row; of a call's more rows each sees that one.
    """
    from transformers import DynamicCache

    class ReadOnly(DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            layer: Any = cache.layers[layer_idx]
            rows = len(key_states)
            keys, values = (tensor.expand(rows, *tensor.shape[1:]) for tensor in (layer.keys, layer.values))
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    view = ReadOnly()
    view.layers = cache.layers
    return view


def packed_inputs(
    backbone: nn.Module, tokens: Tensor, places: Tensor, sees: Tensor, cache: DynamicCache | None, device: torch.device
) -> dict[str, Any]:
    """Return the arguments of a call on one packed row.

    Args:
        backbone: a causal language model of transformers.
        tokens: `[T]`.
        places: `[T]`, each token's number in its text.
        sees: bool `[T, T]`, which of the row's tokens a token sees; of what is in the cache it sees all that its
            layer's window allows.
        cache: what stands before the row.
        device: to put them on.
    """
    cached = 0 if cache is None else cache.get_seq_length()
    masks = attention_of(backbone).masks(sees, places, cached, float_dtype(backbone))
    if isinstance(masks, dict):
        placed: Any = {kind: mask.to(device) for kind, mask in masks.items()}
    else:
        placed = masks.to(device)
    inputs = {"input_ids": tokens[None].to(device), "attention_mask": placed, "position_ids": places[None].to(device)}
    return inputs if cache is None else {**inputs, "past_key_values": cache, "use_cache": True}


def packed_logits(
    backbone: nn.Module,
    tokens: Tensor,
    places: Tensor,
    sees: Tensor,
    start: Tensor,
    columns: Tensor,
    cache: DynamicCache,
) -> Tensor:
    """Return logits `[R, K, V]` of one packed row, behind what is in the cache; most often R is 1.

    Args:
        backbone, tokens, places, sees, cache: as `packed_inputs`.
        start: see `answering`.
        columns: `[K]`, the numbers of the tokens whose logits are computed.
    """
    device = next(backbone.parameters()).device
    skips = "logits_to_keep" in accepted_arguments(backbone)
    inputs = packed_inputs(backbone, tokens, places, sees, cache, device)
    with answering(backbone, start=start):
        logits = backbone(**inputs, **({"logits_to_keep": columns.to(device)} if skips else {})).logits
    return logits if skips else logits[:, columns.to(device)]


def float_dtype(backbone: nn.Module) -> torch.dtype:
    """Return the type of a model's weights, of those that are no packed integers."""
    return next(p.dtype for p in backbone.parameters() if p.is_floating_point())
