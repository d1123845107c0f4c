"""The plan of a sweep: a task, numbers of heads and strengths."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_peft.compare.plan import check_task
from lightning_peft.editing.directions import DIRECTIONS
from lightning_peft.files.kept import hashed
from lightning_peft.moved.plans import keep_old_plans
from lightning_peft.moved.sweeps import key_before
from lightning_peft.positions import check_policy
from lightning_peft.stack.adapter_files.names import check_folder_name
from lightning_peft.tasks import ChoiceTask, Split, Task
from lightning_peft.tasks.arguments import described, option_names
from lightning_peft.tokens import Tokens


@keep_old_plans("name", "model", "num_heads", "alphas", "data", "split")
@dataclass
class Sweep:
    """One sweep, read from YAML by `lightning-peft sweep --config`.

    Args:
        name: of the sweep.
        task: what is measured, and on which model: a `ChoiceTask`, such as `lightning_peft.truthfulqa.task.TruthfulQA`
            or one of your own.
        num_heads: the numbers of heads (K).
        alphas: the strengths, in standard deviations along each head's direction. The base, which is strength 0, is
            always measured.
        split: `"validation"`: every point is computed from the inner training units and measured on the inner
            validation units of each fold, a point is chosen there, and the choice alone is computed anew from all
            units outside the fold and measured on it. `"test"`: every point is computed from all units outside a fold
            and measured on it; nothing can be chosen from that.
        choose: the measure by whose mean a point is chosen; ties go to the smaller divergence. Default the task's
            primary one.
        direction: as in `callbacks.ITI`.
        positions: a selection within `"answer"`, as in `callbacks.ITI`: what comes before is shared by all points.
        val_fraction: share of the units learnt from on which heads are ranked.
        C: inverse strength of the probes' L2 penalty.
        few_shot: that many demonstrations from the training units before each prompt, for a task that has them; 0 for
            none at all; default as the task has it.
        kl_tokens: tokens of neutral text on which KL(base ‖ edited) is measured; 0 for none.
        rows: points of one call; more need more memory, and on a CPU beyond a few gain nothing.
        chunk: units after which results are written.
        output: the folder for results; default `runs/<name>`.
        seed: of the heads' split and of random directions.
        device: where to run; default a GPU where there is one.
    """

    name: str
    task: Task
    num_heads: list[int]
    alphas: list[float]
    split: Literal["validation", "test"] = "validation"
    choose: str | None = None
    direction: str = "mass_mean"
    positions: str = "answer"
    val_fraction: float = 0.2
    C: float = 1.0
    few_shot: int | None = None
    kl_tokens: int = 1000
    rows: int = 7
    chunk: int = 20
    output: str | None = None
    seed: int = 0
    device: str | None = None

    @property
    def points(self) -> list[tuple[int, float]]:
        """`(K, alpha)` of every point but the base."""
        return [(k, alpha) for k in self.num_heads for alpha in self.alphas if alpha != 0]


# what says how to run and not what to compute
_NOT_RESULTS = ("name", "rows", "chunk", "output", "device", "choose")


def choice_task(plan: Sweep) -> ChoiceTask:
    """Return the task of a sweep.

    Raises:
        ValueError: its units are no choices.
    """
    if not isinstance(plan.task, ChoiceTask):
        raise ValueError(
            f"A sweep scores choices, so its task must be a ChoiceTask, got {type(plan.task).__name__}: derive it from "
            "lightning_peft.tasks.ChoiceTask."
        )
    return plan.task


def chosen_by(plan: Sweep) -> str:
    """Return the name of the measure that points are chosen by."""
    return plan.choose or plan.task.primary


def check(plan: Sweep) -> None:
    """Raise `ValueError` in one sentence for a sweep that could not be run to its end."""
    if plan.output is None:
        check_folder_name(plan.name, "A sweep's name")
    for name, values in (("num_heads", plan.num_heads), ("alphas", plan.alphas)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} names a value twice: {', '.join(map(str, values))}.")
    if not plan.points:
        raise ValueError("A sweep needs at least one number of heads and one strength that is not 0.")
    if min(plan.num_heads) < 1:
        raise ValueError(f"num_heads must be at least 1, got {min(plan.num_heads)}.")
    if plan.direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {plan.direction!r}.")
    check_policy(plan.positions)
    if Tokens.parse(plan.positions).phase not in ("answer", "generated"):
        raise ValueError(
            f"A sweep shares each {plan.task.unit}'s tokens among its points, so positions must lie within 'answer', "
            f"got {plan.positions!r}."
        )
    for name, value, least in (("rows", plan.rows, 1), ("chunk", plan.chunk, 1), ("kl_tokens", plan.kl_tokens, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if (plan.few_shot or 0) < 0:
        raise ValueError(f"few_shot must be at least 0, got {plan.few_shot}.")
    if not 0.0 < plan.val_fraction < 1.0:
        raise ValueError(f"val_fraction must be between 0 and 1, got {plan.val_fraction}.")
    _check_task(plan)


def _check_task(plan: Sweep) -> None:
    task = choice_task(plan)
    check_task(task)
    of_units = [name for name, measure in task.measures.items() if measure.of_units]
    if chosen_by(plan) not in of_units:
        raise ValueError(
            f"choose must be a measure that each {task.unit} of {type(task).__name__} has a score of "
            f"({', '.join(of_units)}), got {chosen_by(plan)!r}."
        )
    if getattr(task, "answers", None) is not None:
        raise ValueError("A sweep scores choices and writes no answers: leave the task's answers out.")
    for inner in (False, True) if plan.split == "validation" else (False,):  # a split or an option that it has not
        task.data(Split(0, task.folds, task.seed, inner=inner), **data_options(plan))


def data_options(plan: Sweep) -> dict[str, Any]:
    """Return what the task's `data` is given beside the split.

    Raises:
        ValueError: the sweep sets demonstrations, which the task's data does not take.
    """
    taken = option_names(plan.task.data)
    values = {"edits": True, "units_per_batch": 1}
    if plan.few_shot is not None:
        if taken is not None and "few_shot" not in taken:
            raise ValueError(f"few_shot is {plan.few_shot}, but {type(plan.task).__name__}.data takes none.")
        values["few_shot"] = plan.few_shot
    return {name: value for name, value in values.items() if taken is None or name in taken}


def sweep_key(plan: Sweep, model: dict[str, Any]) -> str:
    """Hash everything the numbers depend on; results under another key are computed again.

    Args:
        plan: the sweep.
        model: fingerprint of the base.
    """
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    settings = {name: value for name, value in values.items() if name not in (*_NOT_RESULTS, "task")}
    task, depends_on = key_before(plan.task) or ({"task": described(plan.task)}, plan.task.depends_on())
    return hashed([settings | task, depends_on, model])
