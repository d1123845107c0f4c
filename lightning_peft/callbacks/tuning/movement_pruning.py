"""Mask-only movement pruning as one callback."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import lightning as L
import torch
from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.linear_layers import linear_layers
from lightning_peft.backbone.sharded import has_shards
from lightning_peft.backbone.targets import Layers, Within, choose_targets
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.multi_phase import MultiPhase

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.adapter import Adapter
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.stack.stack import AdapterStack
    from lightning_peft.tuners.weight_masks import WeightMasksLayer


class MovementPruning(MultiPhase):
    """Leave the weights as they are and learn which of them to keep: `W' = W ∘ M(S)`, by gradient on the scores S.

    The scores of movement pruning (Sanh, Wolf and Rush 2020, arXiv:2005.07683) on frozen weights, which makes a task a
    mask (Mallya, Davis and Lazebnik 2018, arXiv:1801.06519). Each matrix keeps its `round(density * entries)` entries
    of the highest scores, the first ones where they tie; `∂L/∂S = ∂L/∂W' ∘ W`. The share that is kept falls from
    `initial_density`, by default 1, at which nothing is changed, along the paper's cubic curve, and never rises.
    Trainable parameters: `inputs * outputs` for each adapted matrix, in float32; a saved folder has one bit for each,
    and is trained on only from a checkpoint. Embeddings and heads are not masked; heads outside the backbone are
    trained. Scores take a learning rate of 1e-2 with Adam, which is the module's to give.

    Args:
        density: the share of each matrix that is kept in the end, in (0, 1]. The paper, which trains the weights too,
            goes down to 0.15 and below; frozen weights bear less.
        begin: until this share of the training `initial_density` is kept; about the paper's warm-up.
        end: from this share of the training on, `density` is kept.
        begin_step: `begin` in optimizer steps, counted from 0.
        end_step: `end` in optimizer steps, below those of the training.
        initial_density: the share that is kept at the start.
        criterion: what is dropped first: by trained scores, `"movement"`; the smallest `"magnitude"`, or `"random"`
            entries, as controls in which no mask is trained.
        seed: of the random control.
        target_modules: names of the modules to adapt (or suffixes; a string is a regular expression). Default: every
            linear layer of the backbone's blocks, or of the backbone where it has no blocks.
        layers: which blocks to adapt: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        within: adapt only modules in `"attention"`, or only those in the `"mlp"`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for wrong arguments; when training starts, if it has no end or ends before `end_step`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import MovementPruning
        >>> trainer = L.Trainer(callbacks=[MovementPruning(density=0.9)], max_steps=500, accelerator="cpu",
        ...                     logger=False, enable_checkpointing=False)
    """

    default_name = "movement"
    exempt: Mapping[str, str] = {"complete": "of a trained score a folder has one bit, whether its weight is kept"}
    law_examples: Mapping[str, LawExample] = {  # on and off differ before training only where weights are dropped then
        "MovementPruning": LawExample({"density": 0.25, "initial_density": 0.5, "begin_step": 0, "end_step": 1})
    }

    def __init__(
        self,
        density: float = 0.9,
        begin: float = 0.1,
        end: float = 0.8,
        begin_step: int | None = None,
        end_step: int | None = None,
        initial_density: float = 1.0,
        criterion: Literal["movement", "magnitude", "random"] = "movement",
        seed: int = 0,
        target_modules: list[str] | str | None = None,
        layers: Layers | list[int] | None = None,
        within: Within | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if not 0.0 < density <= initial_density <= 1.0:
            raise ValueError(
                f"density must be in (0, 1] and not above initial_density, got {density} and {initial_density}."
            )
        if not 0.0 <= begin <= end < 1.0:
            raise ValueError(f"begin and end must be in [0, 1), begin first, got {begin} and {end}.")
        if begin_step is not None and begin_step < 0:
            raise ValueError(f"begin_step must not be negative, got {begin_step}.")
        if end_step is not None and end_step < (begin_step or 0):
            raise ValueError(f"end_step must not be below begin_step, got {end_step} and {begin_step or 0}.")
        if criterion not in ("movement", "magnitude", "random"):
            raise ValueError(f'criterion must be "movement", "magnitude" or "random", got {criterion!r}.')
        super().__init__(**options)
        self.density, self.initial_density, self.criterion, self.seed = density, initial_density, criterion, seed
        self.begin, self.end, self.begin_step, self.end_step = begin, end, begin_step, end_step
        self.target_modules, self.layers, self.within = target_modules, layers, within
        self.steps, self.turn = [], 0
        if initial_density < 1:
            self.exempt = {**self.exempt, "identity": f"initial_density={initial_density} drops weights at the start"}
        else:
            self.exempt = {**self.exempt, "off": "before training no weight is dropped, so that on is off"}

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.weight_masks import WeightMasksConfig

        targets = linear_layers(backbone) if self.target_modules is None else self.target_modules
        return WeightMasksConfig(
            target_modules=choose_targets(backbone, targets, self.layers, self.within),
            density=self.initial_density,
            criterion=self.criterion,
            seed=self.seed,
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return sum(inputs * outputs for inputs, outputs in counts.linear(backbone))

    def _place(self, stack: AdapterStack, name: str, config: PeftConfig) -> Adapter:
        if name in stack and getattr(stack[name].config, "packed", False):
            raise ValueError(
                f"Adapter {name!r} was loaded from a folder, which has no scores to train on: resume from a checkpoint "
                "(ckpt_path), or give this callback another name and train masks of its own over those."
            )
        return super()._place(stack, name, config)

    def plan(self, total: float, epoch: float) -> list[int]:
        if math.isinf(total) and (self.begin_step is None or self.end_step is None):
            raise ValueError(
                "MovementPruning lowers the density over the training: give max_steps, max_epochs, or begin_step and "
                "end_step."
            )
        begin = int(self.begin * total) if self.begin_step is None else self.begin_step
        end = int(self.end * total) if self.end_step is None else self.end_step
        return [min(begin, end), end]

    def change(self, turn: int) -> bool:
        return False  # the density is another one at each step; optimizers go on

    def flattened(self) -> bool:
        assert self.stack is not None
        return has_shards(self.stack.backbone)

    def has_chosen(self) -> bool:
        return self.current_density() <= self.density

    def scheduled_density(self, step: int) -> float:
        """Return the share to keep in an optimizer step, counted from 0: the paper's cubic curve."""
        begin, end = self.steps
        if step >= end:
            return self.density
        remaining = 1.0 if step <= begin else 1.0 - (step - begin) / (end - begin)
        return self.density + (self.initial_density - self.density) * remaining**3

    def current_density(self) -> float:
        """Return the share of the masked matrices' entries that is kept now."""
        assert self.stack is not None
        layers = list(_layers(self.stack, self.name))
        kept = sum(int(layer.weight_mask_kept[self.name]) for layer in layers)
        return kept / sum(layer.in_features * layer.out_features for layer in layers)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self.stack is not None
        density = self.density if self.settled else self.scheduled_density(trainer.global_step)
        for layer in _layers(self.stack, self.name):
            layer.keep_at_most(self.name, density)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.criterion != "movement":
            assert self.stack is not None
            for layer in _layers(self.stack, self.name):
                layer.weight_mask_scores[self.name].grad = None  # so that no weight decay moves them either

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log(f"{self.name}_density", self.current_density())

    def report_lines(
        self, module: L.LightningModule, stack: AdapterStack, names: Sequence[str]
    ) -> tuple[list[tuple[str, str]], str]:
        lines, advice = super().report_lines(module, stack, names)
        return [*lines, ("density", f"{self.current_density():.1%} of the masked weights are kept")], advice


def _layers(stack: AdapterStack, name: str) -> Iterator[WeightMasksLayer]:
    """Yield the layers whose masks have scores."""
    return (layer for layer in stack[name].injection.layers() if name in layer.weight_mask_kept)
