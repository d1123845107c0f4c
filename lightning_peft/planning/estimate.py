"""The plan of a fit: what it would train and the memory it would take, from a module without values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L

from lightning_peft.backbone.quantization import is_quantized, weight_bytes
from lightning_peft.backbone.shapes import shapes_only
from lightning_peft.callbacks.quantize import Quantize
from lightning_peft.fitting.adapter_callback import AdapterCallback
from lightning_peft.fitting.find_backbone import building_hooks, find_backbone
from lightning_peft.fitting.train_modes import set_modes
from lightning_peft.planning.activation_bytes import activation_bytes
from lightning_peft.planning.trained_bytes import (
    bytes_of,
    checkpoint_bytes,
    configured_optimizers,
    first_line,
    optimizer_bytes,
)
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.stack import AdapterStack, find_stacks


@dataclass(frozen=True)
class PlannedAdapter:
    """An adapter of the plan.

    Args:
        name: its name.
        method: peft's configuration class, without "Config".
        modules: last part of the module's name -> how many such modules are adapted.
        parameters: its numbers.
    """

    name: str
    method: str
    modules: dict[str, int]
    parameters: int


@dataclass(frozen=True)
class Plan:
    """The plan of a fit: what it would train, and the memory it would take on one device. All sizes are bytes.

    Args:
        backbone: name and class of what is frozen.
        adapters: innermost first.
        parameters: all of the module's.
        trainable: of these, trained: the adapters, and whatever stands outside the backbone.
        outside: of these, outside the backbone.
        frozen_bytes: of the weights that are not trained, and buffers.
        trainable_bytes: of the weights that are.
        gradient_bytes: of the gradients.
        optimizer: the optimizer's class.
        optimizer_bytes: of its state after a step.
        checkpoint_bytes: of a checkpoint file: what is trained, and the optimizer's state.
        weights_only_bytes: of one saved with `save_weights_only=True`.
        activation_bytes: a bound on what autograd keeps from forward to backward; see `kept_for_backward`. None where
            it cannot be found.
        batch: `[batch size, length]` it holds for.
        notes: what had to be assumed.
    """

    backbone: str
    adapters: tuple[PlannedAdapter, ...]
    parameters: int
    trainable: int
    outside: int
    frozen_bytes: int
    trainable_bytes: int
    gradient_bytes: int
    optimizer: str
    optimizer_bytes: int
    checkpoint_bytes: int
    weights_only_bytes: int
    activation_bytes: int | None
    batch: tuple[int, int]
    notes: tuple[str, ...] = field(default=())

    @property
    def trainable_percent(self) -> float:
        return 100.0 * self.trainable / max(1, self.parameters)

    @property
    def total_bytes(self) -> int:
        """The bytes of weights, gradients, optimizer state and, where known, the bound on activations."""
        parts = (self.frozen_bytes, self.trainable_bytes, self.gradient_bytes, self.optimizer_bytes)
        return sum(parts) + (self.activation_bytes or 0)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON-able dict."""
        return asdict(self) | {"trainable_percent": self.trainable_percent, "total_bytes": self.total_bytes}


def plan(
    module: L.LightningModule,
    callbacks: Sequence[L.Callback],
    batch_size: int = 1,
    length: int = 512,
    precision: str = "32-true",
    whole_batch: bool = False,
) -> Plan:
    """Inject the callbacks' adapters into a module without values, and count.

    Args:
        module: made under `shapes_only()`, so that all its tensors are on the meta device. It is changed.
        callbacks: the Trainer's; those that do not adapt are left out.
        batch_size: rows of a batch, for activations.
        length: tokens of a row.
        precision: the Trainer's.
        whole_batch: the module's own `forward` takes a dict of `input_ids`, `attention_mask` and `labels`; else only
            the backbone is run (or the module, where it has an `example_input_array`).

    Raises:
        ValueError: the module is not on the meta device, no callback adapts it, or as their `setup`.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from torch import nn
        >>> from lightning_peft.callbacks import LoRA
        >>> from lightning_peft.planning.estimate import plan
        >>> from lightning_peft.backbone.shapes import shapes_only
        >>> class Big(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(2**16, 2**16), nn.Linear(2**16, 8))
        ...         self.example_input_array = torch.empty(1, 2**16)
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])
        >>> with shapes_only():
        ...     big = Big()
        >>> found = plan(big, [LoRA(r=1, target_modules=["0"])])
        >>> found.frozen_bytes, found.trainable, found.optimizer_bytes
        (17182228512, 131072, 1048584)
    """
    adapting = [callback for callback in callbacks if isinstance(callback, AdapterCallback)]
    if not adapting:
        raise ValueError("No callback adapts the module: add one such as lightning_peft.callbacks.LoRA.")
    notes: list[str] = []
    with shapes_only():
        for hook in building_hooks(module):
            module.setup("fit") if hook == "setup" else module.configure_model()
        if real := [name for name, p in module.named_parameters() if p.device.type != "meta"]:
            raise ValueError(f"{real[0]} has values: make the module under lightning_peft's shapes_only().")
        module.train()
        for callback in callbacks:
            if isinstance(callback, AdapterCallback | Quantize):
                name = find_backbone(module, callback.backbone)
                assert name is not None  # find_backbone raises where everything is built
                try:
                    if isinstance(callback, AdapterCallback):
                        callback._inject(module, name)
                    else:
                        callback.quantize(module, name)
                except (NotImplementedError, RuntimeError) as error:  # torch's, of a tensor without values
                    raise ValueError(
                        f"{type(callback).__name__} cannot be planned, for it reads values as it is put on the "
                        f"backbone ({first_line(error)})."
                    ) from error
    stacks = find_stacks(module)
    for callback in adapting:
        assert callback.stack is not None
        if callback.computed:
            callback.stack.freeze()
            notes.append(f"{type(callback).__name__} computes its adapter without gradients: nothing is trained.")
    if any(callback.gradient_checkpointing for callback in adapting):
        notes.append("The bound is without gradient checkpointing, which keeps less.")
    if any(getattr(callback, "paged_optimizer", None) for callback in adapting):
        notes.append("The optimizer's state is that of the module's own, which the paged one's does not exceed.")
    for stack in stacks.values():
        set_modes(stack.backbone, any(c.backbone_dropout for c in adapting if c.stack is stack))

    computed = all(callback.computed for callback in adapting)
    trainable = {} if computed else {id(p): p for p in module.parameters() if p.requires_grad}
    inside = {id(p) for stack in stacks.values() for p in stack.backbone.parameters()}
    optimizers = [] if computed else configured_optimizers(module, notes)
    state_bytes = optimizer_bytes(optimizers, list(trainable.values()), notes)
    quantized: list[Any] = [m for m in module.modules() if is_quantized(m)]
    packed: dict[int, int] = {id(m.weight): m.in_features * m.out_features for m in quantized}
    frozen = [p for p in module.parameters() if id(p) not in trainable and id(p) not in packed]
    backbone, stack = next(iter(stacks.items()))
    shape = (batch_size, length)
    activations = 0 if computed else activation_bytes(module, stack.backbone, shape, precision, whole_batch, notes)
    return Plan(
        backbone=f"{backbone or 'the module'} ({type(stack.backbone).__name__})",
        adapters=tuple(_adapter(s, part) for s in stacks.values() for part in s.parts),
        parameters=sum(packed.get(id(p), p.numel()) for p in module.parameters()),
        trainable=sum(p.numel() for p in trainable.values()),
        outside=sum(p.numel() for identity, p in trainable.items() if identity not in inside),
        frozen_bytes=bytes_of(frozen) + bytes_of(module.buffers()) + weight_bytes(module),
        trainable_bytes=bytes_of(trainable.values()),
        gradient_bytes=bytes_of(trainable.values()),
        optimizer=", ".join(type(optimizer).__name__ for optimizer in optimizers) or "none",
        optimizer_bytes=state_bytes,
        checkpoint_bytes=checkpoint_bytes(module, optimizers),
        weights_only_bytes=checkpoint_bytes(module, []),
        activation_bytes=activations,
        batch=shape,
        notes=tuple(notes),
    )


def _adapter(stack: AdapterStack, part: Adapter) -> PlannedAdapter:
    return PlannedAdapter(
        name=part.name,
        method=type(part.config).__name__.removesuffix("Config"),
        modules=dict(Counter(name.rsplit(".", 1)[-1] for name in part.injection.places())),
        parameters=sum(tensor.numel() for tensor in stack.tensors(part).values()),
    )
