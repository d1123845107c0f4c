"""Every question with its choices' scores, in the form in which lm-evaluation-harness logs samples.

The harness writes one file a task and one line a question (`--log_samples`, version 0.4.13); what reads its files reads
these: its `scripts/paired_model_comparison.py` sets two models' files side by side by `doc_id` and `acc`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_peft.editing.intervals import wilson
from lightning_peft.editing.ranks import of_all_ranks
from lightning_peft.files.records import write_atomically
from lightning_peft.truthfulqa.metrics import mc1, mc2
from lightning_peft.truthfulqa.protocols import PROTOCOLS, Protocol
from lightning_peft.truthfulqa.questions import Question

K = TypeVar("K")
V = TypeVar("V")
Task = Literal["mc1", "mc2"]
TASKS: tuple[Task, ...] = ("mc1", "mc2")
FILES: dict[Task, str] = {task: f"samples_truthfulqa_{task}.jsonl" for task in TASKS}
SMALL = 10  # questions of a category below which its mean says little


def harness_samples(
    questions: Iterable[Question],
    logprobs: Mapping[int, Sequence[float]],
    contexts: Mapping[int, str],
    task: Task,
    protocol: Protocol = PROTOCOLS["lm_eval"],
) -> list[dict[str, Any]]:
    """Make the lines of a task's file, in the order of the questions.

    Each has what the harness's have: `doc_id`, `doc`, `target`, `arguments`, `resps`, `filtered_resps`, `filter`,
    `metrics`, `doc_hash`, `prompt_hash`, `target_hash` and `acc`; and `category`. Whether an answer is also the one
    that greedy decoding gives, which no score here needs, is not worked out: where the harness has that, there is
    `None`.

    Args:
        questions: those to write; one without a choice for the task is passed over.
        logprobs: by question id, of its choices in their order, in nats.
        contexts: by question id, what stands before its answers.
        task: `"mc1"` or `"mc2"`.
        protocol: by which they were scored.
    """
    samples = []
    for question in questions:
        # as the harness has them: true ones first, for it takes the first choice of mc1 for the true one
        order = sorted(range(len(question.choices)), key=lambda i: -getattr(question.choices[i], task))
        order = [i for i in order if getattr(question.choices[i], task) >= 0]
        if not order:
            continue
        scores = torch.tensor([logprobs[question.id][i] for i in order], dtype=torch.float64)
        labels = torch.tensor([getattr(question.choices[i], task) for i in order])
        doc = {"question": question.text, **{f"{name}_targets": _targets(question, name) for name in TASKS}}
        context, responses = contexts[question.id], [[str(score), "None"] for score in scores.tolist()]
        pairs = [{"arg_0": context, "arg_1": protocol.answer(question.choices[i].text)} for i in order]
        samples.append(
            {
                "doc_id": question.id,
                "doc": doc,
                "target": "0",
                "arguments": {f"gen_args_{i}": pair for i, pair in enumerate(pairs)},
                "resps": [[response] for response in responses],
                "filtered_resps": responses,
                "filter": "none",
                "metrics": ["acc"],
                "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
                "prompt_hash": _hash(context),
                "target_hash": _hash("0"),
                "acc": mc1(scores, labels, protocol.ties) if task == "mc1" else mc2(scores, labels),
                "category": question.category,
            }
        )
    return samples


def write_samples(path: str | os.PathLike[str], samples: Iterable[Mapping[str, Any]]) -> None:
    """Write samples as a file of JSON lines, whole or not at all.

    Args:
        path: of the file; a folder above it that is not there is made.
        samples: as `harness_samples` gives them.
    """
    write_atomically(Path(path), "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the samples of a file of JSON lines."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@dataclass(frozen=True)
class CategoryScore:
    """The mean score of a category's questions with its 95% interval.

    Args:
        n: the number of questions.
        mean: of their scores.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    n: int
    mean: float
    low: float
    high: float

    @property
    def small(self) -> bool:
        """True where there are so few questions that the mean says little."""
        return self.n < SMALL


def by_category(samples: Iterable[Mapping[str, Any]]) -> dict[str, CategoryScore]:
    """Return the mean `acc` of each category, by name.

    The interval is Wilson's score interval (*J. Am. Stat. Assoc.* 22:209, 1927), which holds for few questions and
    near 0 and 1. Shares between 0 and 1, as MC2 is, vary less than ones that are 0 or 1: for them it is wider than need
    be.

    Args:
        samples: each with a `category` and an `acc` from 0 to 1, such as those of `harness_samples` or of their file.

    Example:
        >>> found = by_category([{"category": "Law", "acc": 1.0}, {"category": "Law", "acc": 0.0}])["Law"]
        >>> found.n, found.mean, round(found.low, 3), round(found.high, 3), found.small
        (2, 0.5, 0.095, 0.905, True)
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        scores[sample["category"]].append(sample["acc"])
    return {category: _mean(scores[category]) for category in sorted(scores)}


class SampleWriter(Callback):
    """Writes a task's samples after `trainer.test` with a `TruthfulQADataModule`, of all processes and each once.

    Args:
        folder: where `samples_truthfulqa_mc1.jsonl` and `samples_truthfulqa_mc2.jsonl` go; None for nowhere.

    Attributes:
        samples: after the test the same by task, in every process.

    Example:
        >>> writer = SampleWriter("runs/base")
        >>> L.Trainer(callbacks=[writer]).test(module, TruthfulQADataModule("hub"))  # doctest: +SKIP
        >>> by_category(writer.samples["mc1"])  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self._found: dict[tuple[int, int], float] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(getattr(trainer, "datamodule", None), "test_contexts"):
            raise ValueError(
                "SampleWriter needs the questions: test with a TruthfulQADataModule, not with a loader of it."
            )
        self._found = {}

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], *_: object
    ) -> None:
        if "mc2" in batch:
            places = zip(batch["group"].tolist(), batch["choice"].tolist(), strict=True)
            self._found |= dict(zip(places, outputs.tolist(), strict=True))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        logprobs: dict[int, list[float]] = defaultdict(list)
        for (question, _), logprob in sorted(gathered(self._found).items()):
            logprobs[question].append(logprob)
        questions = [question for question in data.test_questions if question.id in logprobs]
        contexts = data.test_contexts()
        for task in TASKS:
            self.samples[task] = harness_samples(questions, logprobs, contexts, task, data.protocol)
            if self.folder is not None and trainer.is_global_zero:
                write_samples(self.folder / FILES[task], self.samples[task])


def gathered(found: dict[K, V]) -> dict[K, V]:
    """Return the values of all processes, by key; where several have one, the first process's."""
    return {key: value for part in reversed(of_all_ranks(found)) for key, value in part.items()}


def _targets(question: Question, task: Task) -> dict[str, list[str] | list[int]]:
    """Return a question's choices as its line in the harness's data has them."""
    chosen = [choice for choice in question.choices if getattr(choice, task) >= 0]
    chosen.sort(key=lambda choice: -getattr(choice, task))
    return {"choices": [c.text for c in chosen], "labels": [getattr(c, task) for c in chosen]}


def _mean(scores: Sequence[float]) -> CategoryScore:
    n, mean = len(scores), sum(scores) / len(scores)
    return CategoryScore(n, mean, *wilson(mean, n))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
