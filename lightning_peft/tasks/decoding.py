"""DoLa and RTD: other ways to score a unit's choices than by their log-probability."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.editing.dola import DoLa
from lightning_peft.editing.rtd import RTD, final_states
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.tasks.scoring import Scoring, Statements

if TYPE_CHECKING:
    from lightning_peft.models import Batch, CausalLM

_TEMPERATURES = [10.0 ** (n / 2) for n in range(-4, 5)]  # times the median distance to a neighbour


class DoLaScoring(Scoring):
    """Sum the contrasts of a choice's tokens (Chuang et al. 2023), as the authors' script for TruthfulQA does.

    That is `log p_N - log p_j` of each token, not normalised, -1000 where the token is implausible. The defaults are
    the script's. (It also halves scores whose exponentials underflow, for which MC2 here has no need.)

    Args:
        layers, relative_top, normalise, reference: see `lightning_peft.editing.DoLa`.
        implausible: what an implausible token counts.
    """

    def __init__(
        self,
        layers: str | int | list[int] = "high",
        relative_top: float = 0.0,
        implausible: float = -1000.0,
        normalise: bool = False,
        reference: bool = False,
    ) -> None:
        self.layers, self.relative_top, self.implausible = layers, relative_top, implausible
        self.normalise, self.reference = normalise, reference

    def __call__(self, module: CausalLM) -> Callable[[Batch], Tensor]:
        contrasted = DoLa(
            module.backbone,
            self.layers,  # type: ignore[arg-type]
            self.relative_top,
            implausible=self.implausible,
            normalise=self.normalise,
            reference=self.reference,
        )
        scorer = ChoiceScorer(module.backbone, normalise=False)

        def score(batch: Batch) -> Tensor:
            with contrasted:
                return scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])

        return score


class RTDScoring(Scoring):
    """Score a choice by the truth of the nearest statements (Shi et al. 2024): log p(true), by `RTD`.

    What is stored are the final hidden states at the last token of each statement outside the test fold, and a choice
    is looked up in the same form: `statements()` of the data module gives both, see `Statements`. Of TruthfulQA a
    statement is `Q: question A: answer`, without primer. `p = (k p_rtd + s) / (k + 1)`, where s is the share of true
    statements stored: as if the whole store were one more neighbour, so that a choice all of whose neighbours are
    false is not impossible. The order of choices is that of `p_rtd`.

    Args:
        k: neighbours.
        temperature: in units of distance; default the one, of 0.01 to 100 times the median distance of a neighbour, at
            which statements of inner training questions give those of inner validation questions the highest
            likelihood.
        heads: see `lightning_peft.editing.RTD`.
        lm_weight: λ in `log p + λ log p_LM(choice)`, with the model's log-probability of the choice behind its prompt.
            How the paper mixes the two is not known to us; 0, the default, leaves the model's out.
    """

    def __init__(self, k: int = 32, temperature: float | None = None, heads: int = 1, lm_weight: float = 0.0) -> None:
        self.rtd = RTD(k, 1.0 if temperature is None else temperature, heads)
        self.temperature, self.lm_weight = temperature, lm_weight

    def __call__(self, module: CausalLM) -> Callable[[Batch], Tensor]:
        data: Any = getattr(module.trainer, "datamodule", None)
        if not hasattr(data, "statements"):
            raise ValueError(
                f"RTD looks up statements whose truth is known: let {type(data).__name__} have statements(), which "
                "returns lightning_peft.tasks.scoring.Statements."
            )
        statements: Statements = data.statements()
        states, truth = final_states(module.backbone, statements.stored), torch.tensor(statements.truth)
        rtd = copy.copy(self.rtd)
        if self.temperature is None:
            rtd.temperature = _best_temperature(rtd, states, truth, statements.inner)
        self.chosen = {"temperature": rtd.temperature}
        rtd.fit(states, truth)
        looked_up = final_states(module.backbone, list(statements.tested.values()))
        logprobs = _true(rtd, looked_up, truth).log().tolist()
        logprob_of = dict(zip(statements.tested, logprobs, strict=True))
        scorer = ChoiceScorer(module.backbone)

        def score(batch: Batch) -> Tensor:
            choices = list(zip(batch["group"].tolist(), batch["choice"].tolist(), strict=True))
            if statements.others & batch.keys() or not logprob_of.keys() >= set(choices):
                raise ValueError(
                    "RTD scores the choices of the test fold only, which statements() names: measure nothing else with "
                    "it, neither in validation nor side effects."
                )
            scores = torch.tensor([logprob_of[choice] for choice in choices])
            if self.lm_weight:
                model_scores = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
                scores = scores + self.lm_weight * model_scores
            return scores

        return score


def _true(rtd: RTD, states: Tensor, truth: Tensor) -> Tensor:
    """Return the probability of truth, `[M]`, the whole store counting as one more neighbour."""
    return (rtd.k * rtd.predict_proba(states)[:, -1] + truth.float().mean()) / (rtd.k + 1)


def _best_temperature(rtd: RTD, states: Tensor, truth: Tensor, inner: int) -> float:
    """Return the temperature at which the first `inner` statements give the others the highest likelihood."""
    rtd.fit(states[:inner], truth[:inner])
    unit, likelihoods = float(rtd.distances(states[inner:]).median()), {}
    for rtd.temperature in [unit * factor for factor in _TEMPERATURES]:
        true = _true(rtd, states[inner:], truth[:inner])
        likelihoods[rtd.temperature] = float(torch.where(truth[inner:] == 1, true, 1 - true).log().sum())
    return max(likelihoods, key=likelihoods.__getitem__)
