"""The configuration of a layer-offsets adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from lightning_peft.positions import check_policy
from lightning_peft.stack.gates import check_gate
from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tokens import PHASES
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets


@dataclass
class LayerOffsetsConfig(WithCard, PeftConfig):
    """A vector for each of some modules, which moves their output `x [B, T, width]`, at the positions of the policy.

    Added, `x + alpha * v`: computed, this is CAA (Rimsky et al. 2023, arXiv:2312.06681), ActAdd (Turner et al. 2023,
    arXiv:2308.10248) or RepE's control (Zou et al. 2023, arXiv:2310.01405). Ablated, `x - alpha * (x · d) d` with d
    the vector at unit length: directional ablation (Arditi et al. 2024, arXiv:2406.11717).

    Args:
        target_modules: the modules, by full name or suffix; a string is a regular expression. Any that are called:
            blocks, attentions, feed-forward parts, matrices, embeddings; of a tuple the first element is moved.
        width: of their output.
        operation: `"add"` or `"ablate"`.
        alpha: the strength; an ablation's is whole at 1.
        positions: as `HeadOffsetsConfig`'s.
        tokens: 1: one vector for every position. More: the first so many tokens of the positions, a phase without a
            window, have a vector each, and the others none.
        gate: None, `"adaptive"` or `"conditional"`: strength by a probe, see `lightning_peft.stack.gates`.
        beta: of an adaptive gate.
        threshold: of a conditional one.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    width: int | None = field(default=None)
    operation: str = field(default="add")
    alpha: float = field(default=1.0)
    positions: str = field(default="answer")
    tokens: int = field(default=1)
    gate: str | None = field(default=None)
    beta: float = field(default=0.0)
    threshold: float = field(default=0.5)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("LAYER_OFFSETS")
        order_targets(self)
        check_policy(self.positions)
        check_gate(self.gate, self.threshold)
        if self.operation not in ("add", "ablate"):
            raise ValueError(f'operation must be "add" or "ablate", got {self.operation!r}.')
        if self.tokens < 1 or (self.tokens > 1 and (self.operation == "ablate" or self.positions not in PHASES)):
            raise ValueError(
                f"tokens={self.tokens} vectors need to be added at the beginning of one of {', '.join(PHASES)}, not "
                f"{'ablated' if self.operation == 'ablate' else f'at {self.positions!r}'}."
            )

    @property
    def policies(self) -> list[str]:
        """The positions of each of the vectors."""
        return [self.positions] if self.tokens == 1 else [f"{self.positions}[{i}:{i + 1}]" for i in range(self.tokens)]
