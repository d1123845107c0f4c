"""Lottery-ticket sparse fine-tuning (LT-SFT) as one callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.backbone import counts
from lightning_peft.backbone.targets import Layers, Within
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.multi_phase import MultiPhaseDeltas, assign, mask_of, trained

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.tuners.weight_deltas.masks import Delta


class LTSFT(MultiPhaseDeltas):
    """Find by full fine-tuning which few entries change most, go back, and train only those: `W = W0 + mask * delta`.

    Ansell et al. 2022, arXiv:2110.07560. First every chosen parameter is trained; then the `density` of entries with
    the largest `|delta|`, over all parameters together, are kept, everything goes back to `W0`, the optimizers forget
    their state, and only those entries are trained. Exactly `int(density * entries)` are kept, also where some tie, and
    the others are bit-equal to `W0` under any weight decay. What stands outside the backbone is trained throughout and
    is not set back. Sparse adapters of different tasks add up: `theta0 + phi_A + phi_B`. A saved folder holds only
    the kept entries.

    Args:
        density: the fraction of entries to keep, in (0, 1).
        full_steps: optimizer steps of full fine-tuning. Default: half of the training.
        full_epochs: the same in epochs.
        iterations: how many times to go through both phases; each keeps the same share of further entries, and full
            fine-tuning goes on from what the kept ones have learned. After it these go back to the values it began
            with, as in the authors' code, and the rest to `W0`. Then the training must have an end.
        l1: weight of the penalty `l1 * sum(|delta|) / entries`, whose gradient is added before clipping; the logged
            loss is without it.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default everything in the backbone.
        within: only the matrices of the blocks' `"attention"`, or only of their `"mlp"`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for wrong arguments; when training starts, if it would end before the last phase.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LTSFT
        >>> trainer = L.Trainer(callbacks=[LTSFT(density=0.01, full_steps=500)], max_steps=1000, accelerator="cpu",
        ...                     logger=False, enable_checkpointing=False)
    """

    default_name = "lt-sft"
    law_examples: Mapping[str, LawExample] = {"LTSFT": LawExample({"density": 0.05, "full_steps": 1})}

    def __init__(
        self,
        density: float = 0.01,
        full_steps: int | None = None,
        full_epochs: int | None = None,
        iterations: int = 1,
        l1: float = 0.0,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if not 0.0 < density < 1.0:
            raise ValueError(f"density must be in (0, 1), got {density}.")
        if full_steps is not None and full_epochs is not None:
            raise ValueError("LTSFT takes full_steps or full_epochs, not both.")
        if min(full_steps or 1, full_epochs or 1, iterations) < 1 or 0 in (full_steps, full_epochs) or l1 < 0:
            raise ValueError("LTSFT needs at least one full step or epoch, one iteration, and an l1 of at least 0.")
        super().__init__(**options)
        self.density, self.full_steps, self.full_epochs = density, full_steps, full_epochs
        self.iterations, self.l1, self.layers, self.within = iterations, l1, layers, within
        self.steps, self.turn = [], 0
        self.chosen: dict[str, Tensor] = {}  # while all is trained again: the entries chosen so far
        self.kept: dict[str, Tensor] = {}  # and their values when that began, one after another

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
        from lightning_peft.tuners.weight_deltas.choice import choose_parameters

        names = choose_parameters(backbone, self.layers, self.within)
        return WeightDeltasConfig(target_parameters=names, masked=names)

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return counts.everything(backbone)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"chosen": self.chosen, "kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.chosen, self.kept = dict(state_dict["chosen"]), dict(state_dict.get("kept", {}))
        # release 0.1 kept no values
        if "kept" not in state_dict and len(self.steps) > 1 and not self.settled:
            rank_zero_warn(_begins_at_zero(bool(self.chosen), self.turn + 1 < len(self.steps)))

    def plan(self, total: float, epoch: float) -> list[int]:
        limited = self.full_steps is not None or self.full_epochs is not None
        if math.isinf(total) and (self.iterations > 1 or not limited):
            raise ValueError("LTSFT divides the training into phases: give max_steps or max_epochs, or full_steps.")
        each = 0 if self.iterations == 1 else int(total) // self.iterations
        full = self.full_steps or (each or int(total)) // 2 if self.full_epochs is None else self.full_epochs * epoch
        full = max(1, math.ceil(full))
        if each and full >= each:
            raise ValueError(f"{self.iterations} iterations of {each} steps leave none after {full} full steps.")
        turns = [step for i in range(self.iterations) for step in (i * each + full, (i + 1) * each)]
        return turns[:-1]  # the last sparse phase goes on to the end

    def change(self, turn: int) -> bool:
        from lightning_peft.tuners.weight_deltas.masks import keep_largest

        deltas = self.deltas()
        if turn % 2:  # full again: every entry may move, and what is chosen already keeps what it has learned
            self.chosen = {delta.full_name: mask_of(delta).clone() for delta in deltas}
            self.kept = {delta.full_name: trained(delta)[mask_of(delta)] for delta in deltas}
            for delta in deltas:
                mask_of(delta).fill_(True)
            return True
        if turn == 0:  # the callback may have trained another module before
            self.chosen, self.kept = {}, {}
        scores = [trained(delta).abs() for delta in deltas]
        earlier = [self._chosen(delta) for delta in deltas]
        free = [~mask for mask in earlier]
        # the shares of all iterations add up to the whole exactly
        count, i = int(self.density * sum(score.numel() for score in scores)), turn // 2
        share = count * (i + 1) // self.iterations - count * i // self.iterations
        for delta, taken, mask in zip(deltas, keep_largest(scores, free, share), earlier, strict=True):
            mask_of(delta).copy_(taken | mask)
            value = torch.zeros_like(taken, dtype=delta.value.dtype)
            if delta.full_name in self.kept:
                value[mask] = self.kept[delta.full_name].to(value)
            assign(delta, value)
        self.chosen, self.kept = {}, {}
        return True

    def _chosen(self, delta: Delta) -> Tensor:
        """Return where earlier iterations have chosen entries of a parameter."""
        mask = self.chosen.get(delta.full_name)
        return torch.zeros_like(mask_of(delta)) if mask is None else mask.to(mask_of(delta).device)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.l1:
            deltas = self.deltas()
            entries = sum(delta.value.numel() for delta in deltas)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for delta in deltas:
                if id(delta.value) in held and delta.value.grad is not None:
                    delta.value.grad.add_(delta.value.detach().sign(), alpha=self.l1 / entries)


def _begins_at_zero(in_full_phase: bool, more_iterations: bool) -> str:
    """Return how a run goes on whose checkpoint is of a release in which each sparse phase began at zero."""
    now = "its next sparse phase begins at zero as there, because it holds no values of earlier iterations"
    later = "later sparse phases begin at the values that entries of earlier iterations had, as the authors' do"
    parts = ([now] if in_full_phase else []) + ([later] if more_iterations or not in_full_phase else [])
    return f"This checkpoint is of a release in which each sparse phase of LTSFT began at zero: {', and '.join(parts)}."
