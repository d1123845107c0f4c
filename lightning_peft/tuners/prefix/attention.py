"""Attention that also sees a prefix, through transformers' interface for attention functions.

The former function (eager or sdpa) computes everything: it is given longer keys, values and masks. So grouped
queries, soft caps, position biases and dropout are the model's own, and without an active prefix the call is the
model's own, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from lightning_peft.tuners.prefix.layer import PrefixLayer

_NAME = "lightning_peft_prefix"
_FORMER = ("eager", "sdpa")  # the implementations whose masks are known here


class AttentionConfig:
    """The configuration of an attention with a prefix: the model's, but for the name of its function.

    The model's own configuration is not touched, and masks are made as before.
    """

    _attn_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self.config = config
        self.layers: list[PrefixLayer] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)


def attach(attention: Any, layer: PrefixLayer) -> None:
    """Let the layer's prefixes act in an attention."""
    if not isinstance(attention.config, AttentionConfig):
        attention.config = AttentionConfig(attention.config)
    if layer not in attention.config.layers:
        attention.config.layers.append(layer)


def detach(attention: Any, layer: PrefixLayer) -> None:
    """Undo `attach`; without prefixes the attention has its own configuration again."""
    config = attention.config
    if isinstance(config, AttentionConfig) and layer in config.layers:
        config.layers.remove(layer)
        if not config.layers:
            attention.config = config.config


def check_attention(name: str, attention: nn.Module) -> None:
    """Raise `ValueError` unless a prefix can act in an attention."""
    config: Any = getattr(attention, "config", None)
    forward = inspect.unwrap(type(attention).forward)
    if not hasattr(config, "_attn_implementation") or "_attn_implementation" not in forward.__code__.co_names:
        raise ValueError(
            f"{name} ({type(attention).__name__}) does not ask transformers' AttentionInterface what to run, so no "
            "prefix can be put before its keys: use an attention of transformers, or another method."
        )
    implementation = _former(config)
    if implementation not in _FORMER or getattr(attention, "reorder_and_upcast_attn", False):
        raise ValueError(
            f"{name} runs {implementation!r} attention, and a prefix needs plain eager or sdpa: load the model with "
            'attn_implementation="sdpa".'
        )


def _former(config: Any) -> str:
    """Return the implementation that the model was given."""
    return (config.config if isinstance(config, AttentionConfig) else config)._attn_implementation or "eager"


def prefixed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the former attention, with the active prefixes of this attention.

    Args:
        module: the attention; its configuration is an `AttentionConfig`.
        query: `[B, heads, T, head_dim]`.
        key: `[B, heads_kv, S, head_dim]`, rotated and with the cached ones.
        value: as `key`.
        attention_mask: as the former makes it, `[B or 1, heads or 1, T, S]` or None.
        **kwargs: what else the model gives.

    Returns:
        The output `[B, T, heads, head_dim]` and, where the former gives them, the weights of the tokens.
    """
    config: AttentionConfig = module.config
    implementation = _former(config)
    if implementation not in _FORMER:
        raise ValueError(f"The attention was set to {implementation!r}, and a prefix needs eager or sdpa.")
    eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    former = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    acting = [(layer, name) for layer in config.layers for name in layer.acting()]
    if len(acting) == 1 and acting[0][0].strength(acting[0][1]) is None:
        return _prefixed(former, module, query, key, value, attention_mask, acting[0], kwargs)
    base, weights = former(module, query, key, value, attention_mask, **kwargs)
    out = base
    for layer, name in acting:
        strength = layer.strength(name)
        prefixed, _ = _prefixed(former, module, query, key, value, attention_mask, (layer, name), kwargs)
        change = prefixed - base
        out = out + (change if strength is None else strength * change).to(out.dtype)
    return out, weights


def _prefixed(
    former: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: tuple[PrefixLayer, str],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention over `[prefix; tokens]`, under one softmax."""
    layer, name = prefix
    first_key, first_value, gate = layer.prefix(name, key, value)
    length, size = first_key.shape[2], value.shape[-1]
    kwargs = dict(kwargs)
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = layer.position_bias(name, bias, length)
    is_causal = kwargs.pop("is_causal", None)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = _former(module.config) == "sdpa" and is_causal
    mask = _widen(mask, length, query, key, causal)
    if gate is None:
        key, value = torch.cat([first_key, key], 2), torch.cat([first_value, value], 2)
    else:
        # each query has its own multiple of the prefix: half the features see the tokens, half the prefix
        gate = gate.to(query.dtype)
        query = torch.cat([query, query * gate[:, None]], -1)
        key, value = _halves(first_key, key), _halves(first_value, value)
    out, weights = former(module, query, key, value, mask, **kwargs)
    if gate is not None:
        out = out[..., :size] + gate[:, :, None] * out[..., size:]
    return out, None if weights is None else weights[..., length:]


def _widen(mask: Tensor | None, length: int, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """Return the mask with `length` columns before it that every query sees."""
    if mask is None:
        if not causal or query.shape[2] == 1:
            return None
        # sdpa would have made it, counted from the first key
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([seen(*mask.shape[:-1], length), mask[..., : key.shape[2]]], -1)


def _halves(first: Tensor, states: Tensor) -> Tensor:
    """Return `[0, first; states, 0]`: features of the tokens, then those of the prefix."""
    first = torch.cat([torch.zeros_like(first), first], -1)
    return torch.cat([first, torch.cat([states, torch.zeros_like(states)], -1)], 2)


AttentionInterface.register(_NAME, prefixed_attention)
