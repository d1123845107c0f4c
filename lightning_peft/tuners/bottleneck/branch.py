"""The small network of one bottleneck adapter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft.tuners.bottleneck.config import BottleneckConfig
from lightning_peft.tuners.bottleneck.kronecker import KroneckerLinear
from lightning_peft.tuners.tensor_train import TensorTrain

_Matrix = nn.Linear | KroneckerLinear | TensorTrain

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "swish": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Bottleneck(nn.Module):
    """A network `z [..., inputs] -> gate(z) * scale * up(f(down(z)))`, `[..., outputs]`; see `BottleneckConfig`.

    Args:
        inputs: features of z.
        outputs: features of the result.
        config: everything else.

    Raises:
        ValueError: n does not divide a width.
    """

    def __init__(self, inputs: int, outputs: int, config: BottleneckConfig) -> None:
        super().__init__()
        size, n = config.size_for(outputs), config.kronecker
        for side, features in (("input", inputs), ("output", outputs), ("bottleneck", size)):
            if n and features % n:
                raise ValueError(f"The {side} has {features} features, which kronecker={n} does not divide.")
        self.down: _Matrix
        self.up: _Matrix
        if config.tensor_rank:
            self.down = TensorTrain(inputs, size, config.tensor_rank, config.biases)
            self.up = TensorTrain(size, outputs, config.tensor_rank, config.biases)
        elif n:
            self.down = KroneckerLinear(inputs, size, n, config.biases)
            self.up = KroneckerLinear(size, outputs, n, config.biases)
        else:
            self.down = nn.Linear(inputs, size, config.biases)
            self.up = nn.Linear(size, outputs, config.biases)
        self.activation, self.drop_path = config.activation, config.drop_path
        self.dropout = nn.Dropout(config.dropout)
        scales = {"learned": 1, "channel": outputs}
        self.scale = nn.Parameter(torch.ones(scales[config.scaling])) if config.scaling in scales else None
        self.gate = nn.Linear(inputs, 1) if config.gate else None
        _initialise(self, config.init)

    def forward(self, z: Tensor, rule: Tensor | None = None) -> Tensor:
        """Apply the branch; `rule [n, n, n]` is what all layers of a Kronecker adapter share."""
        shared = () if rule is None else (rule,)
        hidden = self.down(z, *shared)
        if self.activation != "linear":
            hidden = _FUNCTIONS[self.activation](hidden)
        out = self.up(hidden, *shared)
        if self.scale is not None:
            out = out * self.scale
        if self.training and self.drop_path:
            mask = out.new_empty(len(out), *[1] * (out.dim() - 1)).bernoulli_(1 - self.drop_path)
            out = out * mask / (1 - self.drop_path)
        out = self.dropout(out)
        return out if self.gate is None else out * torch.sigmoid(self.gate(z))

    def matrix(self, rule: Tensor | None = None) -> Tensor:
        """Return the whole map as a matrix `[outputs, inputs]`, for a linear one without biases and gate."""
        product = _matrix(self.up, rule) @ _matrix(self.down, rule)
        return product if self.scale is None else product * self.scale[:, None]


def _matrix(module: _Matrix, rule: Tensor | None) -> Tensor:
    if isinstance(module, nn.Linear):
        return module.weight
    if isinstance(module, TensorTrain):
        return module.matrix()
    assert rule is not None
    return module.matrix(rule)


@torch.no_grad()
def _initialise(branch: Bottleneck, init: str) -> None:
    for matrix in (branch.down, branch.up):
        if isinstance(matrix, nn.Linear):
            if init in ("lora", "mam"):
                nn.init.kaiming_uniform_(matrix.weight, a=math.sqrt(5))
            elif init == "bert":
                nn.init.normal_(matrix.weight, std=0.02)
            elif init == "houlsby":
                nn.init.trunc_normal_(matrix.weight, std=0.01, a=-0.02, b=0.02)
            else:
                nn.init.xavier_normal_(matrix.weight)
            if matrix.bias is not None:
                matrix.bias.zero_()
    if init in ("lora", "mam"):
        if isinstance(branch.up, TensorTrain):
            branch.up.zero()
        else:
            nn.init.zeros_(branch.up.right if isinstance(branch.up, KroneckerLinear) else branch.up.weight)
    if branch.gate is not None:
        nn.init.normal_(branch.gate.weight, std=0.02)
        nn.init.zeros_(branch.gate.bias)
