"""Truth values, eight a byte. peft is not needed here, which imports all tuners when it is."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Pack truth values `[n]`, eight a byte: `[ceil(n / 8)]`."""
    eights = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).reshape(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, count: int) -> Tensor:
    """Return the first `count` truth values that `pack` put there."""
    eights = bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (eights & 1).bool().reshape(-1)[:count]
