"""Free answers of every finished cell: written, held against the references, judged, each once; a further table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.files.kept import hashed, kept
from lightning_peft.tasks.cell import Cell
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.section import Section
from lightning_peft.truthfulqa.answers import Answers
from lightning_peft.truthfulqa.answers_notes import answer_notes, corrected_rates
from lightning_peft.truthfulqa.judges import LanguageModelJudge, load_quality, true_info
from lightning_peft.truthfulqa.judges.protocol import Kind
from lightning_peft.truthfulqa.judges.quality import THRESHOLD
from lightning_peft.truthfulqa.references import reference_scores
from lightning_peft.truthfulqa.samples import write_samples

if TYPE_CHECKING:
    from lightning_peft.truthfulqa.task import TruthfulQA

ANSWERS = {
    "bleu_acc": Measure(
        "BLEU",
        "share of answers that are liker, by BLEU, to a true reference than to any false one",
        range=(0, 1),
        written=".3f",
    ),
    "rouge1_acc": Measure("ROUGE-1", "the same by ROUGE-1", range=(0, 1), written=".3f"),
    "true": Measure("True", "share of answers that the truth judge calls true", range=(0, 1), written=".3f"),
    "info": Measure("Info", "share of answers that the info judge calls informative", range=(0, 1), written=".3f"),
    "true_info": Measure("True*Info", "share of answers that are called both", range=(0, 1), written=".3f"),
}
_REFERENCES = ("bleu_acc", "rouge1_acc")  # of what `reference_scores` gives
# ours, and the names in `TrueInfo`
_RATES = {"true": "true", "info": "info", "true_info": "mean_of_products", "product_of_means": "product_of_means"}

Written = list[dict[str, Any]]  # a cell's answers
Say = Callable[[str], None]


class AnswersSection(Section):
    """Each row's free answers to its test questions; nothing where the task asks for none.

    The adapter is the one that the cell has saved, and demonstrations are those of the first draw. Answers are kept in
    the cell's folder, `answers.json`, verdicts in `judged-truth.json` and `judged-info.json`, so that a run that goes
    on writes and judges what is missing. A judge is loaded when there is something to judge.

    Args:
        task: whose questions are answered.

    Attributes:
        written: of every cell that writes, by row and fold, dicts: `question_id`, `question`, `answer`, `raw`,
            `bleu_acc`, `rouge1_acc`, and with judges `truth` and `info`, probabilities. Cells that failed, now or
            before, have none.
    """

    name = "answers"
    title = "Free answers"
    measures = ANSWERS
    unit = "document or question"

    def __init__(self, task: TruthfulQA) -> None:
        self.task = task
        self.written: dict[tuple[str, int], Written] = {}

    def prepare(self, cells: Sequence[Cell], say: Say) -> None:
        options = self.task.answers
        if options is None:
            return
        parts: dict[tuple[str, int], tuple[Cell, str, Written]] = {}
        for cell in cells:
            if cell.failed or cell.scoring is not None:  # a scoring says how to score, not how to write
                continue
            say(f"Answers: {cell.label}, fold {cell.fold}")
            key = hashed([cell.result["key"], options.preset, options.max_new_tokens])
            questions = {sample["question_id"] for sample in cell.result["samples"]}
            write, fits = partial(_write, self.task, options, cell, say), partial(_are_answers, questions=questions)
            try:
                answers = kept(cell.folder / "answers.json", key, write, fits, say)
                parts[cell.row, cell.fold] = (cell, key, answers)
            except Exception as error:  # as in a cell: the other rows are worth having
                say(f"  failed: {type(error).__name__}: {error}")
        for kind, judge in options.judges.items():
            try:
                _judge(options, kind, judge, list(parts.values()), say)
            except Exception as error:  # what was scored and written is worth having without it
                say(f"The {kind} judge failed: {type(error).__name__}: {error}")
        self.written = {place: answers for place, (_, _, answers) in parts.items()}

    def scores(self, cells: Sequence[Cell], base: Sequence[Cell]) -> dict[str, dict[int, float]]:
        answers = self._answers(cells)
        return {} if answers is None else answer_scores(answers)

    def write(self, output: Path) -> None:
        if self.written:
            answers = [{"method": row, "fold": fold} | a for (row, fold), texts in self.written.items() for a in texts]
            write_samples(output / "answers.jsonl", answers)

    def row_results(self, cells: Sequence[Cell]) -> dict[str, Any]:
        options, answers = self.task.answers, self._answers(cells)
        return {"rates": {} if options is None or answers is None else answer_rates(options, answers)}

    def results(self) -> dict[str, Any]:
        return {"answers": None if self.task.answers is None else described(self.task.answers)}

    def notes(self, results: Mapping[str, Any]) -> list[str]:
        return answer_notes(results["answers"], results["rows"])

    def below(self, results: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        return corrected_rates(results["rows"], ANSWERS)

    def _answers(self, cells: Sequence[Cell]) -> Written | None:
        """Return a row's answers of all folds; None where a fold has none."""
        places = [(cell.row, cell.fold) for cell in cells]
        if not all(place in self.written for place in places):
            return None
        return [answer for place in places for answer in self.written[place]]


def answer_scores(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the score of each question by each measure: 0 or 1.

    Args:
        answers: a row's, of all folds.

    Example:
        >>> judged = {"bleu_acc": 1.0, "rouge1_acc": 0.0, "truth": 0.9, "info": 0.2}
        >>> answer_scores([{"question_id": 7, **judged}])
        {'bleu_acc': {7: 1.0}, 'rouge1_acc': {7: 0.0}, 'true': {7: 1.0}, 'info': {7: 0.0}, 'true_info': {7: 0.0}}
    """
    scores = {name: {a["question_id"]: a[name] for a in answers} for name in _REFERENCES}
    if all("truth" in answer and "info" in answer for answer in answers):
        for name, kinds in (("true", ["truth"]), ("info", ["info"]), ("true_info", ["truth", "info"])):
            scores[name] = {a["question_id"]: float(all(a[kind] >= THRESHOLD for kind in kinds)) for a in answers}
    return scores


def answer_rates(asked: Answers, answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the rates of a row's answers by its judges, as they are and corrected for the judges' errors.

    They are `true`, `info`, `true_info` and the original's `product_of_means`; none without judges. See `true_info`.
    """
    if not asked.judges or not answers or any(kind not in answer for answer in answers for kind in asked.judges):
        return {}
    truth, info = (torch.tensor([answer[kind] for answer in answers]) for kind in asked.judges)
    truth_confusion, info_confusion = (load_quality(judge).confusion for judge in asked.judges.values())
    rates = asdict(true_info(truth, info, truth_confusion, info_confusion))
    return {name: rates[theirs] for name, theirs in _RATES.items()}


def described(asked: Answers) -> dict[str, Any]:
    """Return for `results.json` how answers were asked for, and how far their judges can be trusted."""
    judges = {}
    for kind, folder in asked.judges.items():
        quality = asdict(load_quality(folder))
        del quality["confusion"]
        judges[kind] = {"folder": folder.name, **quality}
    return {"preset": asked.preset, "max_new_tokens": asked.max_new_tokens, "judges": judges}


def _write(task: TruthfulQA, options: Answers, cell: Cell, say: Say) -> Written:
    module, data = cell.adapted(), task.data(cell.split, **cell.options_of(0))
    data.batch_size, data.prompting = options.batch_size, options.prompting(data.protocol.instruction)
    batches: Any = cell.trainer([]).predict(module, datamodule=data)
    if data.demonstrations and data.demonstrations[0] < data.demonstrations[1]:
        say("  {} of {} demonstrations, for more do not fit the context window".format(*data.demonstrations))
    answers = {answer.question_id: answer for batch in batches for answer in batch}
    samples = []
    for question in data.test_questions:
        answer, scores = answers[question.id], reference_scores(answers[question.id].text, question)
        written = {"question_id": question.id, "question": question.text, "answer": answer.text, "raw": answer.raw}
        samples.append(written | {name: scores[name] for name in _REFERENCES})
    return samples


def _judge(options: Answers, kind: Kind, judge: Path, parts: Sequence[tuple[Cell, str, Written]], say: Say) -> None:
    """Add this judge's probabilities to all answers."""

    @cache
    def loaded() -> LanguageModelJudge:
        model = LanguageModelJudge.from_adapter(judge, kind, options.judge_base, batch_size=options.batch_size)
        model.model.to(parts[0][0].trainer([]).strategy.root_device)
        return model

    def scores(answers: Sequence[Mapping[str, Any]]) -> list[float]:
        questions, texts = ([answer[part] for answer in answers] for part in ("question", "answer"))
        return loaded().score(questions, texts).tolist()

    weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(judge.glob("adapter_*"))]
    for cell, key, answers in parts:
        path, judged_key = cell.folder / f"judged-{kind}.json", hashed([key, weights, options.judge_base])
        fits = partial(_are_scores, number=len(answers))
        for answer, score in zip(answers, kept(path, judged_key, partial(scores, answers), fits, say), strict=True):
            answer[kind] = score


def _are_answers(value: Any, questions: set[int]) -> bool:
    """Return whether a file's content can be the answers to these questions."""
    texts, numbers = ("question", "answer", "raw"), ("question_id", *_REFERENCES)
    return (
        isinstance(value, list)
        and all(isinstance(answer, dict) and answer.keys() == {*texts, *numbers} for answer in value)
        and all(isinstance(answer[name], str) for answer in value for name in texts)
        and all(isinstance(answer[name], int | float) for answer in value for name in numbers)
        and {answer["question_id"] for answer in value} == questions
    )


def _are_scores(value: Any, number: int) -> bool:
    """Return whether a file's content can be a judge's probabilities for that many answers."""
    return isinstance(value, list) and len(value) == number and all(isinstance(score, int | float) for score in value)
