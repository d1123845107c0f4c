"""TruthfulQA as a task of a comparison or a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from lightning_peft.models import CausalLM
from lightning_peft.tasks.choices import ChoiceTask
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.section import Section
from lightning_peft.tasks.split import Split
from lightning_peft.truthfulqa.answers import Answers
from lightning_peft.truthfulqa.answers_section import AnswersSection
from lightning_peft.truthfulqa.choice_scores import ChoiceScores
from lightning_peft.truthfulqa.datamodule import TruthfulQADataModule
from lightning_peft.truthfulqa.metrics import mc0, mc1, mc2, mc3
from lightning_peft.truthfulqa.protocols import ProtocolName, protocol_named
from lightning_peft.truthfulqa.question_records import QuestionRecords
from lightning_peft.truthfulqa.questions import Question, data_hash, load_questions, subset
from lightning_peft.truthfulqa.side_effects import SideEffects
from lightning_peft.truthfulqa.side_effects_section import SideEffectsSection
from lightning_peft.truthfulqa.splits import SplitQuestions

MEASURES = {
    "mc0": Measure(
        "MC0",
        "of the best true and the best false answer, how often the true one is more likely; chance is .5",
        range=(0, 1),
    ),
    "mc1": Measure("MC1", "how often the best true answer is the most likely of all", range=(0, 1)),
    "mc2": Measure("MC2", "probability of the true answers, as a share of that of all answers", range=(0, 1)),
    "mc3": Measure("MC3", "share of the true answers that are more likely than every false one", range=(0, 1)),
}


class TruthfulQA(ChoiceTask):
    """TruthfulQA, or this package's own questions: choices scored by log-probability, and what it costs elsewhere.

    Args:
        model: a causal language model on the Hugging Face hub, or a folder.
        source: `"package"` (this package's own set), `"hub"` (TruthfulQA), or a folder or file of a release.
        limit: take only so many questions, stratified by category.
        num_folds: every question is tested once, by a model that has not seen its fold.
        val_fraction: share of the training questions that hyperparameters are chosen on.
        seed: of folds and splits.
        side_effects: what is measured beside the questions, on the same text for every row.
        protocol: how choices are scored: `"lm_eval"`, `"original"`, `"honest_llama"` or `"chat"`. By the first, ties
            count as right, which would favour ways of scoring that tie often.
        answers: free answers to the questions too; by default none.
        fit_window: where demonstrations with a question are longer than the model can read, leave out as many as need
            be, from the front, and say so in the report.
        dtype: the torch dtype the weights are loaded in.
    """

    measures = MEASURES
    unit = "question"
    label = "truth"

    def __init__(
        self,
        model: str,
        source: str = "package",
        limit: int | None = None,
        num_folds: int = 2,
        val_fraction: float = 0.2,
        seed: int = 0,
        side_effects: SideEffects | None = None,
        protocol: ProtocolName = "original",
        answers: Answers | None = None,
        fit_window: bool = False,
        dtype: str = "float32",
    ) -> None:
        self.model, self.source, self.limit, self.folds = model, source, limit, num_folds
        self.val_fraction, self.seed, self.protocol = val_fraction, seed, protocol
        self.side_effects = SideEffects() if side_effects is None else side_effects
        self.answers, self.fit_window, self.dtype = answers, fit_window, dtype

    @property
    def primary(self) -> str:
        """MC2."""
        return "mc2"

    def module(self) -> CausalLM:
        return CausalLM(self.model, dtype=self.dtype)

    def data(
        self,
        split: Split,
        *,
        edits: bool = False,
        batch_size: int = 16,
        few_shot: int | None = None,
        draw: int = 0,
        units_per_batch: int = 8,
    ) -> TruthfulQADataModule:
        """Return the questions of a split.

        Args:
            split: of the questions.
            edits: train on statements, each with its label and group, and not on the true answers.
            batch_size: rows of a training batch.
            few_shot: number of demonstrations, drawn from the training questions, in place of the 6-shot primer.
            draw: which draw of them.
            units_per_batch: questions of a test batch.
        """
        options: dict[str, Any] = {
            "source": self.source,
            "train": "statements" if edits else "answers",
            "fold": split.fold,
            "num_folds": split.folds,
            "val_fraction": self.val_fraction,
            "seed": split.seed,
            "limit": self.limit,
            "batch_size": batch_size,
            "few_shot": few_shot,
            "draw": draw,
            "questions_per_batch": units_per_batch,
            "protocol": self.protocol,
            "fit_window": self.fit_window,
        }
        if split.inner or split.size is not None:
            return SplitQuestions(split.size, split.inner, **options)
        return TruthfulQADataModule(**options)

    def scores(self) -> ChoiceScores:
        return ChoiceScores(self.choice_scores)

    def questions(self) -> list[Question]:
        """Return all questions, of all folds."""
        questions = load_questions(self.source)
        return questions if self.limit is None else subset(questions, self.limit, self.seed)

    def data_hash(self) -> str:
        """Return a hash of the questions."""
        return data_hash(self.questions())

    def settings(self) -> dict[str, Any]:
        """Return the settings that scores depend on; one that came later is left out where it changes nothing."""
        values = {name: getattr(self, name) for name in ("source", "limit", "val_fraction", "seed", "protocol")}
        values |= {"num_folds": self.folds, "side_effects": asdict(self.side_effects)}
        return values | ({"fit_window": True} if self.fit_window else {})

    def depends_on(self) -> str:
        """Return a hash of the questions and of the neutral text."""
        text = self.side_effects.text()
        return self.data_hash() + (text.sha256 if text else "")

    def check(self) -> None:
        protocol_named(self.protocol)
        if self.folds < 2:
            raise ValueError(f"num_folds must be at least 2, so that tests are on unseen questions, got {self.folds}.")
        effects = self.side_effects
        if 0 < effects.tokens < 2 * effects.length or effects.capability == 1:
            raise ValueError(
                f"side_effects need 2 documents ({2 * effects.length} tokens) and 2 questions for an interval, or 0 of "
                f"either for none, got {effects.tokens} tokens and {effects.capability} questions."
            )
        effects.questions()
        if self.answers is not None:
            self.answers.check()

    @property
    def sections(self) -> Sequence[Section]:
        """Side effects and free answers."""
        return (SideEffectsSection(self), AnswersSection(self))

    @property
    def records(self) -> QuestionRecords:
        """Every choice's log-probability, and side effects."""
        return QuestionRecords(self)

    def choice_scores(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Return MC0 to MC3 of one question, those that it has choices for.

        Args:
            logprobs: `[C]`, in nats.
            batch: `mc0`, `mc1` and `mc2 [C]`: 1 true, 0 false, -1 not among that measure's choices.
        """
        ties = protocol_named(self.protocol).ties
        functions: dict[str, Callable[[Tensor, Tensor], float]] = {
            "mc0": partial(mc0, ties=ties),
            "mc1": partial(mc1, ties=ties),
            "mc2": mc2,
            "mc3": mc3,
        }
        choices = {name: batch["mc2" if name == "mc3" else name] for name in functions}
        return {
            name: function(logprobs, choices[name])
            for name, function in functions.items()
            if {0, 1} <= set(choices[name].tolist())
        }
