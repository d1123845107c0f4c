"""Questions as batches: to tune on, to probe on, to score."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_peft.backbone.window import context_window
from lightning_peft.callbacks.edits.iti import ITI
from lightning_peft.data.batches import LengthGroupedSampler, as_dataset, evenly_mixed, padded, tokenizer_of
from lightning_peft.data.chat_template import check_template, encode_turn
from lightning_peft.effects.slices import text_batches
from lightning_peft.tasks.scoring import Statements
from lightning_peft.truthfulqa.evaluate import Evaluate
from lightning_peft.truthfulqa.evaluation import Batch
from lightning_peft.truthfulqa.fitting import fewer_demonstrations
from lightning_peft.truthfulqa.folds import assign_folds, inner_split
from lightning_peft.truthfulqa.generation import encode_prompts
from lightning_peft.truthfulqa.presets import Prompting
from lightning_peft.truthfulqa.prompts import (
    QA_PRIMER,
    encode_answer,
    encode_pair,
    few_shot_primer,
    question_prompt,
    statement,
)
from lightning_peft.truthfulqa.protocols import Protocol, ProtocolName, protocol_named
from lightning_peft.truthfulqa.questions import Question, data_hash, load_questions, subset
from lightning_peft.truthfulqa.side_effects import CAPABILITY_PRIMER, SideEffects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(TypedDict):
    """A row of a batch before it is padded."""

    input_ids: list[int]
    labels: list[int]
    group: int
    label: NotRequired[int]
    prompt_end: NotRequired[int]


class TruthfulQADataModule(L.LightningDataModule):
    """TruthfulQA (or this package's own questions) in folds: train on all but one, test on that one.

    Batches are dicts of tensors, padded on the right: `input_ids [B, T]`, `attention_mask [B, T]`, `labels [B, T]`
    (-100 outside the answer), `group [B]`, the id of the question a row belongs to, `prompt_end [B]`, the position id
    of the last prompt token, from which the answer is predicted, and of answers and statements `label [B]` (1 true,
    0 false).

    - Training, `train="answers"` (to tune): every true answer to the inner training questions, shuffled,
      rows of like length together.
    - Training, `train="statements"` (to probe): every true and false answer to all training questions, one line
      each, sorted by length; callbacks that probe make their own inner split.
    - Validation: every true answer to the inner validation questions; where metrics are validated too, batches as in
      test, but of these questions, stand evenly among them, so that a limit of batches keeps some of each kind.
      (Training on statements is on these questions too: what is measured of an edit computed so is no forecast.)
    - Test, which `Evaluate` measures: questions of the test fold after the primer, a row is a choice, and `mc0`, `mc1`,
      `mc2 [B]` say what it is to each metric (1 true, 0 false, -1 not among its choices), `choice [B]` which of
      its question's it is, and `strict [B]` whether a tie counts as wrong.
    - Test, where `side_effects` are asked for: then simple questions after a primer of theirs, with `capability [B]`
      in place of these, and batches of neutral text, which have `document [B]` and no labels.
    - Prediction: prompts for free answers to the questions of the test fold, padded on the left, the shortest first;
      each `Answer` says which question it is to. See `generation.encode_prompts`.

    For encoder-decoder models `input_ids [B, T]` are prompts and `labels [B, U]` answers, encoded on their own and
    without an end token, as lm-evaluation-harness does; then there is no `prompt_end`.

    Args:
        source: `"hub"`, `"package"`, or a folder or file; see `load_questions`.
        train: what the training batches hold.
        fold: the fold to test on, from 0.
        num_folds: how many folds.
        val_fraction: share of the training questions held out for validation.
        seed: of folds, splits, order and demonstrations.
        limit: take only so many questions, stratified by category.
        batch_size: rows of a training, validation or prediction batch.
        tokenizer: a tokenizer, or its name or folder; default the LightningModule's `tokenizer`.
        protocol: how choices are scored: `"lm_eval"`, `"original"`, `"honest_llama"` or `"chat"`; see `protocols`.
            By the last, answers to tune on and free answers are turns of a chat too; statements to probe are not.
        primer: what stands before each test question; default the protocol's, the benchmark's 6-shot primer.
        few_shot: use that many demonstrations from the training questions as primer; 0 for none, and no primer.
        draw: which draw of these demonstrations, from 0: they are drawn with seed `seed + draw`.
        num_workers: of the data loaders.
        questions_per_batch: questions of a test batch; a few run faster than each alone, and give the same.
        side_effects: what else is tested; by default nothing.
        prompting: how free answers are asked for, by default with the protocol's instruction; a primer or
            demonstrations from above stand in that prompt too.
        encoder_decoder: whether batches are for an encoder-decoder; default, as the LightningModule's backbone is one.
        val_metrics: whether validation measures choices, and what `side_effects` asks for, beside the loss. True: at
            each validation of a fit too, which takes time, but callbacks may then monitor `val_mc2`. False: never.
            Default: in `trainer.validate` alone, where an `Evaluate`, or the module's own `Evaluation`, measures them.
        fit_window: where demonstrations with a question are longer than the LightningModule's backbone can read (or
            than that number of tokens), leave out as many as need be, from the front: the same number before each
            question.

    Attributes:
        demonstrations: with `fit_window`, once batches of a test or prediction are made: how many stand before its
            questions, and how many were to.
    """

    def __init__(
        self,
        source: str = "hub",
        train: Literal["answers", "statements"] = "answers",
        fold: int = 0,
        num_folds: int = 2,
        val_fraction: float = 0.2,
        seed: int = 0,
        limit: int | None = None,
        batch_size: int = 16,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        primer: str | None = None,
        few_shot: int | None = None,
        draw: int = 0,
        num_workers: int = 0,
        questions_per_batch: int = 8,
        side_effects: SideEffects | None = None,
        prompting: Prompting | None = None,
        protocol: ProtocolName = "lm_eval",
        encoder_decoder: bool | None = None,
        val_metrics: bool | None = None,
        fit_window: bool | int = False,
    ) -> None:
        if train not in ("answers", "statements"):
            raise ValueError(f'train must be "answers" or "statements", got {train!r}.')
        if not 0 <= fold < num_folds:
            raise ValueError(f"fold must be from 0 to {num_folds - 1}, got {fold}.")
        if few_shot is not None and primer is not None:
            raise ValueError("Give either a primer or few_shot, not both.")
        if (few_shot or 0) < 0:
            raise ValueError(f"few_shot must be at least 0, got {few_shot}.")
        if questions_per_batch < 1:
            raise ValueError(f"questions_per_batch must be at least 1, got {questions_per_batch}.")
        super().__init__()
        self.source, self.kind, self.fold, self.num_folds = source, train, fold, num_folds
        self.val_fraction, self.seed, self.limit, self.batch_size = val_fraction, seed, limit, batch_size
        self.tokenizer, self.num_workers = tokenizer, num_workers
        self.primer, self.few_shot, self.draw = primer, few_shot, draw
        self.protocol: Protocol = protocol_named(protocol)
        own = Prompting(instruction=self.protocol.instruction, chat_template=self.protocol.chat)
        self.prompting = own if prompting is None else prompting
        self.encoder_decoder, self.val_metrics = encoder_decoder, val_metrics
        self.questions_per_batch, self.side_effects = questions_per_batch, side_effects
        self.train_questions: list[Question] = []
        self.val_questions: list[Question] = []
        self.test_questions: list[Question] = []
        self.data_hash = ""
        self.fit_window = fit_window
        self.demonstrations: tuple[int, int] | None = None
        self._fitted: dict[Any, tuple[str, int, int]] = {}
        self._set_up_tokenizer: PreTrainedTokenizerBase | None = None
        self._given: list[ITI] = []  # those that have `question_ends` until the end of fit
        self._apart = False  # prompts and answers, as an encoder-decoder reads them

    def setup(self, stage: str | None = None) -> None:
        """Load the questions and split them; the same questions stay where they are when called again.

        The Trainer is given an `Evaluate` where it has none, until its `teardown`, and interventions that take sigma
        over texts which end in a question are given `question_ends`.
        """
        self._set_up_tokenizer = tokenizer_of(self, self.tokenizer)
        self._apart = self._reads_apart() if self.encoder_decoder is None else self.encoder_decoder
        if self._apart and self.side_effects is not None and self.side_effects.tokens:
            raise ValueError("An encoder-decoder has no next token of a text: set side_effects.tokens to 0.")
        if self.protocol.chat:
            check_template(self._set_up_tokenizer)
            if self._apart:
                raise ValueError("An encoder-decoder has no turns of a chat: take another protocol than 'chat'.")
        if not self.test_questions:
            self._split()
        if self.trainer is not None:
            Evaluate.put_on(self.trainer, self._set_up_tokenizer)
            if stage == "fit":
                self._give_question_ends(self.trainer)

    def teardown(self, stage: str | None = None) -> None:
        """Take back the texts that interventions were given."""
        while self._given:
            self._given.pop().sigma_texts = None

    def on_exception(self, exception: BaseException) -> None:
        self.teardown()

    def _split(self) -> None:
        questions = load_questions(self.source)
        if self.limit is not None:
            questions = subset(questions, self.limit, self.seed)
        self.data_hash = data_hash(questions)
        folds = assign_folds(questions, self.num_folds, self.seed)
        outside = [question for question, fold in zip(questions, folds, strict=True) if fold != self.fold]
        self.test_questions = [question for question, fold in zip(questions, folds, strict=True) if fold == self.fold]
        self.train_questions, self.val_questions = inner_split(outside, self.val_fraction, self.seed)

    def _give_question_ends(self, trainer: L.Trainer) -> None:
        for callback in vars(trainer)["callbacks"]:
            if isinstance(callback, ITI) and callback.question_ends and callback.sigma_texts is None:
                callback.sigma_texts = self.question_ends(callback.seed)
                self._given.append(callback)

    @property
    def fold_questions(self) -> list[Question]:
        """All questions outside the test fold, in the release's order."""
        return sorted(self.train_questions + self.val_questions, key=lambda question: question.id)

    def question_ends(self, seed: int = 0) -> list[list[int]]:
        """Return token ids of texts that end where a question does: `Q: question A: answer Q: another question`.

        Li et al. 2023 measure spreads there, before a model begins an answer. There is one text for each true and each
        false answer to each question outside the test fold; the other question is one of these too.

        Args:
            seed: of which question follows; it is the same after all answers to a question.
        """
        questions, draw = self.fold_questions, random.Random(seed)
        texts = []
        for question in questions:
            following = draw.choice([candidate for candidate in questions if candidate is not question])
            for answer in (*question.correct, *question.incorrect):
                texts.append(f"{statement(question.text, answer)} Q: {following.text}")
        return [list(self._tokenizer(text)["input_ids"]) for text in texts]

    def statements(self) -> Statements:
        """Return every true and false answer outside the test fold, and the choices in it, as statements."""
        inner, held_out = (self._labelled(questions) for questions in (self.train_questions, self.val_questions))
        return Statements(
            stored=[tokens for tokens, _ in inner + held_out],
            truth=[true for _, true in inner + held_out],
            inner=len(inner),
            tested={
                (question.id, i): self._encoded(question, choice.text)
                for question in self.test_questions
                for i, choice in enumerate(question.choices)
            },
            others=frozenset({"capability"}),
        )

    def _labelled(self, questions: Sequence[Question]) -> list[tuple[list[int], int]]:
        answers = [(question, choice) for question in questions for choice in question.choices if choice.mc2 >= 0]
        return [(self._encoded(question, choice.text), choice.mc2) for question, choice in answers]

    def _encoded(self, question: Question, answer: str) -> list[int]:
        return list(self._tokenizer(statement(question.text, answer))["input_ids"])

    def train_dataloader(self) -> DataLoader:
        if self.kind == "statements":
            # sorted by length, so that a batch holds little padding, whatever sampler a strategy puts in
            examples = sorted(self._statements(self.fold_questions), key=lambda e: len(e["input_ids"]))
            return self._loader(examples)
        examples = self._answers(self.train_questions)
        lengths = [len(e["input_ids"]) for e in examples]
        return self._loader(examples, sampler=LengthGroupedSampler(lengths, self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader:
        answers = self._answers(self.val_questions)
        if not self._validates_metrics():
            return self._loader(answers)
        firsts = range(0, len(answers), self.batch_size)
        batches = [self._collate(answers[i : i + self.batch_size]) for i in firsts]
        return self._ready(evenly_mixed(batches, *self._tested(self.val_questions, self._val_primer())))

    def test_dataloader(self) -> DataLoader:
        kinds = self._tested(self.test_questions, self._test_primer())
        return self._ready([batch for kind in kinds for batch in kind])

    def predict_dataloader(self) -> DataLoader:
        primer = self._primer()
        prompting = self.prompting if primer is None else replace(self.prompting, primer=primer)
        if self.fit_window and prompting.preset == "qa":
            prompting = replace(prompting, primer=self._fitting_prompts(prompting))
        return self._ready(encode_prompts(self.test_questions, prompting, self._tokenizer, self.batch_size))

    def test_contexts(self) -> dict[int, str]:
        """Return the context of the answers to each test question, by its id."""
        return self._contexts(self.test_questions, self._test_primer())

    def val_contexts(self) -> dict[int, str]:
        """Return the context of the answers to each inner validation question, by its id.

        It is as for test questions, but its demonstrations are of inner training questions, which may be fewer.
        """
        return self._contexts(self.val_questions, self._val_primer())

    def _contexts(self, questions: Sequence[Question], primer: str | None) -> dict[int, str]:
        return {question.id: self.protocol.shown(self._tokenizer, question.text, primer) for question in questions}

    def _test_primer(self) -> str | None:
        """Return what stands before the test questions in place of the protocol's primer; None leaves that."""
        primer = self._primer()
        if self.fit_window:
            primer, fitted, shots = self._fitting(primer, self.test_questions)
            self.demonstrations = fitted, shots
        return primer

    def _val_primer(self) -> str | None:
        """Return the same of the inner validation questions."""
        primer = self._primer(inner=True)
        return self._fitting(primer, self.val_questions)[0] if self.fit_window else primer

    def _primer(self, inner: bool = False) -> str | None:
        """Return the primer that replaces the benchmark's; None leaves it."""
        if not self.few_shot:
            return self.primer if self.few_shot is None else ""
        among = self.train_questions if inner else self.fold_questions
        shots = min(self.few_shot, len(among)) if inner else self.few_shot
        return few_shot_primer(among, shots, self.seed + self.draw)

    def fix_demonstrations(self) -> None:
        """Make what now stands before the test questions the primer, whichever part of them is asked for later."""
        self.primer, self.few_shot, self.fit_window = self._test_primer(), None, False

    def _fitting(self, primer: str | None, questions: Sequence[Question]) -> tuple[str, int, int]:
        """Return the part of a primer that leaves room for these questions' choices; see `fewer_demonstrations`."""
        text = self.protocol.primer if primer is None else primer
        key = text, tuple(question.id for question in questions)
        if key not in self._fitted:
            pairs = [(question.text, choice.text) for question in questions for choice in question.choices]

            def length(shown: str, question: str, answer: str) -> int:
                if self._apart:
                    context, continuation = self.protocol.context(question, shown), self.protocol.answer(answer)
                    return len(encode_answer(self._tokenizer, context, continuation)[0])
                return len(self.protocol.encode(self._tokenizer, question, answer, shown)[0])

            self._fitted[key] = fewer_demonstrations(text, pairs, length, self._window())
        return self._fitted[key]

    def _fitting_prompts(self, prompting: Prompting) -> str:
        """Return the part of a prompting's primer that leaves room for the test questions and their answers."""

        def length(shown: str, question: str, _: str) -> int:
            shorter = replace(prompting, primer=shown)
            return len(shorter.encode(self._tokenizer, question)) + prompting.max_new_tokens - 1

        primer = QA_PRIMER if prompting.primer is None else prompting.primer
        pairs = [(question.text, "") for question in self.test_questions]
        fitting, fitted, shots = fewer_demonstrations(primer, pairs, length, self._window())
        self.demonstrations = fitted, shots
        return fitting

    def _window(self) -> float:
        """Return the number of tokens that a text may have."""
        if self.fit_window is not True:
            return self.fit_window
        backbone = getattr(getattr(self.trainer, "lightning_module", None), "backbone", None)
        if backbone is None:
            raise ValueError(
                "fit_window needs a LightningModule with a backbone; without one, give a number of tokens."
            )
        window = context_window(backbone)
        return math.inf if window is None else window.tokens

    def _validates_metrics(self) -> bool:
        if self.val_metrics is not None:
            return self.val_metrics
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.VALIDATING or self._in_parts():
            return False
        # another's validation_step would take choices, false ones among them, for answers
        return Evaluate.measures(trainer)

    def _in_parts(self) -> bool:
        """Return whether several processes each hold a part of the model, so that all must call it equally often."""
        sharding = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
        return self.trainer is not None and self.trainer.world_size > 1 and isinstance(self.trainer.strategy, sharding)

    def _ready(self, batches: list[Batch]) -> DataLoader:
        return DataLoader(as_dataset(batches), batch_size=None, num_workers=self.num_workers)

    def _loader(self, examples: Sequence[Example], sampler: LengthGroupedSampler | None = None) -> DataLoader:
        return DataLoader(
            as_dataset(list(examples)),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self._collate,
            num_workers=self.num_workers,
        )

    def _answers(self, questions: Sequence[Question]) -> list[Example]:
        return [
            self._answer(question, choice.text) | {"label": 1}
            for question in questions
            for choice in question.choices
            if choice.mc2 == 1
        ]

    def _answer(self, question: Question, answer: str) -> Example:
        """Return an answer to tune on, without a primer; a turn of a chat with the token that ends it."""
        if self.protocol.chat:
            return _learnt(question, *encode_turn(self._tokenizer, self.protocol.messages(question.text, ""), answer))
        return self._example(question, question_prompt(question.text, ""), " " + answer)

    def _statements(self, questions: Sequence[Question]) -> list[Example]:
        examples = []
        for question in questions:
            for choice in question.choices:
                if choice.mc2 >= 0:
                    text = statement(question.text, choice.text)
                    example = self._continued(question, text[: -len(choice.text)], choice.text)
                    example["labels"], example["label"] = [-100] * len(example["labels"]), choice.mc2
                    examples.append(example)
        return examples

    def _tested(self, questions: Sequence[Question], primer: str | None) -> list[list[Batch]]:
        """Return batches of the questions' choices and, where asked for, of simple questions and of text."""
        if self._in_parts():
            raise ValueError(
                "Questions take different numbers of calls, but processes that each hold a part of the model must call "
                "it equally often: score choices on one process, or on several with DDP."
            )
        together = self.questions_per_batch
        # questions are whole: their rows share a prompt, which the scorer computes once
        parts = [questions[i : i + together] for i in range(0, len(questions), together)]
        choices = [self._choices(part, lambda q, text: self._choice(q, text, primer)) for part in parts]
        return [choices] if self.side_effects is None else [choices, *self._side_effects(self.side_effects)]

    def _choice(self, question: Question, choice: str, primer: str | None) -> Example:
        """Put a choice after its question's context, as the protocol has both."""
        if self._apart:
            return self._example(question, self.protocol.context(question.text, primer), self.protocol.answer(choice))
        return _learnt(question, *self.protocol.encode(self._tokenizer, question.text, choice, primer))

    def _choices(self, questions: Sequence[Question], encode: Callable[[Question, str], Example]) -> Batch:
        """Put all choices of some questions into one batch."""
        pairs = [(question, choice) for question in questions for choice in question.choices]
        batch = self._collate([encode(question, choice.text) for question, choice in pairs])
        for metric in ("mc0", "mc1", "mc2"):
            batch[metric] = torch.tensor([getattr(choice, metric) for _, choice in pairs])
        batch["choice"] = torch.tensor([i for question in questions for i in range(len(question.choices))])
        batch["strict"] = torch.full((len(pairs),), self.protocol.ties == "strict")
        return batch

    def _side_effects(self, settings: SideEffects) -> tuple[list[Batch], list[Batch]]:
        batches = []
        for question in settings.questions():
            context = question_prompt(question.text, CAPABILITY_PRIMER)
            batch = self._choices([question], partial(self._simple_choice, context))
            batch["capability"] = batch["mc1"]
            benchmark = ("mc0", "mc1", "mc2", "strict")
            batches.append({name: values for name, values in batch.items() if name not in benchmark})
        text = settings.text()
        return batches, [] if text is None else list(text_batches(text, self._tokenizer))

    def _simple_choice(self, context: str, question: Question, choice: str) -> Example:
        return self._example(question, context, " " + choice)

    def _example(self, question: Question, context: str, answer: str) -> Example:
        if not self._apart:
            return self._continued(question, context, answer)
        ids, labels = encode_answer(self._tokenizer, context, answer)
        return {"input_ids": ids, "labels": labels, "group": question.id}

    def _continued(self, question: Question, context: str, answer: str) -> Example:
        """Encode context and answer as one text."""
        return _learnt(question, *encode_pair(self._tokenizer, context, answer))

    def _collate(self, examples: Sequence[Mapping[str, object]]) -> Batch:
        batch = padded(examples, self._tokenizer)
        for name in ("label", "group", "prompt_end"):
            if name in examples[0]:
                batch[name] = torch.tensor([e[name] for e in examples])
        return batch

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        assert self._set_up_tokenizer is not None
        return self._set_up_tokenizer

    def _reads_apart(self) -> bool:
        """Return whether the LightningModule's backbone is an encoder-decoder."""
        backbone = getattr(getattr(self.trainer, "lightning_module", None), "backbone", None)
        return bool(getattr(getattr(backbone, "config", None), "is_encoder_decoder", False))


def _learnt(question: Question, ids: list[int], prompt: int) -> Example:
    """Return a text whose tokens behind the prompt are the labels."""
    labels = [-100] * prompt + ids[prompt:]
    return {"input_ids": ids, "labels": labels, "group": question.id, "prompt_end": prompt - 1}
