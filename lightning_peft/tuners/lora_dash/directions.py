"""Choose the singular directions of a weight that a low-rank change has moved most, for their size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.backbone.sharded import whole
from lightning_peft.tuners.lora_dash.layer import LoRADashLayer
from lightning_peft.tuners.singular_values.decomposition import base_weight, singular_vectors


@torch.no_grad()
def task_directions(weight: Tensor, a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` singular directions of a weight with the highest change rate.

    The rate of direction i is `|u_iᵀ ΔW v_i| / σ_i` with `ΔW = B A` (Si et al. 2024, arXiv:2409.01035). Directions in
    which the weight is zero to rounding, whose rate is noise, come last; of equal ones the strongest first.

    Args:
        weight: W, `[outputs, inputs]`.
        a: `[r, inputs]`.
        b: `[outputs, r]`.
        count: at most the smaller side.

    Returns:
        U `[outputs, count]` and Vᵀ `[count, inputs]`, in float64, highest rate first.

    Example:
        >>> b, a = torch.tensor([[0.0], [0.1]]), torch.tensor([[0.0, 1.0]])
        >>> u, vt = task_directions(torch.tensor([[9.0, 0.0], [0.0, 1.0]]), a, b, 1)
        >>> (u @ vt).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    outputs, values, inputs = singular_vectors(weight)
    projections = ((outputs.T @ b.to(outputs)) * (inputs @ a.to(inputs).T)).sum(dim=1).abs()
    negligible = values <= values.max() * max(weight.shape) * torch.finfo(torch.float32).eps
    rates = torch.where(negligible, -1.0, projections / values.clamp_min(torch.finfo(values.dtype).tiny))
    # sorted on the CPU, where equal rates keep their order
    chosen = rates.cpu().sort(descending=True, stable=True).indices[:count].to(outputs.device)
    return outputs[:, chosen], inputs[chosen]


@torch.no_grad()
def choose_directions(backbone: nn.Module, adapter: str) -> int:
    """Give each layer of a LoRA-Dash adapter its directions, by what its low-rank part has learnt until now.

    Their coefficients are set to zero, so that the model computes the same before and after. Without a Trainer this
    is called once, after the warm-up.

    Args:
        backbone: the model with the adapter.
        adapter: its name.

    Returns:
        How many layers there are.

    Raises:
        ValueError: no layer carries such an adapter.
    """
    layers = [m for m in backbone.modules() if isinstance(m, LoRADashLayer) and adapter in m.dash_A]
    if not layers:
        raise ValueError(f"{type(backbone).__name__} has no LoRA-Dash adapter {adapter!r}.")
    for layer in layers:
        a, b, coefficients = (whole(t[adapter].detach()) for t in (layer.dash_A, layer.dash_B, layer.dash_coefficients))
        outputs, inputs = task_directions(base_weight(layer.get_base_layer()), a, b, len(coefficients))
        layer.dash_coefficients[adapter].zero_()
        layer.dash_outputs[adapter].copy_(outputs)
        layer.dash_inputs[adapter].copy_(inputs)
    return len(layers)
