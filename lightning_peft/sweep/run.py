"""Run a sweep chunk by chunk, resumably, and put the results together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_peft.backbone.fingerprint import fingerprint
from lightning_peft.backbone.heads import HeadSite, head_sites
from lightning_peft.backbone.window import check_loaded, context_window
from lightning_peft.editing.iti import HeadEdit
from lightning_peft.effects.slices import text_batches, text_slice
from lightning_peft.files.kept import kept
from lightning_peft.files.locking import only_writer
from lightning_peft.models import CausalLM
from lightning_peft.stack.adapter_files.saving import save_adapter
from lightning_peft.stack.stack import stack_of
from lightning_peft.sweep.fit import Statements, best_heads, fit
from lightning_peft.sweep.grid import Grid
from lightning_peft.sweep.results import Measured, best_point, collect, metrics_of, write_results
from lightning_peft.sweep.settings import Sweep, check, sweep_key
from lightning_peft.truthfulqa.datamodule import TruthfulQADataModule
from lightning_peft.truthfulqa.questions import Question, data_hash, load_questions, subset


def run(plan: Sweep, settings: Mapping[str, Any], console: Console, wait: bool = False) -> dict[str, Any]:
    """Measure every point, or take up where a killed run stopped; write `results.json`, `table.csv` and the choice.

    Every finished chunk of questions is written whole under its own name, so a killed run loses at most a chunk. A part
    that is not as it was written is named and computed again.

    Args:
        plan: the sweep.
        settings: the plan as it was written, for the record.
        console: where to report progress.
        wait: where another run writes to the same folder, wait for its end.

    Returns:
        The content of `results.json`: `points` (one entry a point, the base first), `chosen` and `confirmed` (by
        fold), and what was measured.

    Raises:
        ValueError: the sweep could not be run to its end.
        FolderInUseError: another run writes to the same folder.
    """
    check(plan)
    with only_writer(Path(plan.output or f"runs/{plan.name}"), wait, console.print):
        return _Run(plan, console).results(settings)


class _Run:
    def __init__(self, plan: Sweep, console: Console) -> None:
        self.plan, self.console = plan, console
        self.output = Path(plan.output or f"runs/{plan.name}")
        questions = load_questions(plan.data.source)
        if plan.data.limit is not None:
            questions = subset(questions, plan.data.limit, plan.data.seed)
        self.questions, self.hashed = len(questions), data_hash(questions)
        device = plan.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.module = CausalLM(plan.model, dtype=plan.dtype).eval().to(device)
        self.backbone = self.module.backbone
        self.sites: list[HeadSite] = head_sites(self.backbone)
        available = sum(site.num_heads for site in self.sites)
        if max(plan.num_heads) > available:
            raise ValueError(f"num_heads is {max(plan.num_heads)}, but the model has {available} heads.")
        self.folds = [self._data(fold) for fold in range(plan.data.num_folds)]
        self.demonstrations = self._check()
        self.key = sweep_key(plan, self.hashed, fingerprint(self.backbone))

    def results(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        plan = self.plan
        measured = Measured([(0, 0.0), *plan.points])
        inner = plan.split == "validation"
        edits = self._fit()
        chosen: list[dict[str, Any]] = []
        confirmed = Measured([(0, 0.0), (-1, 0.0)])  # the base, and each fold's own choice
        for fold, data in enumerate(self.folds):
            name, learnt = f"{plan.split}-fold{fold}", data.train_questions if inner else data.fold_questions
            here = Measured(measured.points)
            questions = data.val_questions if inner else data.test_questions
            here.add(*self._measure(name, edits[name], plan.points, data, learnt, questions))
            measured.add(here.scores, here.divergences, here.tokens)
            if inner:
                best = best_point(here, plan.choose)
                chosen.append({"fold": fold, "num_heads": best[0], "alpha": best[1]})
                edit, learnt, questions = edits[f"chosen-fold{fold}"], data.fold_questions, data.test_questions
                confirmed.add(*self._measure(f"chosen-fold{fold}", edit, [best], data, learnt, questions))
                self._save(edit, best, fold)
        results = collect(plan, settings, measured, chosen, confirmed if chosen else None, self.questions, self.hashed)
        if self.demonstrations:
            results["demonstrations"] = self.demonstrations
            fitted, shots = min(self.demonstrations)
            if fitted < shots:
                results["measured"] += f" {fitted} of {shots} demonstrations fit the context window."
        write_results(results, self.output)
        return results

    def _fit(self) -> dict[str, HeadEdit]:
        """Fit the interventions of every fold: to its inner training questions and to all its training questions."""
        edits: dict[str, HeadEdit] = {}
        statements: list[Statements] = []  # read when something is left to fit

        def fitted(questions: Sequence[Question]) -> dict[str, Any]:
            if not statements:
                self.console.print("reading the head outputs of the training statements", highlight=False)
                statements.append(Statements(self.backbone, self.sites, self.folds))
            edit = fit(self.plan, statements[0], questions)
            tensors = {"directions": edit.directions, "sigma": edit.sigma, "accuracy": edit.accuracy}
            return {"record": edit.record} | {name: tensor.tolist() for name, tensor in tensors.items()}

        for fold, data in enumerate(self.folds):
            questions_by_split = {"test": data.fold_questions}
            if self.plan.split == "validation":
                questions_by_split = {"validation": data.train_questions, "chosen": data.fold_questions}
            for name, questions in questions_by_split.items():
                progress = f"{name}-fold{fold}: probes of {len(questions)} questions"
                part = self._part(f"{name}-fold{fold}-edit", progress, {}, partial(fitted, questions), _is_edit)
                directions, sigma, accuracy = (torch.tensor(part[key]) for key in ("directions", "sigma", "accuracy"))
                heads = [(layer, head) for layer, head in part["record"]["heads"]]
                edits[f"{name}-fold{fold}"] = HeadEdit(heads, directions, sigma, accuracy, part["record"])
        return edits

    def _measure(
        self,
        name: str,
        edit: HeadEdit,
        points: Sequence[tuple[int, float]],
        data: TruthfulQADataModule,
        learnt: Sequence[Question],
        questions: Sequence[Question],
    ) -> tuple[dict[int, list[dict[str, float]]], list[list[float]], list[int]]:
        """Measure each row on each question and each text: metrics and summed divergence; count each text's tokens."""
        view = self._view(data, learnt, questions)
        edits = [(best_heads(edit, k), alpha) for k, alpha in points]
        grid = Grid(self.backbone, self.sites, edits, self.plan.positions, self.plan.rows)
        of_point = {"points": [list(point) for point in points]}
        scores: dict[int, list[dict[str, float]]] = {}
        for first in range(0, len(questions), self.plan.chunk):
            some = questions[first : first + self.plan.chunk]
            progress = f"{name}: questions {first + 1} to {first + len(some)} of {len(questions)}"
            make = partial(self._scored, grid, view, some)
            metrics = self._part(
                f"{name}-{first:04d}", progress, of_point, make, partial(_are_rows, len(some), 1 + len(points))
            )
            scores |= {question.id: row for question, row in zip(some, metrics, strict=True)}
        progress, fits = f"{name}: neutral text", partial(_are_sums, 1 + len(points))
        divergence = self._part(f"{name}-text", progress, of_point, partial(self._diverged, grid), fits)
        return scores, divergence["sums"], divergence["tokens"]

    def _view(
        self, data: TruthfulQADataModule, learnt: Sequence[Question], questions: Sequence[Question]
    ) -> TruthfulQADataModule:
        """Return a view of the data: these questions, behind demonstrations drawn from the questions learnt from."""
        view = copy.copy(data)
        view.train_questions, view.val_questions, view.test_questions = list(learnt), [], list(questions)
        view.questions_per_batch = 1
        view.fix_demonstrations()
        return view

    def _check(self) -> list[tuple[int, int]]:
        """Raise, or warn, where what will be asked is longer than the model can read.

        Returns:
            For each part of the questions how many demonstrations stand before it, and of how many, if they are to fit.
        """
        shown = []
        for data in self.folds:
            views = [self._view(data, data.fold_questions, data.test_questions)]
            if self.plan.split == "validation":
                views.append(self._view(data, data.train_questions, data.val_questions))
            for view in views:
                check_loaded(self.backbone, view.test_dataloader(), "questions with their choices")
                shown += [view.demonstrations] if view.demonstrations else []
            check_loaded(self.backbone, data.train_dataloader(), "statements")
        return shown

    def _scored(
        self, grid: Grid, fold: TruthfulQADataModule, questions: Sequence[Question]
    ) -> list[list[dict[str, float]]]:
        view = copy.copy(fold)
        view.test_questions = list(questions)
        batches = list(view.test_dataloader())
        scores = zip(grid.scores(batches), batches, strict=True)
        return [[metrics_of(row, batch) for row in rows] for rows, batch in scores]

    def _diverged(self, grid: Grid) -> dict[str, Any]:
        if not self.plan.kl_tokens:
            return {"sums": [], "tokens": []}
        text = text_slice(tokens=self.plan.kl_tokens, seed=self.plan.seed)
        ids = [batch["input_ids"][0] for batch in text_batches(text, self.module.tokenizer, batch_size=1)]
        ids = [tokens for tokens in ids if len(tokens) > 1]
        return {
            "sums": [[0.0, *grid.divergence(tokens).tolist()] for tokens in ids],
            "tokens": [len(tokens) - 1 for tokens in ids],
        }

    def _part(
        self, name: str, progress: str, depends: dict[str, Any], make: Callable[[], Any], fits: Callable[[Any], bool]
    ) -> Any:
        """Return the result of `make()`, of an earlier run or made now."""
        say = partial(self.console.print, highlight=False, markup=False, soft_wrap=True)

        def make_aloud() -> Any:
            say(progress)
            return make()

        path = self.output / "parts" / f"{name}.json"
        return kept(path, {"key": self.key, **depends}, make_aloud, fits, say, names=("of", "found"))

    def _fit_window(self) -> int:
        """Return the number of tokens that a text may have, where demonstrations are to fit; else 0."""
        window = context_window(self.backbone) if self.plan.data.fit_window else None
        return 0 if window is None else window.tokens

    def _save(self, edit: HeadEdit, point: tuple[int, float], fold: int) -> None:
        """Save the chosen point as an adapter folder."""
        stack, (count, alpha) = stack_of(self.backbone), point
        stack.put("iti", best_heads(edit, count).adapter(self.sites, alpha, self.plan.positions))
        save_adapter(self.backbone, self.output / f"adapter-fold{fold}")
        stack.remove("iti")

    def _data(self, fold: int) -> TruthfulQADataModule:
        data = TruthfulQADataModule(
            source=self.plan.data.source,
            train="statements",
            fold=fold,
            num_folds=self.plan.data.num_folds,
            val_fraction=self.plan.data.val_fraction,
            seed=self.plan.data.seed,
            limit=self.plan.data.limit,
            tokenizer=self.module.tokenizer,
            few_shot=self.plan.few_shot,
            protocol=self.plan.data.protocol,
            fit_window=self._fit_window(),
        )
        data.setup()
        return data


def _is_edit(content: Any) -> bool:
    """Return whether a part's content can be an intervention."""
    names = {"record", "directions", "sigma", "accuracy"}
    return (
        isinstance(content, dict)
        and content.keys() == names
        and isinstance(content["record"], dict)
        and all(isinstance(content[name], list) for name in names - {"record"})
        and len(content["record"].get("heads", ())) == len(content["directions"]) == len(content["sigma"])
    )


def _are_rows(questions: int, points: int, content: Any) -> bool:
    """Return whether a part's content can be every point's metrics of that many questions."""
    return (
        isinstance(content, list)
        and len(content) == questions
        and all(isinstance(rows, list) and len(rows) == points for rows in content)
        and all(isinstance(row, dict) for rows in content for row in rows)
    )


def _are_sums(points: int, content: Any) -> bool:
    """Return whether a part's content can be every point's divergence on some texts."""
    return (
        isinstance(content, dict)
        and content.keys() == {"sums", "tokens"}
        and all(isinstance(column, list) for column in content.values())
        and len(content["sums"]) == len(content["tokens"])
        and all(isinstance(row, list) and len(row) == points for row in content["sums"])
    )
