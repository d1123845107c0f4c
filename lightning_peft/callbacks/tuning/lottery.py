"""Lottery tickets, by iterative magnitude pruning with rewinding, as one callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.sharded import whole
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.multi_phase import MultiPhaseDeltas, assign, mask_of, trained

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig
    from lightning_peft.tuners.weight_deltas.masks import Delta


class LotteryTicket(MultiPhaseDeltas):
    """Train, prune the smallest of the remaining weights, put the others back to where they began, and again.

    Frankle & Carbin 2019, arXiv:1803.03635; rewinding to an early step: Frankle et al. 2020, arXiv:1912.05671; with a
    pretrained start: Chen et al. 2020, arXiv:2007.12223. After the last pruning the ticket is trained. Weights of
    linear layers and convolutions are pruned, those shared with an embedding not; all parameters of the backbone are
    trained. After `n` rounds exactly `round(entries * (1 - prune) ** n)` entries remain; pruned ones are exactly 0 and
    stay so under any weight decay. What stands outside the backbone is trained throughout and is not set back.

    The adapter is a difference to the weights of the start, `-W0` where pruned: switched off it is the dense model of
    the start, and at strength 1 the ticket.

    Args:
        rounds: how often to prune, at least once; there is one training more.
        prune: the fraction of the remaining entries that a round prunes, in (0, 1).
        rewind_steps: the others are put back to their values after this many steps of the first training; 0 is the
            start. These values are then in every checkpoint.
        round_steps: optimizer steps before each pruning. Default: the whole training in equal parts.
        output_layer: name of the output layer, which is pruned by itself; default the model's output embedding.
        output_rate: the output layer is pruned at `output_rate * prune`; in the paper at half the rate.
        criterion: what is pruned first: the smallest `"magnitude"`, or `"random"` entries, as a control.
        seed: of the random control.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for wrong arguments; when training starts, if it would end before the last pruning.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LotteryTicket
        >>> trainer = L.Trainer(callbacks=[LotteryTicket(rounds=4, prune=0.2)], max_steps=500, accelerator="cpu",
        ...                     logger=False, enable_checkpointing=False)
    """

    default_name = "ticket"
    law_examples: Mapping[str, LawExample] = {"LotteryTicket": LawExample({"rounds": 1, "round_steps": 1})}

    def __init__(
        self,
        rounds: int = 5,
        prune: float = 0.2,
        rewind_steps: int = 0,
        round_steps: int | None = None,
        output_layer: str | None = None,
        output_rate: float = 0.5,
        criterion: Literal["magnitude", "random"] = "magnitude",
        seed: int = 0,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if rounds < 1 or rewind_steps < 0 or (round_steps is not None and round_steps <= rewind_steps):
            raise ValueError("LotteryTicket needs at least one round, and rewind_steps from 0 to below round_steps.")
        if not 0.0 < prune < 1.0 or not 0.0 <= output_rate <= 1.0:
            raise ValueError(f"prune must be in (0, 1) and output_rate in [0, 1], got {prune} and {output_rate}.")
        if criterion not in ("magnitude", "random"):
            raise ValueError(f'criterion must be "magnitude" or "random", got {criterion!r}.')
        super().__init__(**options)
        self.rounds, self.prune, self.rewind_steps, self.round_steps = rounds, prune, rewind_steps, round_steps
        self.output_layer, self.output_rate, self.criterion, self.seed = output_layer, output_rate, criterion, seed
        self.steps, self.turn = [], 0
        self.early: dict[str, Tensor] = {}  # the deltas after `rewind_steps`
        self.output: str | None = None  # the name of the output layer's weight

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
        from lightning_peft.tuners.weight_deltas.choice import choose_matrices, choose_parameters

        matrices = choose_matrices(backbone)
        self.output = self._find_output(backbone, matrices)
        return WeightDeltasConfig(target_parameters=choose_parameters(backbone), masked=matrices, pruned=True)

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return counts.everything(backbone)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"early": self.early}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.early = dict(state_dict["early"])

    def plan(self, total: float, epoch: float) -> list[int]:
        if math.isinf(total) and self.round_steps is None:
            raise ValueError(
                "LotteryTicket divides the training into rounds: give max_steps, max_epochs or round_steps."
            )
        each = self.round_steps or int(total) // (self.rounds + 1)
        if each <= self.rewind_steps:
            raise ValueError(f"Each round has {each} steps, too few to rewind to step {self.rewind_steps}.")
        return [self.rewind_steps, *(each * (i + 1) for i in range(self.rounds))]

    def change(self, turn: int) -> bool:
        from lightning_peft.tuners.weight_deltas.masks import keep_largest

        deltas = self.deltas()
        if turn == 0:
            if self.rewind_steps:
                self.early = {delta.full_name: trained(delta).clone() for delta in deltas}
            return False
        matrices = [delta for delta in deltas if delta.mask is not None]
        output = [delta for delta in matrices if delta.full_name == self.output]
        others = [delta for delta in matrices if delta.full_name != self.output]
        for group, rate in ((output, self.output_rate * self.prune), (others, self.prune)):
            count = round(sum(mask_of(delta).numel() for delta in group) * (1 - rate) ** turn)
            masks = keep_largest(self._scores(group), [mask_of(delta) for delta in group], count) if group else []
            for delta, mask in zip(group, masks, strict=True):
                mask_of(delta).copy_(mask)
        for delta in deltas:
            early = self.early.get(delta.full_name)
            value = torch.zeros_like(trained(delta)) if early is None else early.to(delta.value.device)
            assign(delta, value if delta.mask is None else value * delta.mask)
        return True

    def _scores(self, matrices: list[Delta]) -> list[Tensor]:
        """Return how much each entry is worth keeping."""
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed * self.rounds + self.turn)
            return [torch.rand(d.base.shape, generator=generator).to(d.base.device) for d in matrices]
        return [(whole(d.base.detach()) + trained(d)).abs() for d in matrices]

    def _find_output(self, backbone: nn.Module, matrices: list[str]) -> str | None:
        if self.output_layer is not None:
            if f"{self.output_layer}.weight" not in matrices:
                raise ValueError(f"{self.output_layer!r} is not a linear layer or convolution that can be pruned.")
            return f"{self.output_layer}.weight"
        get_output = getattr(backbone, "get_output_embeddings", None)
        module = get_output() if callable(get_output) else None
        names = [name for name, m in backbone.named_modules() if m is module]
        return f"{names[0]}.weight" if names and f"{names[0]}.weight" in matrices else None
