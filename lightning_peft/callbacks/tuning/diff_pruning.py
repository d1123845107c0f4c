"""Diff pruning: a difference whose entries are gated while it is learned, as one callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.optim import ASGD, SGD, Optimizer

from lightning_peft.backbone import counts
from lightning_peft.backbone.sharded import local_part, whole, write
from lightning_peft.backbone.targets import Layers, Within
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.multi_phase import MultiPhaseDeltas, assign, mask_of, trained

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.tuners.weight_deltas.gates import Gate


class DiffPruning(MultiPhaseDeltas):
    """Learn a difference and which of its entries matter, keep those, and train them: `W = W0 + z_t * z * delta`.

    Guo et al. 2021, arXiv:2012.07463. In the first phase each entry has a hard-concrete gate `z`, each parameter one
    gate `z_t` for all of its entries, and `l0` times the expected number of open entries is added to the objective.
    Then the `density` of entries with the largest `|z_t * z * delta|`, over all parameters together, are kept, the
    gates become 1, the optimizers forget their state, and only these entries are trained further, from where they are.
    Exactly `round(density * entries)` are kept, also where some tie; the others are bit-equal to `W0`. In evaluation
    gates are not random. What stands outside the backbone is trained throughout. A saved folder holds a plain
    difference: after the first phase only the kept entries.

    Args:
        density: the fraction of entries to keep, in (0, 1).
        gate_steps: optimizer steps of the first phase. Default: half of the training.
        gate_epochs: the same in epochs.
        l0: the weight of the expected number of entries; the logged loss is without it.
        structured: whether each parameter has its gate.
        gate_start: the gates' logits at the start, at least log(5), so that all are open without noise.
        gate_lr: the learning rate of the logits, where the module's optimizer has its first one; the module's schedule
            scales it too. Weight decay pulls them to their start.
        seed: of the gates' noise.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default everything in the backbone.
        within: only the matrices of the blocks' `"attention"`, or only of their `"mlp"`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for wrong arguments; when training starts, if it would end before the second phase.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import DiffPruning
        >>> trainer = L.Trainer(callbacks=[DiffPruning(gate_steps=500)], max_steps=1000, accelerator="cpu",
        ...                     logger=False, enable_checkpointing=False)
    """

    default_name = "diff-pruning"
    law_examples: Mapping[str, LawExample] = {"DiffPruning": LawExample({"density": 0.05, "gate_steps": 1})}

    def __init__(
        self,
        density: float = 0.005,
        gate_steps: int | None = None,
        gate_epochs: int | None = None,
        l0: float = 1.25e-7,
        structured: bool = True,
        gate_start: float = 5.0,
        gate_lr: float = 0.1,
        seed: int = 0,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if not 0.0 < density < 1.0:
            raise ValueError(f"density must be in (0, 1), got {density}.")
        if gate_steps is not None and gate_epochs is not None:
            raise ValueError("DiffPruning takes gate_steps or gate_epochs, not both.")
        if min(gate_steps or 1, gate_epochs or 1) < 1 or 0 in (gate_steps, gate_epochs):
            raise ValueError("DiffPruning needs at least one step or epoch with gates.")
        if min(l0, seed) < 0 or gate_lr <= 0 or gate_start < math.log(5):
            raise ValueError("DiffPruning needs l0 and seed of at least 0, gate_lr above 0, and gate_start of log(5).")
        super().__init__(**options)
        self.density, self.gate_steps, self.gate_epochs = density, gate_steps, gate_epochs
        self.l0, self.structured, self.gate_start, self.gate_lr, self.seed = l0, structured, gate_start, gate_lr, seed
        self.layers, self.within = layers, within
        self.steps, self.turn = [], 0
        self.draws = 0  # how many batches have had noise

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
        from lightning_peft.tuners.weight_deltas.choice import choose_parameters

        names = choose_parameters(backbone, self.layers, self.within)
        return WeightDeltasConfig(
            target_parameters=names, masked=names, gates=self.gate_start, tensor_gates=self.structured
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return 2 * counts.everything(backbone) + self.structured * len(list(backbone.parameters()))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"draws": self.draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.draws = int(state_dict["draws"])

    # -- its phases --------------------------------------------------------------------------------------------------

    def plan(self, total: float, epoch: float) -> list[int]:
        if math.isinf(total) and self.gate_steps is None and self.gate_epochs is None:
            raise ValueError("DiffPruning divides the training into two phases: give max_steps, or gate_steps.")
        steps = self.gate_steps or int(total) // 2 if self.gate_epochs is None else self.gate_epochs * epoch
        return [max(1, math.ceil(steps))]

    def change(self, turn: int) -> bool:
        from lightning_peft.tuners.weight_deltas.masks import keep_largest

        deltas, gates = self.deltas(), self._gates()
        effective = [trained(delta) * gate.values() for delta, gate in zip(deltas, gates, strict=True)]
        count = self._count()
        everywhere = [mask_of(delta).clone().fill_(True) for delta in deltas]
        masks = keep_largest([value.abs() for value in effective], everywhere, count)
        for delta, gate, value, mask in zip(deltas, gates, effective, masks, strict=True):
            mask_of(delta).copy_(mask)
            assign(delta, torch.where(mask, value, 0.0).to(delta.value.dtype))
            gate.rate.zero_()  # open from now on
            for parameter in gate.parameters():
                write(parameter, torch.zeros_like(whole(parameter)))
        return True

    def _count(self) -> int:
        return round(self.density * sum(mask_of(delta).numel() for delta in self.deltas()))

    def _gates(self) -> list[Gate]:
        from lightning_peft.tuners.weight_deltas.gates import gates

        assert self.stack is not None
        return gates(self.stack.backbone, self.name)

    # -- its gates ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError("DeepSpeed hides the gradients that diff pruning adds its penalty to: use DDP, or FSDP2.")
        if not self._count():
            raise ValueError(f"A density of {self.density} keeps no entry of this backbone: raise it.")
        if self.settled:
            return
        if trainer.global_step == 0:
            self.draws = 0  # the callback may have trained another module before
        groups = {id(p): (o, group) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        for gate in self._gates():
            if not gate.rate:  # a resumed run has it
                gate.rate.fill_(self._rate(*groups[id(gate.entries)]))

    def _rate(self, optimizer: Optimizer, group: dict[str, Any]) -> float:
        """Return by how much a step of the optimizer is to be multiplied, so that logits have their learning rate."""
        step = float(group.get("initial_lr", group.get("lr", 0.0)))
        if step <= 0:
            raise ValueError("The gates' learning rate is relative to the optimizer's first one, which is 0: raise it.")
        ratio = self.gate_lr / step
        # of logits that are `rate` times a parameter, the gradient is multiplied too, which Adam does not see
        return math.sqrt(ratio) if isinstance(optimizer, SGD | ASGD) else ratio

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.settled:
            self._draw()

    def _draw(self) -> None:
        """Draw noise for all gates, the same in every process and on devices of the same kind."""
        gates = self._gates()
        seed = int(np.random.SeedSequence((self.seed, self.draws)).generate_state(1, np.uint64)[0] >> 1)
        generators = {device: torch.Generator(device) for device in {local_part(g.entries).device for g in gates}}
        for generator in generators.values():
            generator.manual_seed(seed)
        for gate in gates:
            gate.draw(generators[local_part(gate.entries).device])
        self.draws += 1

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient: gradients are unscaled and complete here, and not clipped."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.settled or not self.l0:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for gate in self._gates():
            for parameter, gradient in zip(gate.parameters(), gate.penalty_gradients(), strict=True):
                if id(parameter) in held and parameter.grad is not None:
                    write(parameter.grad, whole(parameter.grad) + self.l0 * gradient)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._settle()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._settle()
        super().on_exception(trainer, pl_module, exception)

    def _settle(self) -> None:
        for gate in self._gates() if self.stack is not None and self.name in self.stack else ():
            gate.settle()
