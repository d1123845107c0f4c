"""TruthfulQA as a task of a comparison or a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.models import CausalLM
from lightning_peft.tasks.choices import ChoiceTask
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.split import Split
from lightning_peft.truthfulqa.datamodule import TruthfulQADataModule
from lightning_peft.truthfulqa.metrics import mc0, mc1, mc2, mc3
from lightning_peft.truthfulqa.protocols import ProtocolName, protocol_named
from lightning_peft.truthfulqa.questions import data_hash, load_questions, subset
from lightning_peft.truthfulqa.side_effects import SideEffects

if TYPE_CHECKING:
    from lightning_peft.compare.answers import Answers

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
        protocol: how choices are scored: `"lm_eval"`, `"original"` or `"honest_llama"`. By the first, ties count as
            right, which would favour ways of scoring that tie often.
        answers: free answers to the questions too; by default none.
        fit_window: where demonstrations with a question are longer than the model can read, leave out as many as need
            be, from the front, and say so in the report.
        dtype: the torch dtype the weights are loaded in.
    """

    measures = MEASURES
    unit = "question"

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

    def data(self, split: Split, **row_options: Any) -> TruthfulQADataModule:
        """Return the questions of a split.

        Args:
            split: as the task's.
            **row_options: `edits` (train on statements, with labels and groups), `batch_size`, `few_shot`, `draw`,
                `units_per_batch`.
        """
        options = {"edits": False, "batch_size": 16, "few_shot": None, "draw": 0, "units_per_batch": 8}
        if unknown := row_options.keys() - options.keys():
            raise ValueError(f"TruthfulQA has no row option {', '.join(sorted(unknown))}; it has {', '.join(options)}.")
        options |= row_options
        questions = _InnerQuestions if split.inner else TruthfulQADataModule
        return questions(
            source=self.source,
            train="statements" if options["edits"] else "answers",
            fold=split.fold,
            num_folds=split.folds,
            val_fraction=self.val_fraction,
            seed=split.seed,
            limit=self.limit,
            batch_size=options["batch_size"],
            few_shot=options["few_shot"],
            draw=options["draw"],
            questions_per_batch=options["units_per_batch"],
            protocol=self.protocol,
            fit_window=self.fit_window,
        )

    def depends_on(self) -> str:
        """Return the hash of the questions."""
        questions = load_questions(self.source)
        return data_hash(questions if self.limit is None else subset(questions, self.limit, self.seed))

    def choice_scores(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Return MC0 to MC3 of one question, those that it has choices for.

        Args:
            logprobs: `[C]`, in nats.
            batch: `mc0`, `mc1` and `mc2 [C]`: 1 true, 0 false, -1 not among that measure's choices.
        """
        ties = protocol_named(self.protocol).ties
        functions = {"mc0": partial(mc0, ties=ties), "mc1": partial(mc1, ties=ties), "mc2": mc2, "mc3": mc3}
        choices = {name: batch["mc2" if name == "mc3" else name] for name in functions}
        return {
            name: function(logprobs, choices[name])
            for name, function in functions.items()
            if {0, 1} <= set(choices[name].tolist())
        }


class _InnerQuestions(TruthfulQADataModule):
    """The questions outside a fold: trained on the inner training questions, tested on the inner validation questions.

    Demonstrations are of the inner training questions alone.
    """

    def setup(self, stage: str | None = None) -> None:
        is_set_up = bool(self.test_questions)
        super().setup(stage)
        if not is_set_up:
            self.val_questions, self.test_questions = [], self.val_questions
