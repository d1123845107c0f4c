"""The configuration of a prefix in attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from lightning_peft.stack.registration import add_peft_type
from lightning_peft.tuners.config import WithCard
from lightning_peft.tuners.targets import order_targets

INITS = ("identity", "paper")


@dataclass
class PrefixConfig(WithCard, PeftConfig):
    """Prefix tuning inside the attention: every query also sees `length` trained keys and values (one softmax).

    Li & Liang 2021, arXiv:2101.00190, without the reparametrisation. The prefix is no token: no position is shifted,
    the cache of keys does not hold it, and it is visible to every query; so padding, causality and caching are those
    of the base model.

    With `init="identity"` the output is `base + tanh(mix) * (prefixed - base)`, with one trained `mix` an attention,
    0 at the start, as LLaMA-Adapter gates its prompt (Zhang et al. 2023, arXiv:2303.16199): the model begins as it
    was, at the price of computing the attention twice. With `"paper"` it is `prefixed`, from a random prefix: that
    already takes attention away from the tokens.

    Args:
        target_modules: of each attention to adapt the matrix that gives its queries; it keeps the parameters. Default:
            all attentions.
        length: number of keys and values.
        init: `"identity"` or `"paper"`.
        std: of the normal prefix at the start.
        gate: UniPELT's gate (Mao et al. 2022, arXiv:2110.07577): the prefix's keys and values are multiplied by
            `sigmoid(w x + b)`, a number for each query token from the attention's input x, with `w` normal, 0.02, at
            the start. The paper takes the mean over the tokens, which sees padding and the future; this does not.
        alpha: the strength: `base + alpha * (…)`.
        count_positions: where the attention has biases of relative positions, as T5's, let the prefix take the first
            positions among the keys, as AdapterHub does: the tokens' keys are then `length` further off than they
            are. By default the tokens keep their biases and the prefix has none.
        exclude_modules: names left out of `target_modules`.
        modules_to_save: other modules to train and save whole, as in every peft method.
        layers_to_transform: the numbers of the blocks in which `target_modules`, given by suffixes, are adapted.
        layers_pattern: the name of the list of blocks, where it is not the first in a module's name.
    """

    target_modules: list[str] | str | None = field(default=None)
    length: int = field(default=30)
    init: str = field(default="identity")
    std: float = field(default=0.02)
    gate: bool = field(default=False)
    alpha: float = field(default=1.0)
    count_positions: bool = field(default=False)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("ATTENTION_PREFIX")
        order_targets(self)
        if self.length < 1:
            raise ValueError(f"The length of a prefix must be at least 1, got {self.length}.")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}.")
