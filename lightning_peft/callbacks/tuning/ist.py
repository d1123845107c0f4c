"""Importance-aware sparse tuning over any method that adapts blocks, as one callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.callbacks.tuning.bottleneck import Pfeiffer
from lightning_peft.callbacks.tuning.lora import LoRA
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.alive import Reached
from lightning_peft.fitting.around import Around
from lightning_peft.fitting.block_adapters import BlockAdapter, by_block, has_dial, suppressed
from lightning_peft.fitting.importance import draw, draw_suppressed, draw_trained, updated
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.quiet_step import check_measurable, quiet_loss
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import AdapterStack

__all__ = ["IST"]


class IST(Around):
    """Train, in each step, only the adapters of a few blocks, drawn by how much each block is found to matter.

    Yao et al. 2024, arXiv:2410.11772. Before every optimizer step a quarter of the blocks is drawn, in proportion to
    `sigmoid(-I)`; the adapters of the others stay as they are, weight decay and the optimizer's averages included. I
    begins at 0. Every ten steps it is scored: three distinct sets of half of the blocks, drawn in proportion to
    `sigmoid(I)`, have their adapters' strength multiplied by .25; the loss that the module's own `training_step` gives
    then, in evaluation mode, on the batch that comes next, moves I of these blocks, up where the loss is smaller.

    What is trained, saved and exported is the method's. Parameters of it that stand in no block, or that blocks share,
    and task heads are trained in every step.

    Args:
        method: the callback that says what is trained; default `LoRA()`. It is not given to the Trainer itself.
        sampling: `"importance"`; or `"uniform"`, the control: all blocks alike, and nothing is scored.
        freeze: leave the adapters that are not drawn out of backward too, which saves time and memory, on one device.
            By default their gradients are computed and dropped, as several devices need it; the result is the same.
        share: of the blocks, that a step trains; rounded down, at least one.
        suppressed_share: of the blocks, in each set; rounded down, at least one.
        suppression: what their strength is multiplied by, in [0, 1).
        sets: that are tried in each scoring.
        score_every_n_steps: optimizer steps from one scoring to the next.
        rate: by which a scoring moves I.
        seed: of the draws; default, torch's seed when training starts.
        **options: see `AdapterOptions`; where one is not given, it is the method's own.

    Raises:
        ValueError: at once, a share or number out of range, or a method that is computed or has a schedule of its own;
            at fit start, a method with fewer than two blocks of its own, an adapter without a dial, a module that
            optimizes by hand (both but for `"uniform"`), `freeze` on several devices, or sharded optimizers.
        AdapterError: on resuming, where the checkpoint's blocks are others.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import IST, LoRA
        >>> trainer = L.Trainer(callbacks=[IST(LoRA(r=8))], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "ist"
    law_examples: Mapping[str, LawExample] = {
        "IST": LawExample({"method": LoRA(r=2, alpha=4), "score_every_n_steps": 1}),
        "IST of Pfeiffer": LawExample(
            {"method": Pfeiffer(size=4), "freeze": True, "score_every_n_steps": 1}, ("mlp", "stream")
        ),
    }

    def __init__(
        self,
        method: AdapterCallback | None = None,
        sampling: Literal["importance", "uniform"] = "importance",
        freeze: bool = False,
        share: float = 0.25,
        suppressed_share: float = 0.5,
        suppression: float = 0.25,
        sets: int = 3,
        score_every_n_steps: int = 10,
        rate: float = 10.0,
        seed: int | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if sampling not in ("importance", "uniform"):
            raise ValueError(f'sampling must be "importance" or "uniform", got {sampling!r}.')
        if not 0.0 < share <= 1.0 or not 0.0 < suppressed_share < 1.0 or not 0.0 <= suppression < 1.0:
            raise ValueError(
                "share must be in (0, 1], suppressed_share in (0, 1) and suppression in [0, 1), got "
                f"{share}, {suppressed_share} and {suppression}."
            )
        if sets < 2 or score_every_n_steps < 1 or rate <= 0:
            raise ValueError(
                "IST needs two sets to compare or more, a scoring every step at most and a rate above 0, got "
                f"sets={sets}, score_every_n_steps={score_every_n_steps} and rate={rate}."
            )
        super().__init__(LoRA() if method is None else method, **options)
        self.sampling, self.freeze, self.share, self.seed = sampling, freeze, share, seed
        self.suppressed_share, self.suppression, self.sets = suppressed_share, suppression, sets
        self.score_every_n_steps, self.rate = score_every_n_steps, rate
        self.blocks: list[BlockAdapter] = []
        self._restored: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        self.importance = torch.zeros(0, dtype=torch.float64)  # I of each block; the larger, the less it matters
        self.drawn: list[int] = []  # the blocks that this step trains
        self._step = -1  # for which they were drawn
        self._generator = torch.Generator()

    # -- Lightning's hooks, in the order in which they run -----------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.blocks, self._restored = [], {}  # the callback may have trained another module before
            self._begin()
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._restored = dict(state_dict)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        assert self.stack is not None
        self._check(trainer, pl_module, self.stack)
        self.blocks = by_block(self.stack, self.names)
        if len(self.blocks) < 2:
            raise ValueError(
                f"IST draws blocks, and what {type(self.method).__name__} trains stands in {len(self.blocks)} of "
                f"{type(self.stack.backbone).__name__}'s, nothing of it shared with others: give it a method that "
                "adapts each of several blocks."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.sampling == "importance":
            self.importance = torch.zeros(len(self.blocks), dtype=torch.float64)
        self._generator.manual_seed(torch.initial_seed() if self.seed is None else self.seed)
        if restored := self._restored:
            if restored["blocks"] != [block.name for block in self.blocks]:
                raise AdapterError(
                    f"The checkpoint's IST has {len(restored['blocks'])} blocks, and this one adapts "
                    f"{len(self.blocks)} or others: continue with the method it was trained with."
                )
            if self.sampling == "importance" and len(restored["importance"]):
                self.importance = restored["importance"].clone()
            self._generator.set_state(restored["generator"])
            self.drawn, self._step = list(restored["drawn"]), int(restored["step"])
            self._restored = {}
        if self.freeze:
            # what is not drawn is idle; it is missed where it is not reached in a step that draws it
            inside = {name for block in self.blocks for name in block.parameters}
            others = {name: p for name, p in self.method._parameters.items() if name not in inside}
            self.method._reached = Reached(others)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self.sampling == "importance" and self._step and self._step % self.score_every_n_steps == 0:
                self._score(trainer, pl_module, batch, batch_idx)
            self.drawn = trainer.strategy.broadcast(self._draw())
        if self.freeze:
            for parameter in self._idle():
                parameter.requires_grad_(False)
            for number in self.drawn:
                self.method._reached.wait_for(self.blocks[number].parameters)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of what was not drawn: before they are clipped, so that they count in no norm."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        for parameter in self._idle():
            parameter.grad = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._thaw()  # checkpoints, averages and validation see all that is trained
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._thaw()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "blocks": [block.name for block in self.blocks],
            "importance": self.importance,
            "generator": self._generator.get_state(),
            "drawn": self.drawn,
            "step": self._step,
        }

    def report_lines(
        self, module: L.LightningModule, stack: AdapterStack, names: Sequence[str]
    ) -> tuple[list[tuple[str, str]], str]:
        lines, advice = super().report_lines(module, stack, names)
        if self.sampling == "importance" and len(self.importance):
            order = self.importance.argsort(stable=True).tolist()
            ranked = [f"{self.blocks[i].name} ({self.importance[i]:+.2f})" for i in (*order[:2], *order[-2:])]
            lines.append(("blocks", f"matter most: {', '.join(ranked[:2])}; least: {', '.join(ranked[:-3:-1])}"))
        return lines, advice

    # -- what they do ------------------------------------------------------------------------------------------------

    def _check(self, trainer: L.Trainer, module: L.LightningModule, stack: AdapterStack) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            kind = type(trainer.strategy).__name__
            raise ValueError(f"IST leaves single parameters out of a step, which {kind} has made one of: use DDP.")
        if self.freeze and trainer.world_size > 1:
            raise ValueError(
                "IST(freeze=True) trains other parameters in each step, for which several devices do not wait: leave "
                "freeze out, or use one device."
            )
        if self.sampling == "importance":
            check_measurable(module, "IST")
            for part in (stack[name] for name in self.names):
                if not has_dial(part):
                    raise ValueError(
                        f"IST turns adapters down to see which blocks matter, and {part.name!r} "
                        f'({type(part.config).__name__}) has no dial: use sampling="uniform".'
                    )

    def _draw(self) -> list[int]:
        count = _some(self.share, len(self.blocks))
        if self.sampling == "uniform":
            return draw(torch.ones(len(self.blocks), dtype=torch.float64), count, self._generator)
        return draw_trained(self.importance, count, self._generator)

    def _score(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the loss of this batch with sets of blocks turned down, and move their importance."""
        assert self.stack is not None
        size = _some(self.suppressed_share, len(self.blocks))
        sets = draw_suppressed(self.importance, size, self.sets, self._generator)
        sets, losses = trainer.strategy.broadcast(sets), list[float]()
        for numbers in sets:
            with suppressed(self.stack, self.names, [self.blocks[i] for i in numbers], self.suppression):
                loss = quiet_loss(trainer, module, batch, batch_idx)
            losses.append(float("nan") if loss is None else loss)
        mean = trainer.strategy.reduce(torch.tensor(losses, device=module.device), reduce_op="mean")
        assert isinstance(mean, Tensor)
        self.importance = updated(self.importance, sets, mean.tolist(), self.rate)
        if trainer.is_global_zero:
            scores = {
                f"importance/{block.name}": float(i) for block, i in zip(self.blocks, self.importance, strict=True)
            }
            for logger in trainer.loggers:
                logger.log_metrics(scores, step=trainer.global_step)

    def _idle(self) -> list[torch.nn.Parameter]:
        """Return the parameters that this step does not train."""
        return [p for i, block in enumerate(self.blocks) if i not in self.drawn for p in block.parameters.values()]

    def _thaw(self) -> None:
        if self.freeze:
            for parameter in self._idle():
                parameter.requires_grad_(True)


def _some(share: float, blocks: int) -> int:
    return max(1, int(share * blocks))
