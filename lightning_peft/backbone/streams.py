"""Residual streams that run beside one another through a model's blocks, as one more dimension of their outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def one_stream(model: nn.Module, x: Tensor) -> Tensor:
    """Return what a block gives to the next one's layers, `[B, T, width]`.

    Args:
        model: the backbone.
        x: a block's output: `[B, T, width]`, which is returned; `[B, T, streams, width]` (hyper-connections: their
            mean); or `[streams, B, T, width]` (Gemma 3n's AltUp: the active one, which its layers read).
    """
    if x.dim() != 4:
        return x
    return x[_altup(model).get("altup_active_idx", 0)] if streams_first(model) else x.mean(-2)


def streams_first(model: nn.Module) -> bool:
    """Return whether a model's parallel streams are the first dimension of its blocks' outputs."""
    return "altup_num_inputs" in _altup(model)


def _altup(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return vars(getattr(config, "text_config", None) or config) if config is not None else {}
