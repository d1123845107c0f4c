"""A prefix inside every attention, as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

from torch import nn

from lightning_peft.backbone import counts
from lightning_peft.backbone.parts import attentions
from lightning_peft.backbone.projections import projections
from lightning_peft.backbone.targets import Layers
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig


class AttentionPrefix(AdapterCallback):
    """Prefix tuning in place: in each attention every query also sees `length` trained keys and values.

    Li & Liang 2021, arXiv:2101.00190, without the reparametrisation. No position is shifted and the cache of keys
    does not grow. Trainable parameters: `2 * length * heads_kv * head_dim` for each attention, and 1 with
    `init="identity"`; with `gate` also the attention's input width + 1. Works on transformers models that run eager
    or sdpa attention.

    Args:
        length: number of keys and values.
        init: `"identity"`: the change that the prefix makes is multiplied by `tanh(mix)`, trained from 0, so that
            training starts at the base model; `"paper"`: it acts in full from the start, from random values.
        gate: multiply the prefix's keys and values by `sigmoid(w x + b)` of each query token, as UniPELT does.
        layers: which blocks: numbers (0-based), or a rule such as `Layers(last=4)`; default all.
        count_positions: let the prefix take positions in T5's biases of relative positions, as in AdapterHub; see
            `PrefixConfig`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: at `setup`, in one sentence: the backbone is no transformers model with such an attention.

    Example:
        >>> from lightning_peft.callbacks import AttentionPrefix
        >>> AttentionPrefix(length=10).names
        ('attention_prefix',)
    """

    default_name = "attention_prefix"

    exempt: Mapping[str, str] = {"merge": "a softmax over more keys cannot be written into the weights"}
    law_examples: Mapping[str, LawExample] = {
        "AttentionPrefix": LawExample({"length": 3}, ("attention", "transformers"))
    }

    def __init__(
        self,
        length: int = 30,
        init: Literal["identity", "paper"] = "identity",
        gate: bool = False,
        layers: Layers | list[int] | None = None,
        count_positions: bool = False,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if length < 1:
            raise ValueError(f"The length of a prefix must be at least 1, got {length}.")
        if init == "paper":
            self.exempt = {**self.exempt, "identity": "a random prefix takes attention away from the tokens"}
        super().__init__(**options)
        self.length, self.init, self.gate, self.layers = length, init, gate, layers
        self.count_positions = count_positions

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.prefix import PrefixConfig

        targets = [projections(span).query for span in attentions(backbone, self.layers)]
        return PrefixConfig(
            target_modules=targets,
            length=self.length,
            init=self.init,
            gate=self.gate,
            count_positions=self.count_positions,
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        gate = [inputs + 1 if self.gate else 0 for _, inputs in counts.prefixes(backbone)]
        return sum(2 * self.length * keys + 1 for keys, _ in counts.prefixes(backbone)) + sum(gate)
