"""What a head-offsets adapter needs to know about its model."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from lightning_peft.positions import check_policy
from lightning_peft.tuners.registration import add_peft_type


@dataclass
class HeadOffsetsConfig(PeftConfig):
    """A vector for each of some attention heads, added to the input of the attention output projection.

    With the projection's input `z [B, T, H * head_dim]`, head `h` becomes `z_h + alpha * offset_h` at the positions
    of the policy. Computed, this is inference-time intervention (Li et al. 2023, arXiv:2306.03341); trained from
    zero, it is the second step of LoFiT (Yin et al. 2024, arXiv:2406.01563).

    Args:
        target_modules: the output projections, by name or suffix; a string is a regular expression.
        head_dim: width of one head; the projection's input width must be a multiple of it.
        heads: for each target's full name, the heads (0-based) that have an offset, in place of `target_modules`;
            None means every head of every target.
        alpha: the strength, multiplied onto every offset.
        positions: `"answer"` (from the last prompt token on), `"generated"` (new tokens only), `"prompt"` or `"all"`,
            or a window of one of them, such as `"answer[0:3]"`; see `lightning_peft.tokens`.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
    """

    target_modules: list[str] | str | None = field(default=None)
    head_dim: int | None = field(default=None)
    heads: dict[str, list[int]] | None = field(default=None)
    alpha: float = field(default=1.0)
    positions: str = field(default="answer")
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("HEAD_OFFSETS")
        check_policy(self.positions)
        if self.heads is not None:
            self.target_modules = sorted(self.heads)
