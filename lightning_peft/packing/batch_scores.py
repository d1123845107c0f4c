"""The scores of a batch's answers by whichever scorer goes with the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_peft.packing.answers import AnswerScorer
from lightning_peft.packing.choices import ChoiceScorer

Scores = Callable[[dict[str, Tensor]], Tensor]


def by_logprob(backbone: nn.Module) -> Scores:
    """Return a function that scores choices by the exact log-probabilities of their answers behind their prompts.

    Args:
        backbone: a language model of transformers, causal or encoder-decoder. Whatever adapters are active count; make
            a new function whenever they change.
    """
    apart = bool(getattr(getattr(backbone, "config", None), "is_encoder_decoder", False))
    scorer = AnswerScorer(backbone) if apart else ChoiceScorer(backbone)
    return lambda batch: scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
