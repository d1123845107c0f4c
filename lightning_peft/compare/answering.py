"""Free answers of every finished cell: written, held against the references, judged, each once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_peft.compare.answers import Answers
from lightning_peft.compare.cell import data_of, quiet, trainer_of
from lightning_peft.compare.files import hashed, kept
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.models import CausalLM
from lightning_peft.stack.adapter_files.saving import load_adapter
from lightning_peft.truthfulqa.judges import LanguageModelJudge, load_quality, true_info
from lightning_peft.truthfulqa.judges.protocol import Kind
from lightning_peft.truthfulqa.judges.quality import THRESHOLD
from lightning_peft.truthfulqa.references import reference_scores

_REFERENCES = ("bleu_acc", "rouge1_acc")  # of what `reference_scores` gives
# ours, and the names in `TrueInfo`
_RATES = {"true": "true", "info": "info", "true_info": "mean_of_products", "product_of_means": "product_of_means"}

Cell = tuple[str, int]


def free_answers(
    plan: Plan, outcomes: Mapping[Cell, Mapping[str, Any]], output: Path, console: Console
) -> dict[Cell, list[dict[str, Any]]]:
    """Return the free answers of every finished cell to its test questions; nothing where the plan asks for none.

    The adapter is the one that the cell has saved, and demonstrations are those of the first draw. Answers are kept in
    the cell's folder, `answers.json`, verdicts in `judged-truth.json` and `judged-info.json`, so that a run that goes
    on writes and judges what is missing. A judge is loaded when there is something to judge.

    Args:
        plan: the plan.
        outcomes: of every row and fold, its cell's result.
        output: the comparison's folder.
        console: where to report progress.

    Returns:
        Of every cell that writes, dicts: `question_id`, `question`, `answer`, `raw`, `bleu_acc`, `rouge1_acc`, and with
        judges `truth` and `info`, probabilities. Cells that failed, now or before, have none.
    """
    options, cells = plan.data.answers, {}
    if options is None:
        return {}
    quiet()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    rows = {row.name: row for row in plan.rows if row.kind != "decoded"}  # which says how to score, not how to write
    for (name, fold), outcome in outcomes.items():
        if name not in rows or outcome["failed"]:
            continue
        console.print(f"Answers: {rows[name].label}, fold {fold}", highlight=False, markup=False)
        folder = output / "cells" / f"{name}-fold{fold}"
        key = hashed([outcome["key"], options.preset, options.max_new_tokens])
        write = partial(_write, plan, options, rows[name], fold, folder, say)
        fits = partial(_are_answers, questions={sample["question_id"] for sample in outcome["samples"]})
        try:
            cells[name, fold] = (folder, key, kept(folder / "answers.json", key, write, fits, say))
        except Exception as error:  # as in a cell: the other rows are worth having
            console.print(f"  failed: {type(error).__name__}: {error}", highlight=False, markup=False)
    for kind, judge in options.judges.items():
        try:
            _judge(plan, options, kind, judge, list(cells.values()), say)
        except Exception as error:  # what was scored and written is worth having without it
            console.print(f"The {kind} judge failed: {type(error).__name__}: {error}", highlight=False, markup=False)
    return {cell: answers for cell, (_, _, answers) in cells.items()}


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


def _write(
    plan: Plan, options: Answers, row: Row, fold: int, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    module = CausalLM(plan.model, dtype=plan.dtype)
    if row.callback is not None or row.after is not None:
        load_adapter(module.backbone, folder / "adapter")
    data = data_of(plan, row, fold)
    data.batch_size, data.prompting = options.batch_size, options.prompting(data.protocol.instruction)
    batches: Any = trainer_of(plan, []).predict(module, datamodule=data)
    if data.demonstrations and data.demonstrations[0] < data.demonstrations[1]:
        say("  {} of {} demonstrations, for more do not fit the context window".format(*data.demonstrations))
    answers = {answer.question_id: answer for batch in batches for answer in batch}
    samples = []
    for question in data.test_questions:
        answer, scores = answers[question.id], reference_scores(answers[question.id].text, question)
        written = {"question_id": question.id, "question": question.text, "answer": answer.text, "raw": answer.raw}
        samples.append(written | {name: scores[name] for name in _REFERENCES})
    return samples


def _judge(
    plan: Plan,
    options: Answers,
    kind: Kind,
    judge: Path,
    cells: Sequence[tuple[Path, str, list[dict[str, Any]]]],
    say: Callable[[str], None],
) -> None:
    """Add this judge's probabilities to all answers."""

    @cache
    def loaded() -> LanguageModelJudge:
        model = LanguageModelJudge.from_adapter(judge, kind, options.judge_base, batch_size=options.batch_size)
        model.model.to(trainer_of(plan, []).strategy.root_device)
        return model

    def scores(answers: Sequence[Mapping[str, Any]]) -> list[float]:
        questions, texts = ([answer[part] for answer in answers] for part in ("question", "answer"))
        return loaded().score(questions, texts).tolist()

    weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(judge.glob("adapter_*"))]
    for folder, key, answers in cells:
        path, judged_key = folder / f"judged-{kind}.json", hashed([key, weights, options.judge_base])
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
