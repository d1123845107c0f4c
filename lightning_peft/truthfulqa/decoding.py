"""DoLa and RTD: other ways to score a question's choices than by their log-probability."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_peft.editing.dola import DoLa
from lightning_peft.editing.rtd import RTD, final_states
from lightning_peft.tasks.scoring import Scoring
from lightning_peft.truthfulqa.datamodule import TruthfulQADataModule
from lightning_peft.truthfulqa.prompts import statement
from lightning_peft.truthfulqa.questions import Question
from lightning_peft.truthfulqa.scoring import ChoiceScorer

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

    What is stored are the final hidden states at the last token of `Q: question A: answer`, one for each true and each
    false answer to each question outside the test fold, with truth 1 or 0; a choice is looked up in the same form,
    without primer. `p = (k p_rtd + s) / (k + 1)`, where s is the share of true statements stored: as if the whole store
    were one more neighbour, so that a choice all of whose neighbours are false is not impossible. The order of choices
    is that of `p_rtd`.

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
        data = getattr(module.trainer, "datamodule", None)
        if not isinstance(data, TruthfulQADataModule):
            raise ValueError(f"RTD looks up the statements of a TruthfulQADataModule, got {type(data).__name__}.")
        inner, held_out = (_statements(questions) for questions in (data.train_questions, data.val_questions))
        states = _states(module, [(question, answer) for question, answer, _ in inner + held_out])
        truth = torch.tensor([true for *_, true in inner + held_out])
        rtd = copy.copy(self.rtd)
        if self.temperature is None:
            rtd.temperature = _best_temperature(rtd, states, truth, len(inner))
        self.chosen = {"temperature": rtd.temperature}
        rtd.fit(states, truth)
        tested = [(q, i) for q in data.test_questions for i in range(len(q.choices))]
        looked_up = _states(module, [(q.text, q.choices[i].text) for q, i in tested])
        logprobs = _true(rtd, looked_up, truth).log().tolist()
        logprob_of = {(q.id, i): logprob for (q, i), logprob in zip(tested, logprobs, strict=True)}
        scorer = ChoiceScorer(module.backbone)

        def score(batch: Batch) -> Tensor:
            choices = list(zip(batch["group"].tolist(), batch["choice"].tolist(), strict=True))
            if "capability" in batch or not logprob_of.keys() >= set(choices):
                raise ValueError(
                    "RTD scores questions of the test fold only: set the data's val_metrics to False, and "
                    "leave the data's side_effects out."
                )
            scores = torch.tensor([logprob_of[choice] for choice in choices])
            if self.lm_weight:
                model_scores = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
                scores = scores + self.lm_weight * model_scores
            return scores

        return score


def _statements(questions: Sequence[Question]) -> list[tuple[str, str, int]]:
    """Return question, answer and truth of every true and every false answer."""
    return [(q.text, choice.text, choice.mc2) for q in questions for choice in q.choices if choice.mc2 >= 0]


def _states(module: CausalLM, pairs: Sequence[tuple[str, str]]) -> Tensor:
    return final_states(module.backbone, [module.tokenizer(statement(*pair))["input_ids"] for pair in pairs])


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
