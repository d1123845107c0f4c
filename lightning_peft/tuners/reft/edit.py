"""The edit that a ReFT adapter makes of one token, as a function of its tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "swish": nn.functional.silu,
    "tanh": torch.tanh,
}


def orthonormal(rows: Tensor) -> Tensor:
    """Return the orthonormal rows that Gram and Schmidt's method makes of these, in order; those that are so stay.

    They are computed anew from free parameters in every call, so that no step of an optimizer can leave them other
    than orthonormal. The lengths of the rows do not matter, so that weight decay does nothing to the result: of
    `torch.nn.utils.parametrizations.orthogonal`, which keeps signs in its parameter, it makes zeros.

    Args:
        rows: `[r, width]`, r at most the width, linearly independent; computed in float32 at the least.

    Example:
        >>> orthonormal(torch.tensor([[2.0, 0.0, 0.0], [5.0, 3.0, 0.0]])).abs()
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
    q, triangle = torch.linalg.qr(precise.T)
    # QR is unique up to signs, which must not jump while the rows move
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q)
    # laid out as W is, so that products with either round alike
    return (q * signs).T.contiguous().to(rows.dtype)


def edit(
    h: Tensor, rows: Tensor, source: Tensor, bias: Tensor, subtract: bool = True, activation: str = "linear"
) -> Tensor:
    """Return the change of hidden states, `rowsᵀ(f(source h + bias) - rows h)`, in the precision of the tensors.

    Args:
        h: `[..., width]`.
        rows: R `[r, width]`.
        source: W `[r, width]`.
        bias: b `[r]`.
        subtract: whether `rows h` is subtracted.
        activation: f, one of `ACTIVATIONS`.

    Example:
        >>> h, rows = torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]])
        >>> edit(h, rows, source=torch.tensor([[0.0, 1.0]]), bias=torch.tensor([0.5]))  # 4 + 0.5 in the place of 3
        tensor([1.5000, 0.0000])
    """
    h = h.to(rows.dtype)
    # the bias is added apart, so that both products round alike and a W that is R leaves nothing
    target = ACTIVATIONS[activation](nn.functional.linear(h, source) + bias)
    if subtract:
        target = target - nn.functional.linear(h, rows)
    return target @ rows
