"""The plan of a comparison: a task, and a list of rows, each with a way to adapt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback

from lightning_peft.callbacks import Edit
from lightning_peft.files.kept import hashed
from lightning_peft.moved.names import keep_old_names
from lightning_peft.moved.plans import keep_old_plans
from lightning_peft.stack.adapter_files.names import check_folder_name
from lightning_peft.tasks.arguments import described, option_names
from lightning_peft.tasks.choices import ChoiceTask
from lightning_peft.tasks.measure import Measure
from lightning_peft.tasks.scoring import Scoring
from lightning_peft.tasks.task import Task

Kind = Literal["base", "prompt", "decoded", "tuned", "edited", "control", "stack"]

_LATER = ("max_steps", "epoch_steps")  # row settings that cells finished before them do not have
_AS_IT_IS: tuple[Kind, ...] = ("base", "prompt", "decoded")  # the model's weights and activations are its own


@dataclass
class Row:
    """One line of the table.

    Args:
        name: unique, short; names the cell folders.
        label: what the table says.
        kind: what sort of adaptation it is.
        callback: the callback that adapts, or, to train alone what stands outside a frozen backbone, any other of
            Lightning's; none for prompting, for decoding, and for a base that is the model as it is.
        scoring: for decoded rows, how choices are scored in place of the model's log-probabilities.
        few_shot: number of demonstrations, drawn from the training units, in place of the task's own; 0 for no
            demonstration at all.
        draws: how often demonstrations are drawn; with each draw the adapted model is scored anew, and a unit's
            score is the mean over draws.
        after: the name of an earlier row whose adapter lies below this one's.
        starts_from: the name of an earlier row whose adapter this one's training starts from, fold by fold: it becomes
            the callback's `init_from`.
        learning_rates: for tuned rows, the learning rates tried; the one with the lowest validation loss is taken.
        alphas: for edited rows, the strengths tried in place of the callback's own: computed from the inner training
            units, the one that is best on the inner validation units is taken, by the task's primary measure; of
            several the smallest.
        max_epochs: for tuned rows, the most epochs a trial runs; each ends when its validation loss stops falling.
        max_steps: for tuned rows, the most optimizer steps of a trial, if `max_epochs` are not over before; the last is
            followed by a validation.
        epoch_steps: for tuned rows, the training batches of an epoch, of which each ends with a validation; default
            all there are. Other batches come in the next epoch.
        patience: for tuned rows, validation checks without a lower loss before a trial ends.
        batch_size: of training and capturing; default the task's.
    """

    name: str
    label: str
    kind: Kind
    callback: Callback | None = None
    scoring: Scoring | None = None
    few_shot: int | None = None
    draws: int = 1
    after: str | None = None
    starts_from: str | None = None
    learning_rates: list[float] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    max_epochs: int = 10
    max_steps: int | None = None
    epoch_steps: int | None = None
    patience: int = 1
    batch_size: int | None = None

    @property
    def edits(self) -> bool:
        """Return whether the adapter is computed, not trained."""
        return isinstance(self.callback, Edit)

    @property
    def earlier(self) -> list[str]:
        """The names of the rows whose adapters this one needs."""
        return [name for name in (self.after, self.starts_from) if name is not None]


@keep_old_plans("name", "model", "rows", "data", "output", "seed", "dtype", "accelerator")
@dataclass
class Plan:
    """One comparison, read from YAML by `lightning-peft compare --config`.

    Args:
        name: of the comparison.
        rows: the table's lines; the one of kind `"base"` is what all others are compared with.
        task: what they are compared on.
        output: the folder for cells, results and report; default `runs/<name>`.
        seed: of everything random in a cell.
        seeds: several in place of `seed`: every row is run with each, and a unit's score is the mean over them.
        accelerator: Lightning's accelerator.
    """

    name: str
    rows: list[Row]
    task: Task
    output: str | None = None
    seed: int = 0
    accelerator: str = "auto"
    seeds: list[int] | None = None

    @property
    def all_seeds(self) -> list[int]:
        """The seeds that every row is run with."""
        return [self.seed] if self.seeds is None else self.seeds

    def folder_name(self, row: str, seed: int, fold: int) -> str:
        """Return the name of a cell's folder; with one seed it has no part of it."""
        return f"{row}-fold{fold}" if len(self.all_seeds) == 1 else f"{row}-seed{seed}-fold{fold}"


def row_options(task: Task, row: Row) -> dict[str, Any]:
    """Return the options of a row that the task's `data` takes, beside the draw of demonstrations.

    Raises:
        ValueError: the row sets one that it does not take.
    """
    taken = option_names(task.data)
    values = {"batch_size": row.batch_size, "few_shot": row.few_shot, "draw": row.draws if row.draws > 1 else None}
    chosen = {name: value for name, value in values.items() if value is not None}
    if taken is not None and (unknown := sorted(chosen.keys() - taken)):
        names = ["draws" if name == "draw" else name for name in unknown]
        raise ValueError(
            f"Row {row.name!r} sets {' and '.join(names)}, which {type(task).__name__}.data does not take: leave it "
            f"out, or let data take {' and '.join(unknown)}."
        )
    chosen.pop("draw", None)
    if row.edits and (taken is None or "edits" in taken):
        chosen["edits"] = True
    return chosen


def check(plan: Plan) -> None:
    """Raise `ValueError` in one sentence for a plan that could not be run to its end."""
    if plan.output is None:
        check_folder_name(plan.name, "A comparison's name")
    names = [row.name for row in plan.rows]
    for name in names:
        check_folder_name(name, "A row's name")
    if len(set(names)) < len(names):
        raise ValueError(f"The rows' names must differ, got {', '.join(names)}.")
    seeds = plan.all_seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more numbers that differ, got {seeds}: leave it out for seed alone.")
    bases = [row.name for row in plan.rows if row.kind == "base"]
    if len(bases) != 1:
        raise ValueError(f"A plan needs exactly one row of kind base to compare with, it has {len(bases)}.")
    for i, row in enumerate(plan.rows):
        _check_row(row, plan.rows[:i])
    check_task(plan.task)
    options = {}
    for row in plan.rows:
        if row.scoring is not None and not isinstance(plan.task, ChoiceTask):
            raise ValueError(
                f"Row {row.name!r} has a scoring, but {type(plan.task).__name__} scores no choices: a scoring goes "
                "with a ChoiceTask."
            )
        options[row.name] = row_options(plan.task, row)
    plan.task.records.check_rows(options)


def check_task(task: Task) -> None:
    """Raise `ValueError` in one sentence for a task that nothing can be compared on."""
    name, measures = type(task).__name__, getattr(task, "measures", None)
    if not measures:
        raise ValueError(f"{name} has no measures: set `measures` to a dict of Measure by name.")
    _check_measures(f"measures of {name}", measures)
    if task.primary not in measures:
        raise ValueError(f"The primary measure of {name} is {task.primary!r}, but it measures {', '.join(measures)}.")
    sections = task.sections
    for section in sections:
        _check_measures(f"measures of the section {section.name!r} of {name}", section.measures)
        if same := [measure for measure in section.measures if measure in measures]:
            raise ValueError(f"The section {section.name!r} of {name} measures {same[0]!r}, as the task itself does.")
    try:
        inspect.signature(task.data).bind(None)
    except TypeError as error:
        raise ValueError(
            f"{name}.data must take a split and nothing else that has no default, as data(self, split): {error}."
        ) from error
    task.check()
    if task.folds != 1 and task.own_test_set:
        raise ValueError(f"{name} has a test set of its own, which is tested in 1 fold, got folds {task.folds}.")
    if task.folds < 2 and not task.own_test_set:
        raise ValueError(
            f"folds of {name} must be at least 2, so that tests are on unseen {task.unit}s, got {task.folds}."
        )


def _check_measures(place: str, measures: object) -> None:
    """Raise `ValueError` in one sentence for what is no mapping of measures."""
    if not isinstance(measures, Mapping):
        raise ValueError(f"{place} must be a dict of Measure by name, got a {type(measures).__name__}.")
    for name, measure in measures.items():
        if not isinstance(measure, Measure):
            raise ValueError(f"{place} must be a dict of Measure by name, but {name!r} is a {type(measure).__name__}.")


def _check_row(row: Row, before: list[Row]) -> None:
    """Raise `ValueError` in one sentence for a row that cannot be run behind those before it."""
    names = [other.name for other in before]
    for how, earlier in (("comes after", row.after), ("starts from", row.starts_from)):
        if earlier is not None and earlier not in names:
            raise ValueError(f"Row {row.name!r} {how} {earlier!r}, which is not an earlier row.")
        if earlier is not None and before[names.index(earlier)].callback is None:
            raise ValueError(f"Row {row.name!r} {how} {earlier!r}, which has no adapter.")
    if row.starts_from is not None and not hasattr(row.callback, "init_from"):
        raise ValueError(
            f"Row {row.name!r} starts from {row.starts_from!r}, but {type(row.callback).__name__} starts from "
            "nothing saved: HeadGains and HeadOffsets do."
        )
    if row.kind in _AS_IT_IS and row.kind != "base" and row.callback is not None:
        raise ValueError(f"Row {row.name!r} is of kind {row.kind} and can have no callback.")
    if (row.kind == "decoded") != (row.scoring is not None):
        raise ValueError(
            f"Row {row.name!r} is of kind {row.kind}; rows of kind decoded, and no others, have a scoring."
        )
    if row.kind not in _AS_IT_IS and row.callback is None:
        raise ValueError(f"Row {row.name!r} is of kind {row.kind} and needs a callback.")
    if row.callback is not None and not row.edits and not row.learning_rates:
        raise ValueError(f"Row {row.name!r} is tuned and needs learning_rates to choose from.")
    if row.alphas and not (row.edits and hasattr(row.callback, "alpha")):
        raise ValueError(f"Row {row.name!r} has alphas to choose from, but is no edit with a strength alpha.")
    for name in ("max_epochs", "max_steps", "epoch_steps"):
        if (value := getattr(row, name)) is not None and value < 1:
            raise ValueError(f"Row {row.name!r} has {name} {value}: it must be at least 1.")
    if (row.few_shot or 0) < 0:
        raise ValueError(f"Row {row.name!r} asks for {row.few_shot} demonstrations, which is less than none.")
    if row.draws < 1 or (row.draws > 1 and not row.few_shot):
        raise ValueError(
            f"Row {row.name!r} has {row.draws} draws: at least 1, and more only with few_shot demonstrations."
        )


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return a plan made in Python as plain values, as one read from YAML was written; row settings by name."""
    rows = {row.name: described(row)["init_args"] for row in plan.rows}
    seeds = {} if plan.seeds is None else {"seeds": plan.seeds}
    return {"name": plan.name, "rows": rows, "task": described(plan.task), "seed": plan.seed} | seeds


def cell_key(plan: Plan, settings: Mapping[str, Any], row: Row, fold: int, seed: int | None = None) -> str:
    """Return a hash of everything a cell's result depends on; a finished cell with another key is computed again.

    Args:
        plan: the plan.
        settings: the plan as it was written, row settings by name under `"rows"`.
        row: the cell's row.
        fold: the cell's test fold.
        seed: the cell's; default the plan's first.
    """
    seed = plan.all_seeds[0] if seed is None else seed
    rows: Mapping[str, Any] = settings["rows"]
    by_name, needed = {r.name: r for r in plan.rows}, [row.name]
    for name in needed:  # which grows
        needed += by_name[name].earlier
    of_rows = [{k: v for k, v in rows[name].items() if k not in _LATER or v is not None} for name in needed]
    return hashed(plan.task.records.depends_on(of_rows, seed, fold))


keep_old_names(__name__)
