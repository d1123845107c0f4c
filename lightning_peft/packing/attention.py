"""How far back a model's layers see, and the masks that keep a packed row's tokens to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_DEPENDS_ON_LENGTH = ("dynamic", "longrope")  # rotations that are others in longer texts


@dataclass(frozen=True)
class Span:
    """How far back the tokens of a layer see in their own text.

    Args:
        window: the tokens that a token sees, itself included (sliding attention); None: all before it.
        chunk: the tokens of a chunk, of which a token sees its own alone (chunked attention); None: all before it.
    """

    window: int | None = None
    chunk: int | None = None

    @property
    def tokens(self) -> float:
        """The length of the longest text of which nothing is cut off."""
        return min(self.window or math.inf, self.chunk or math.inf)

    def within(self, places: Tensor, seen: Tensor) -> Tensor:
        """Return whether tokens at `places [T]` of their texts see as far back as `seen [S]`, bool `[T, S]`."""
        near = torch.ones(len(places), len(seen), dtype=torch.bool)
        if self.window is not None:
            near &= places[:, None] - seen < self.window
        if self.chunk is not None:
            near &= places[:, None] // self.chunk == seen // self.chunk
        return near


@dataclass(frozen=True)
class Attention:
    """How far back each kind of a model's layers sees, and up to what length its texts can be packed.

    Args:
        spans: by kind of layer, as `config.layer_types` calls it.
        longest_text: tokens of a text, beyond which a model rotates all its keys otherwise than in shorter texts, so
            that texts of several lengths cannot stand together.
        longest_row: tokens of a row with what stands before it in the cache, beyond which a model counts the tokens
            of the row, and not those of a text, in some layer.
    """

    spans: Mapping[str, Span]
    longest_text: float = math.inf
    longest_row: float = math.inf

    @property
    def whole(self) -> float:
        """The length of the longest text in which every layer sees everything."""
        return min(span.tokens for span in self.spans.values())

    def masks(self, sees: Tensor, places: Tensor, cached: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Return the mask of a packed row as transformers takes it, added to the attention scores.

        Args:
            sees: bool `[T, T]`, which of the row's tokens a token sees.
            places: `[T]`, each token's number in its text.
            cached: how many tokens stand before the row, the first ones of each of its texts.
            dtype: of the model.

        Returns:
            `[1, 1, T, cached + T]`; by kind of layer where they see differently far back in these texts.
        """
        sees = torch.cat([torch.ones(len(sees), cached, dtype=torch.bool), sees], dim=1)
        if not len(places) or int(places.max()) < self.whole:
            return _additive(sees, dtype)
        seen = torch.cat([torch.arange(cached), places])
        masks = {kind: _additive(sees & span.within(places, seen), dtype) for kind, span in self.spans.items()}
        return masks if len(masks) > 1 or "" not in masks else masks[""]


def attention_of(backbone: nn.Module) -> Attention:
    """Return how far back the layers of a language model of transformers see, by its configuration.

    Example:
        >>> from transformers import Gemma2Config, Gemma2ForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
        >>> model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_hidden_layers=2, vocab_size=9, sliding_window=4))
        >>> attention_of(model).spans
        {'sliding_attention': Span(window=4, chunk=None), 'full_attention': Span(window=None, chunk=None)}
    """
    config: Any = getattr(backbone, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    by_kind = {"sliding_attention": Span(window=window), "chunked_attention": Span(chunk=chunk)}
    kinds = getattr(config, "layer_types", None)
    if kinds:
        spans = {kind: by_kind.get(kind, Span()) for kind in dict.fromkeys(kinds)}
    else:
        spans = {"": Span(window, None if window else chunk)}  # as transformers chooses between them
    text = (limit for rope in _rotations(config) if (limit := _same_rotation(rope, config)) is not None)
    return Attention(spans, min(text, default=math.inf), _same_counting(config))


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]


def _rotations(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of each rotary embedding, of which there may be one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, Mapping):
        nested = [part for part in parameters.values() if isinstance(part, Mapping)]
        yield from nested if nested and "rope_type" not in parameters else [parameters]


def _same_rotation(rope: Mapping[str, Any], config: Any) -> int | None:
    """Return the length up to which texts are rotated alike; None where all are."""
    if rope.get("rope_type") not in _DEPENDS_ON_LENGTH:
        return None
    original = rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None
    return original or getattr(config, "max_position_embeddings", None)


def _same_counting(config: Any) -> float:
    """Return the length of a row up to which no layer counts its tokens, whatever position ids it is given."""
    limits = [math.inf]
    if getattr(config, "attn_temperature_tuning", None) and hasattr(config, "floor_scale"):  # Llama 4
        limits.append(config.floor_scale - 1)
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        limits.append(config.window_size)
    return min(limits)
