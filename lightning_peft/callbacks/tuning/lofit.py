"""LoFiT: heads chosen by learnt vectors of scales, then offsets of those heads, as one callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Unpack

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.backbone import counts
from lightning_peft.backbone.sharded import whole, write
from lightning_peft.callbacks.tuning.head_offsets import check_heads, head_config
from lightning_peft.fitting.adapter_callback import AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.fitting.multi_phase import MultiPhase

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig


class LoFiT(MultiPhase):
    """Localised fine-tuning (Yin et al. 2024, arXiv:2406.01563): learn which heads matter, then train their offsets.

    First every head has a vector of scales, one for each of its features, `A_h [head_dim]`: `z_h + A_h * z_h`, by
    entry, trained with the penalty `l1 * sum(|A|)`. The `share` of heads with the largest `|A_h|_2` is kept; the
    scales are thrown away, the optimizers forget their state, and in the same parameters an offset for each kept head
    is trained, `v_h [head_dim]`: `z_h + v_h`. These are the authors' `attn_A` and `attn_v`. Both start at zero (the
    authors' at normal noise of 0.001), so that the untrained model is the base. A saved folder holds the offsets of
    the kept heads, the same adapter as `HeadOffsets` and `ITI` make; before that the scales of all.

    Args:
        share: of the heads to keep, in (0, 1]; the paper's 3% to 10%. At least one is kept.
        select_steps: optimizer steps of the first phase. Default: half of the training, as in the paper.
        l1: the penalty's weight in the first phase; its gradient is added before clipping, the logged loss is without.
        heads: `(layer, head)` pairs, both 0-based, to choose among; default every head.
        alpha: the strength.
        positions: `"all"` tokens, where the result is a bias and can be merged; only those from the `"answer"`'s
            beginning on; or only `"generated"` ones.
        pattern: see `HeadOffsets`.
        num_heads: for models without a configuration, how many heads enter each projection.
        within: see `HeadOffsets`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at once for wrong arguments; when training starts, if it would end before the second phase.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoFiT
        >>> trainer = L.Trainer(callbacks=[LoFiT(share=0.1)], max_steps=500, accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "lofit"
    law_examples: Mapping[str, LawExample] = {
        "LoFiT": LawExample({"share": 0.5, "select_steps": 1}, ("attention", "transformers"))
    }

    def __init__(
        self,
        share: float = 0.03,
        select_steps: int | None = None,
        l1: float = 5e-4,
        heads: list[tuple[int, int]] | None = None,
        alpha: float = 1.0,
        positions: Literal["all", "answer", "generated"] = "all",
        pattern: str | None = None,
        num_heads: int | None = None,
        within: str | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {share}.")
        if l1 < 0 or (select_steps is not None and select_steps < 1):
            raise ValueError(
                f"LoFiT needs an l1 of at least 0 and at least one step to select, got {l1}, {select_steps}."
            )
        check_heads(heads, positions)
        super().__init__(**options)
        self.share, self.select_steps, self.l1 = share, select_steps, l1
        self.heads, self.alpha, self.positions = heads, alpha, positions
        self.pattern, self.num_heads, self.within = pattern, num_heads, within
        self.steps, self.turn = [], 0
        self.exempt = {"merge": "before heads are chosen they are scaled, which no bias computes"}

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        config = head_config(
            backbone, self.heads, self.alpha, self.positions, self.pattern, self.num_heads, self.within
        )
        config.parameters = "lofit"
        return config

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return sum(counts.attention_inputs(backbone))

    def plan(self, total: float, epoch: float) -> list[int]:
        if math.isinf(total) and self.select_steps is None:
            raise ValueError("LoFiT divides the training into two phases: give max_steps, max_epochs or select_steps.")
        return [self.select_steps or max(1, int(total) // 2)]

    def change(self, turn: int) -> bool:
        from lightning_peft.tuners.head_offsets.config import OFF, OFFSET

        values, roles = self._values(), self._roles()
        norms = torch.cat([whole(value.detach()).norm(dim=1) for value in values])
        if not torch.isfinite(norms).all():
            raise ValueError("No heads can be chosen: a learnt scale is NaN or infinite.")
        chosen = torch.full_like(norms, OFF)
        # sorted on the CPU, where equal norms keep their order on every process
        order = norms.cpu().sort(descending=True, stable=True).indices
        chosen[order[: max(1, round(self.share * len(norms)))].to(chosen.device)] = OFFSET
        for value, role, new in zip(values, roles, chosen.split([len(role) for role in roles]), strict=True):
            role.copy_(new)
            write(value, torch.zeros(value.shape, dtype=value.dtype, device=value.device))
        return True

    def flattened(self) -> bool:
        return any(value.dim() != 2 for value in self._values())

    def has_chosen(self) -> bool:
        from lightning_peft.tuners.head_offsets.config import SCALE

        return not any((role == SCALE).any() for role in self._roles())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.l1 and not self.settled:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for value in self._values():
                if id(value) in held and value.grad is not None:
                    value.grad.add_(value.detach().sign(), alpha=self.l1)

    def _values(self) -> list[nn.Parameter]:
        """Return each layer's vectors `[heads, head_dim]`."""
        return [layer.head_offsets[self.name] for layer in self._layers()]

    def _roles(self) -> list[Tensor]:
        """Return each layer's `[heads]`: the roles of its vectors."""
        return [layer.head_offsets_roles[self.name] for layer in self._layers()]

    def _layers(self) -> list[Any]:
        assert self.stack is not None
        return list(self.stack[self.name].injection.layers())
