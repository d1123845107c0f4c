"""AdaLoRA as one callback, its budget kept by the callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.backbone import counts
from lightning_peft.backbone.defaults import known_targets
from lightning_peft.backbone.targets import Layers, Within, choose_targets
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # importance of each weight, its average, and that of its spread


class AdaLoRA(AdapterCallback):
    """AdaLoRA: `W + P diag(lambda) Q`, whose least important singular values are pruned in training, over all matrices.

    Zhang et al. 2023, arXiv:2303.10512. Trainable parameters: `init_r * (inputs + outputs + 1)` for each adapted
    matrix, of which a budget of `target_r` directions a matrix, on average, remains. Importance is measured from the
    gradients of each optimizer step, whatever the module's loss; the regulariser that keeps P and Q orthogonal acts on
    the gradients, once a step. With manual optimization, leave the gradients until the batch ends.

    Args:
        init_r: the rank of each matrix at the start.
        target_r: the average rank at the end, at most `init_r`.
        alpha: the scaling is `alpha / init_r`.
        dropout: dropout on the input of Q, in training, in [0, 1).
        tinit: optimizer steps before pruning begins.
        tfinal: optimizer steps at the end with the final ranks.
        delta_t: prune every that many steps.
        total_steps: optimizer steps of the whole training; default, the Trainer's estimate. A training that is
            continued from a checkpoint needs the same number as before.
        beta1: the weight of the past in the average importance, in (0, 1).
        beta2: the weight of the past in its uncertainty, in (0, 1).
        orth_reg_weight: the weight of the mean of `||P'P - I||` and `||QQ' - I||` (Frobenius norms) in the loss.
        target_modules: names of the modules to adapt (or ends of names, or a regular expression). Default: peft's
            choice for the model's type, else every linear layer of the backbone.
        layers: see `LoRA`.
        within: see `LoRA`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: ranks or weights out of range; at fit start, a training without an end, or too short for the
            schedule.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import AdaLoRA
        >>> trainer = L.Trainer(callbacks=[AdaLoRA(tinit=200, tfinal=500)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "adalora"
    law_examples: Mapping[str, LawExample] = {"AdaLoRA": LawExample({"init_r": 4, "target_r": 2, "total_steps": 4})}

    def __init__(
        self,
        init_r: int = 12,
        target_r: int = 8,
        alpha: float = 32,
        dropout: float = 0.0,
        tinit: int = 0,
        tfinal: int = 0,
        delta_t: int = 1,
        total_steps: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if not 1 <= target_r <= init_r:
            raise ValueError(f"target_r must be in [1, init_r], got {target_r} with init_r={init_r}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if not (0 < beta1 < 1 and 0 < beta2 < 1 and orth_reg_weight >= 0):
            raise ValueError(
                f"beta1 and beta2 must be in (0, 1) and orth_reg_weight not negative, got {beta1}, {beta2} and "
                f"{orth_reg_weight}."
            )
        if min(tinit, tfinal) < 0 or delta_t < 1:
            raise ValueError(f"tinit and tfinal must be at least 0 and delta_t 1, got {tinit}, {tfinal} and {delta_t}.")
        super().__init__(**options)
        self.init_r, self.target_r, self.alpha, self.dropout = init_r, target_r, alpha, dropout
        self.tinit, self.tfinal, self.delta_t, self.total_steps = tinit, tfinal, delta_t, total_steps
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        self.target_modules, self.layers, self.within = target_modules, layers, within
        self._step = 0  # the last optimizer step that the budget has seen
        self._loaded: dict[str, Any] = {}

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            tinit=self.tinit,
            tfinal=self.tfinal,
            deltaT=self.delta_t,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orth_reg_weight,
            total_step=self.total_steps or self.tinit + self.tfinal + 1,  # until the Trainer knows
            target_modules=self._targets(backbone),
        )

    def _targets(self, backbone: nn.Module) -> list[str] | str:
        from peft.utils import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as KNOWN

        targets: Any = self.target_modules
        if targets is None and self.within is None:
            targets = known_targets(backbone, KNOWN)
        return choose_targets(backbone, targets, self.layers, self.within)

    def trainable_parameters(self, backbone: nn.Module) -> int:
        modules, _ = counts.shapes(backbone, self._targets(backbone), [])
        return sum(self.init_r * (inputs + outputs + 1) for inputs, outputs in modules)

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._tuner.peft_config[self.name].total_step = self._count(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        device = next(self._tuner.model.parameters()).device
        for name in _AVERAGES:
            values = self._loaded.get(name, {})
            setattr(self._tuner.rankallocator, name, {key: value.to(device) for key, value in values.items()})
        self._tuner.peft_config[self.name].rank_pattern = self._loaded.get("rank_pattern")
        self._loaded = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the orthogonal regulariser: gradients are unscaled and complete here, and not clipped."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left, right = ([p for p in side if id(p) in held and p.grad is not None] for side in self._factors())
        if not left + right or self.orth_reg_weight == 0:
            return
        with torch.enable_grad():
            distances = [_distance(p.T) for p in left] + [_distance(p) for p in right]
            gradients = torch.autograd.grad(self.orth_reg_weight * torch.stack(distances).mean(), left + right)
        for parameter, gradient in zip(left + right, gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(gradient)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if self.target_r == self.init_r:
                return  # nothing is to be pruned
            if any(p.grad is None for side in self._factors() for p in side):
                raise ValueError(
                    "AdaLoRA measures importance by gradients after each optimizer step, and they are gone: do not "
                    "zero them before the batch ends."
                )
            self._tuner.update_and_allocate(self._step)

    def state_dict(self) -> dict[str, Any]:
        if self.stack is None or self.name not in self.stack:
            return self._loaded
        averages = {name: dict(getattr(self._tuner.rankallocator, name)) for name in _AVERAGES}
        return self._loaded or {**averages, "rank_pattern": self._tuner.peft_config[self.name].rank_pattern}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    # -- what they do ------------------------------------------------------------------------------------------------

    @property
    def _tuner(self) -> Any:
        assert self.stack is not None
        return self.stack[self.name].tuner

    def _factors(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return all P `[outputs, r]`, and all Q `[r, inputs]`."""
        assert self.stack is not None
        layers = list(self.stack[self.name].injection.layers())
        return [layer.lora_B[self.name] for layer in layers], [layer.lora_A[self.name] for layer in layers]

    def _count(self, trainer: L.Trainer) -> int:
        total = self.total_steps or trainer.estimated_stepping_batches
        if total == float("inf") or total < 0:
            raise ValueError("AdaLoRA spreads its budget over the training, which has no end: give total_steps.")
        needed = max(self.tinit + 1, 2) + self.tfinal  # one to measure by, one to prune
        if total < needed:
            raise ValueError(
                f"The training has {total} optimizer steps, and AdaLoRA with tinit={self.tinit} and tfinal="
                f"{self.tfinal} needs {needed} or more."
            )
        return int(total)


def _distance(rows: Tensor) -> Tensor:
    """Return how far rows `[r, n]` are from orthonormal: the Frobenius norm of their products minus the identity."""
    product = rows @ rows.T
    return (product - torch.eye(len(product), device=product.device, dtype=product.dtype)).norm()
