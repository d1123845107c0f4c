"""SaRA, the fine-tuning of a model's smallest weights under a low-rank term, as one callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.backbone.sharded import whole, write
from lightning_peft.backbone.targets import Layers, Within
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.multi_phase import MultiPhase

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.adapter import Adapter
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.stack.stack import AdapterStack
    from lightning_peft.tuners.weight_deltas.entries import Entries


class SaRA(MultiPhase):
    """Train the entries that are small, `|W0| < threshold`, under a nuclear norm: `W = W0 + M * delta`.

    Hu et al. 2024, arXiv:2409.06633. An entry that is exactly 0 is never chosen: biases that were made as zeros would
    all be. Before each optimizer step the gradient of `lambda_rank * ||W * M||_*`, of one matrix drawn at random, is
    added to the gradients of its entries. After `progressive_iter` steps those among the chosen that have grown to the
    threshold stay as they are, the optimizers forget their state, and the others are trained further. Trainable
    parameters: the entries chosen at the start. A saved folder holds only these.

    Args:
        threshold: train what is smaller, above 0; default 2e-3. What it means depends on the model's scale.
        density: train this share of all entries that are not 0 instead, in (0, 1), the smallest over all parameters.
        progressive_iter: optimizer steps before the second choice; default half of the training, 0 for none.
        lambda_rank: the weight of the nuclear norm; the logged loss is without it.
        rank_min_dim: matrices are drawn whose rows and columns are both more than this.
        seed: of the draws.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default everything in the backbone.
        within: only the matrices of the blocks' `"attention"`, or only of their `"mlp"`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for wrong arguments; when the backbone is known, if nothing is that small or no matrix that
            large; when training starts, if it would end before the second choice.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import SaRA
        >>> trainer = L.Trainer(callbacks=[SaRA(density=0.1)], max_steps=1000, accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "sara"
    law_examples: Mapping[str, LawExample] = {
        "SaRA": LawExample({"density": 0.2, "progressive_iter": 1, "rank_min_dim": 1})
    }

    def __init__(
        self,
        threshold: float | None = None,
        density: float | None = None,
        progressive_iter: int | None = None,
        lambda_rank: float = 5e-4,
        rank_min_dim: int = 64,
        seed: int = 0,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if threshold is not None and density is not None:
            raise ValueError("SaRA takes threshold or density, not both.")
        if (threshold is not None and threshold <= 0) or (density is not None and not 0.0 < density < 1.0):
            raise ValueError(f"threshold must be above 0 and density in (0, 1), got {threshold} and {density}.")
        if min(progressive_iter or 0, lambda_rank, rank_min_dim, seed) < 0:
            raise ValueError("SaRA needs progressive_iter, lambda_rank, rank_min_dim and seed of at least 0.")
        super().__init__(**options)
        self.threshold = 2e-3 if threshold is None and density is None else threshold
        self.density, self.progressive_iter = density, progressive_iter
        self.lambda_rank, self.rank_min_dim, self.seed = lambda_rank, rank_min_dim, seed
        self.layers, self.within = layers, within
        self.steps, self.turn = [], 0
        self.draws = 0  # how many matrices have been drawn
        self.cut = math.nan  # what the chosen entries are below
        self._masks: dict[str, Tensor] = {}  # the choice, until the adapter has it

    def suggested_learning_rate(self) -> float:
        """Return the authors' learning rate for this threshold, `1e-3 * exp(-350 * threshold)`, for AdamW.

        Raises:
            ValueError: the threshold follows from a density, and no backbone has been seen.
        """
        threshold = self.cut if self.threshold is None else self.threshold
        if math.isnan(threshold):
            raise ValueError("The learning rate for a density depends on the backbone: call apply(module) first.")
        return 1e-3 * math.exp(-350.0 * threshold)

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
        from lightning_peft.tuners.weight_deltas.choice import choose_parameters

        return WeightDeltasConfig(target_parameters=choose_parameters(backbone, self.layers, self.within))

    def trainable_parameters(self, backbone: nn.Module) -> int:
        from lightning_peft.tuners.weight_deltas.choice import choose_parameters
        from lightning_peft.tuners.weight_deltas.entries import choose_small

        names = choose_parameters(backbone, self.layers, self.within)
        masks, _ = choose_small(backbone, names, self.threshold, self.density)
        return sum(int(mask.sum()) for mask in masks.values())

    def _configs(self, stack: AdapterStack) -> dict[str, PeftConfig]:
        from lightning_peft.tuners.weight_deltas.entries import choose_small, entries_config

        configs: dict[str, Any] = super()._configs(stack)
        config = configs[self.name]  # in which no head is that is trained whole
        present: Any = stack[self.name].config if self.name in stack else None
        if present is not None and getattr(present, "kept", None) and present.masked:
            return {self.name: present}  # what was chosen stays so, also where the base is merged by now
        self._masks, self.cut = choose_small(stack.backbone, config.target_parameters, self.threshold, self.density)
        if self.lambda_rank and not any(self._is_large(mask) for mask in self._masks.values()):
            raise ValueError(
                f"SaRA has no matrix of more than {self.rank_min_dim} rows and columns for its low-rank term: set "
                "rank_min_dim lower, or lambda_rank=0."
            )
        chosen: Any = entries_config(self._masks)
        chosen.modules_to_save, chosen.task_type = config.modules_to_save, config.task_type
        return {self.name: chosen}

    def _place(self, stack: AdapterStack, name: str, config: PeftConfig) -> Adapter:
        from lightning_peft.tuners.weight_deltas.entries import place

        fresh = name not in stack
        part = super()._place(stack, name, config)
        if fresh:
            self.draws = 0
            place(stack.backbone, name, self._masks)
        self._masks = {}
        return part

    # -- its phases --------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        return self.turn >= len(self.steps)

    def plan(self, total: float, epoch: float) -> list[int]:
        if self.progressive_iter is None and math.isinf(total):
            raise ValueError("SaRA chooses again halfway: give max_steps or max_epochs, or progressive_iter.")
        step = int(total) // 2 if self.progressive_iter is None else self.progressive_iter
        return [step] if step else []

    def change(self, turn: int) -> bool:
        for chosen in self._entries():
            remaining = chosen.trained & (chosen.current().abs() < self.cut)
            chosen.fixed.copy_(whole(chosen.value.detach()))
            chosen.trained.copy_(remaining)
        return True

    def flattened(self) -> bool:
        return any(chosen.value.shape != chosen.trained.shape for chosen in self._entries())

    def has_chosen(self) -> bool:
        return any(not chosen.trained.all() for chosen in self._entries())

    def _entries(self) -> list[Entries]:
        from lightning_peft.tuners.weight_deltas.entries import entries

        assert self.stack is not None
        return entries(self.stack.backbone, self.name)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"draws": self.draws, "cut": self.cut}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.draws, self.cut = int(state_dict["draws"]), float(state_dict["cut"])

    # -- its low-rank term -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.lambda_rank and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError("DeepSpeed hides the gradients that SaRA adds its low-rank term to: use DDP, or FSDP2.")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the nuclear norm: gradients are unscaled and complete here, and not clipped."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if self.lambda_rank else set()
        matrices = [c for c in self._entries() if id(c.value) in held and self._is_large(c.base)] if held else []
        if not matrices:
            return
        # every process draws the same one
        chosen = matrices[int(np.random.default_rng((self.seed, self.draws)).integers(len(matrices)))]
        self.draws += 1
        if chosen.value.grad is None:
            return
        with torch.no_grad():
            matrix = torch.zeros(chosen.base.shape, dtype=chosen.fixed.dtype, device=chosen.fixed.device).reshape(-1)
            matrix[chosen.positions] = chosen.current() * chosen.trained
            gradient = nuclear_norm_gradient(matrix.reshape(chosen.base.shape)).reshape(-1)[chosen.positions]
            added = self.lambda_rank * gradient * chosen.trained
            write(chosen.value.grad, whole(chosen.value.grad) + added)

    def _is_large(self, matrix: Tensor) -> bool:
        return matrix.ndim == 2 and min(matrix.shape) > self.rank_min_dim


def nuclear_norm_gradient(matrix: Tensor) -> Tensor:
    """Return the gradient of the sum of singular values, `U V'`, of a matrix `[rows, columns]`.

    Singular values of at most 1e-7, or of the rounding error of the largest, count as 0.

    Example:
        >>> nuclear_norm_gradient(torch.diag(torch.tensor([-3.0, 2.0, 0.0])))
        tensor([[-1.,  0.,  0.],
                [ 0.,  1.,  0.],
                [ 0.,  0.,  0.]])
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    noise = values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    positive = (values > noise.clamp(min=1e-7)).to(left.dtype)
    return (left * positive) @ right
