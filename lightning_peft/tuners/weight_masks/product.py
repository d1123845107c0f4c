"""The product of an input with masked weights, and its straight-through gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def factor(masks: Sequence[Tensor], strengths: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return what several masks together multiply a weight by: the product of `1 - strength (1 - mask)`.

    Args:
        masks: truth values, all of one shape.
        strengths: of each mask.
        dtype: of the result; float32 where that is more precise.
    """
    dtype, product = torch.promote_types(dtype, torch.float32), None
    for mask, strength in zip(masks, strengths, strict=True):
        one = mask.to(dtype) if strength == 1 else torch.where(mask, 1.0, 1.0 - strength).to(dtype)
        product = one if product is None else product * one
    assert product is not None
    return product


class MaskedProduct(torch.autograd.Function):
    """Compute `x (W ∘ f)ᵀ + b`, or only what masking changes in it, `x (W ∘ (f - 1))ᵀ`; f is `factor`'s.

    Gradients of scores are straight-through: `∂L/∂S = ∂L/∂W' ∘ W`, times the strength and the other masks. Between
    forward and backward no weight is held but W itself, and of quantised ones none: they are read again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Callable[[], Tensor],
        bias: Tensor | None,
        whole: bool,
        masks: tuple[Tensor, ...],
        strengths: tuple[float, ...],
        trained: tuple[bool, ...],
        *scores: Tensor | None,
    ) -> Tensor:
        """Return the product.

        Args:
            ctx: autograd's.
            x: `[..., inputs]`.
            weight: W, `[outputs, inputs]`, or what gives it.
            bias: b, `[outputs]`.
            whole: the whole product, instead of what masking changes.
            masks: truth values `[outputs, inputs]`, one or more.
            strengths: of each mask.
            trained: whether its scores get their gradient, or zeros.
            *scores: `[outputs, inputs]` each; None where a mask has none.
        """
        read = isinstance(weight, Tensor)
        ctx.save_for_backward(x, weight if read else None, *masks)
        ctx.weight, ctx.whole, ctx.strengths, ctx.trained = None if read else weight, whole, strengths, trained
        return torch.nn.functional.linear(x, _masked(x, weight, masks, strengths, whole), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *masks = ctx.saved_tensors
        needs = ctx.needs_input_grad
        weight = ctx.weight() if weight is None else weight
        to_x = gradient @ _masked(gradient, weight, masks, ctx.strengths, ctx.whole) if needs[0] else None
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if needs[2] else None
        to_weight: Tensor | None = None
        to_scores: list[Tensor | None] = []
        trains = any(need and trained for need, trained in zip(needs[7:], ctx.trained, strict=True))
        if needs[1] or trains:
            flat = gradient.reshape(-1, gradient.shape[-1])
            by_weight = (flat.T @ x.reshape(-1, x.shape[-1])).to(torch.promote_types(x.dtype, torch.float32))
            if needs[1]:
                change = factor(masks, ctx.strengths, by_weight.dtype)
                to_weight = (by_weight * (change if ctx.whole else change - 1)).to(weight.dtype)
            if trains:
                by_weight *= weight
        for i, (need, trained) in enumerate(zip(needs[7:], ctx.trained, strict=True)):
            if not need:
                to_scores.append(None)
            elif not trained:
                to_scores.append(torch.zeros_like(masks[i], dtype=torch.float32))
            else:
                others = [j for j in range(len(masks)) if j != i]
                scores = by_weight * ctx.strengths[i]
                if others:
                    scores *= factor([masks[j] for j in others], [ctx.strengths[j] for j in others], scores.dtype)
                to_scores.append(scores)
        return to_x, to_weight, to_bias, None, None, None, None, *to_scores


def _masked(
    like: Tensor,
    weight: Tensor | Callable[[], Tensor],
    masks: Sequence[Tensor],
    strengths: Sequence[float],
    whole: bool,
) -> Tensor:
    """Return the masked weight, or the change that masking makes to it, in the precision of `like`."""
    values = weight if isinstance(weight, Tensor) else weight()
    change = factor(masks, strengths, values.dtype)
    return (values * (change if whole else change - 1)).to(like.dtype)
