"""A linear map whose matrix is a sum of Kronecker products, never formed when it is applied."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KroneckerLinear(nn.Module):
    """A linear map `x [..., inputs] -> x W + bias` with `W = sum_i A_i (x) s_i t_i`; each call is given the `A_i`.

    A parametrised hypercomplex multiplication layer (Zhang et al. 2021, arXiv:2102.08597) with factors of rank one,
    as in Compacter (Mahabadi et al. 2021, arXiv:2106.04647). Parameters: `inputs + outputs`, and a bias.

    Args:
        inputs: number of features, a multiple of n.
        outputs: number of features, a multiple of n.
        n: the number of products, and the size of each `A_i`.
        bias: whether there is one.

    Example:
        >>> layer, rule = KroneckerLinear(8, 4, 2), torch.randn(2, 2, 2)
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(layer(x, rule), x @ layer.matrix(rule).T, atol=1e-6)
        True
    """

    def __init__(self, inputs: int, outputs: int, n: int, bias: bool = True) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(n, inputs // n))
        self.right = nn.Parameter(torch.empty(n, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Glorot-normal factors, each as the matrix `[features / n, 1]` that it is."""
        for factor in (self.left, self.right):
            nn.init.normal_(factor, std=(2.0 / (factor.shape[1] + 1)) ** 0.5)

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """Apply the map to `x [..., inputs]`; `rule [n, n, n]` are the matrices `A_i`."""
        n = len(rule)
        inner = torch.einsum("...ab,ib->...ai", x.unflatten(-1, (n, -1)), self.left)
        y = torch.einsum("...ai,iac,id->...cd", inner, rule, self.right).flatten(-2)
        return y if self.bias is None else y + self.bias

    def matrix(self, rule: Tensor) -> Tensor:
        """Return the matrix `[outputs, inputs]`, as `nn.Linear.weight`."""
        n = len(rule)
        return torch.einsum("iac,ib,id->cdab", rule, self.left, self.right).reshape(n * self.right.shape[1], -1)
