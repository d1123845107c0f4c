"""The strength of an edit at each token: gates, which read a probe at the activations that are edited.

A gate sees one token of one row at a time, so that an edited row does not change with its batch, nor with what is kept
in a cache. Its probe `[..., d + 1]`, weights and then the intercept, is a tensor of the adapter. It fires where the
edit is wanted: with `f` the probe's probability,

| gate | strength | source |
|---|---|---|
| `None` | 1 | |
| `"adaptive"` | `f + beta`; for a truth probe's `p = 1 - f` that is `1 - p + beta` | ACT, arXiv:2406.00034 |
| `"conditional"` | 1 where `f > threshold`, else 0 | after CAST, arXiv:2409.05907 |

ACT is Wang et al. 2024, CAST Lee et al. 2024, which decides once, by the prompt's likeness to a condition; here a probe
decides at every token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.backbone.streams import streams_first
from lightning_peft.positions import Positions

Gate = Literal["adaptive", "conditional"]
GATES: tuple[str, ...] = ("adaptive", "conditional")


def check_gate(gate: str | None, threshold: float = 0.5) -> None:
    """Raise `ValueError` for a gate that does not exist.

    Raises:
        ValueError: an unknown gate, or a threshold that no probability could pass.
    """
    if gate is not None and gate not in GATES:
        raise ValueError(f"gate must be None, {' or '.join(map(repr, GATES))}, got {gate!r}.")
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}.")


def gated(x: Tensor, probe: Tensor, gate: str, beta: float = 0.0, threshold: float = 0.5) -> Tensor:
    """Compute the strength of an edit at each token, `[...]`, in float32.

    Args:
        x: `[..., d]`, the activations before the edit.
        probe: `[d + 1]`, or one for each of some groups, `[G, d + 1]` where x is `[..., G, d]`.
        gate: one of `GATES`.
        beta: what an adaptive strength is at the least, where the probe is sure that no edit is wanted.
        threshold: the probability above which a conditional edit acts.

    Example:
        >>> x, probe = torch.tensor([[0.0], [9.0]]), torch.tensor([-1.0, 2.0])
        >>> gated(x, probe, "adaptive", beta=0.5), gated(x, probe, "conditional")
        (tensor([1.3808, 0.5009]), tensor([1., 0.]))
    """
    probe = probe.to(x.device, torch.float32)
    score = (x.float() * probe[..., :-1]).sum(-1) + probe[..., -1]
    if gate == "adaptive":
        return score.sigmoid() + beta
    return (score > math.log(threshold / (1 - threshold))).float()


def truth_gate(coef: Tensor, intercept: Tensor) -> Tensor:
    """Return the probe of a gate that fires where a truth probe finds untruth: `[..., d + 1]`, float32.

    Args:
        coef: `[..., d]`, a truth probe's weights in the space of the raw activations.
        intercept: `[...]`.
    """
    return -torch.cat([coef, intercept[..., None]], -1).float()


def check_mergeable(adapter: str, positions: str, gate: str | None) -> None:
    """Raise `ValueError` where an edit does not do the same at every token, as weights must."""
    if gate is not None:
        raise ValueError(
            f"Adapter {adapter!r} is gated: its strength is found anew at each token, which no weights can do, so it "
            "cannot be merged."
        )
    if positions != "all":
        raise ValueError(
            f"Adapter {adapter!r} edits only {positions!r} positions; a bias acts at every one, so only "
            'positions="all" can be merged.'
        )


def where(positions: Positions, policy: str, x: Tensor) -> Tensor:
    """Return the policy's mask in the current call, shaped to multiply onto `x [B, T, d]` (or `[B * T, d]`).

    Of parallel streams, see `lightning_peft.backbone.streams`, x has four dimensions.
    """
    return placed(positions.mask(policy), positions, x).to(x.dtype)


def placed(mask: Tensor, positions: Positions, x: Tensor) -> Tensor:
    """Return a mask `[B, T]` shaped to act on `x`, as `where`; bool stays bool."""
    mask = mask.to(x.device)
    if x.dim() == 4 and x.shape[1 if streams_first(positions.model) else 0 :][:2] == mask.shape:
        mask = mask[..., None]  # parallel streams, each of which is moved
        return mask if streams_first(positions.model) else mask[..., None]
    if mask.numel() * x.shape[-1] != x.numel():
        raise ValueError(
            f"The positions of this call have shape {tuple(mask.shape)}, which does not fit activations of shape "
            f"{tuple(x.shape)}."
        )
    return mask.reshape(*x.shape[:-1], 1)
