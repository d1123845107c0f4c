"""Score whether a model says the new fact, in other words too, and leaves its neighbours alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import frozen
from lightning_peft.editing.facts.fact import Fact
from lightning_peft.editing.facts.prompt_tokens import Prompt, Tokenizer, encode, object_log_probs
from lightning_peft.editing.intervals import clustered_wilson

KINDS = ("efficacy", "paraphrase", "neighbourhood")


@dataclass(frozen=True)
class Score:
    """The share of prompts on which the right object is the likelier one, and by how much.

    Args:
        success: in [0, 1].
        low, high: its Wilson interval at 95%; prompts of one fact count as one cluster.
        magnitude: the mean of P(right) − P(wrong), each object's probability being the geometric mean over its tokens.
        prompts: how many there were.
    """

    success: float
    low: float
    high: float
    magnitude: float
    prompts: int


@dataclass(frozen=True)
class FactScores:
    """A model's log-probabilities of both objects after every prompt of every fact.

    Right is the new object after the fact's own prompt and its paraphrases, the true one after its neighbours'.

    Args:
        kind: `[N]`, the number in `KINDS` of each prompt.
        fact: `[N]`, the fact it belongs to.
        true: `[N]`, mean log-probability of the true object's tokens, in nats.
        new: `[N]`, of the new one's.
    """

    kind: Tensor
    fact: Tensor
    true: Tensor
    new: Tensor

    def __getitem__(self, kind: str) -> Score:
        """Return the score of one of `KINDS`.

        Raises:
            ValueError: an unknown kind, or no prompt of it.
        """
        if kind not in KINDS:
            raise ValueError(f"A score is one of {', '.join(KINDS)}, got {kind!r}.")
        rows = self.kind == KINDS.index(kind)
        if not rows.any():
            raise ValueError(f"The facts have no prompt for {kind}: give them paraphrases and neighbours.")
        right, wrong = (self.true, self.new) if kind == "neighbourhood" else (self.new, self.true)
        right, wrong = right[rows].double(), wrong[rows].double()
        success = (right > wrong).double()
        magnitude = float((right.exp() - wrong.exp()).mean())
        return Score(float(success.mean()), *clustered_wilson(success, self.fact[rows]), magnitude, int(rows.sum()))

    @property
    def overall(self) -> float:
        """The harmonic mean of the three successes, which is 0 where one of them is."""
        successes = [self[kind].success for kind in KINDS]
        return 0.0 if min(successes) == 0 else len(successes) / sum(1 / success for success in successes)

    def __add__(self, other: FactScores) -> FactScores:
        """Join the scores of two sets of facts."""
        shift = int(self.fact.max()) + 1 if len(self.fact) else 0
        ours, theirs = (
            (self.kind, self.fact, self.true, self.new),
            (other.kind, other.fact + shift, other.true, other.new),
        )
        return FactScores(*(torch.cat(pair) for pair in zip(ours, theirs, strict=True)))


@torch.no_grad()
def score_facts(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact], batch_size: int = 16) -> FactScores:
    """Ask a model for both objects after every prompt of every fact (Meng et al. 2022, arXiv:2202.05262, §3.4).

    Args:
        model: a causal language model; whatever adapter is active counts.
        tokenizer: its (fast) tokenizer.
        facts: with paraphrases and neighbours.
        batch_size: prompts a batch.
    """
    pairs: list[tuple[int, int, Prompt, Prompt]] = []
    for number, fact in enumerate(facts):
        named = [(0, fact.relation, fact.subject)]
        named += [(1, template, fact.subject) for template in fact.paraphrases]
        named += [(2, fact.relation, neighbour) for neighbour in fact.neighbours]
        for kind, template, subject in named:
            pairs.append((kind, number, Prompt(template, subject, fact.true), Prompt(template, subject, fact.new)))
    prompts = [prompt for *_, true, new in pairs for prompt in (true, new)]
    log_probs, order = torch.zeros(len(prompts)), sorted(range(len(prompts)), key=lambda i: len(prompts[i].text))
    with frozen(model):
        for begin in range(0, len(prompts), batch_size):
            rows = order[begin : begin + batch_size]
            encoded = encode(tokenizer, [prompts[i] for i in rows], next(model.parameters()).device)
            log_probs[rows] = object_log_probs(model, encoded).cpu()
    kinds, numbers = torch.tensor([kind for kind, *_ in pairs]), torch.tensor([number for _, number, *_ in pairs])
    return FactScores(kinds, numbers, log_probs[0::2], log_probs[1::2])
