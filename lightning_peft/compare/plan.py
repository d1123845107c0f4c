"""The plan of a comparison: a model, a question set, and a list of rows, each with a way to adapt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_peft.callbacks import AdapterCallback, Edit
from lightning_peft.compare.answers import Answers
from lightning_peft.compare.decoding import Scoring
from lightning_peft.compare.files import hashed
from lightning_peft.moved import resolve
from lightning_peft.stack.adapter_files.names import check_folder_name
from lightning_peft.truthfulqa import Question, SideEffects
from lightning_peft.truthfulqa.folds import assign_folds
from lightning_peft.truthfulqa.protocols import ProtocolName, protocol_named

Kind = Literal["base", "prompt", "decoded", "tuned", "edited", "control", "stack"]

_AS_IT_IS: tuple[Kind, ...] = ("base", "prompt", "decoded")  # the model's weights and activations are its own
# arguments that callbacks had not in release 68ae323, and their defaults: at these, its finished cells still count
_LATER: dict[str, Any] = {"target_parameters": None, "sigma_texts": None, "tokenizer": None}


@dataclass
class Data:
    """The questions, the same for every row.

    Args:
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
    """

    source: str = "package"
    limit: int | None = None
    num_folds: int = 2
    val_fraction: float = 0.2
    seed: int = 0
    side_effects: SideEffects = field(default_factory=SideEffects)
    protocol: ProtocolName = "original"
    answers: Answers | None = None
    fit_window: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that scores depend on; one that came later is left out where it changes nothing."""
        values = asdict(self)
        del values["answers"]  # which are written after, by what a cell has saved
        if not self.fit_window:
            del values["fit_window"]
        return values


@dataclass
class Row:
    """One line of the table.

    Args:
        name: unique, short; names the cell folders.
        label: what the table says.
        kind: what sort of adaptation it is.
        callback: the callback that adapts; none for the base, for prompting and for decoding.
        scoring: for decoded rows, how choices are scored in place of the model's log-probabilities.
        few_shot: number of demonstrations, drawn from the training questions, in place of the 6-shot primer; 0 for no
            demonstration at all.
        draws: how often demonstrations are drawn; with each draw the adapted model is scored anew, and a question's
            score is the mean over draws.
        after: the name of an earlier row whose adapter lies below this one's.
        starts_from: the name of an earlier row whose adapter this one's training starts from, fold by fold: it becomes
            the callback's `init_from`.
        learning_rates: for tuned rows, the learning rates tried; the one with the lowest validation loss is taken.
        alphas: for edited rows, the strengths tried in place of the callback's own: computed from the inner training
            questions, the one with the highest MC2 on the inner validation questions is taken, of several the smallest.
        max_epochs: for tuned rows, the most epochs a trial runs; each ends when its validation loss stops falling.
        patience: for tuned rows, validation checks without a lower loss before a trial ends.
        batch_size: of training and capturing.
    """

    name: str
    label: str
    kind: Kind
    callback: AdapterCallback | None = None
    scoring: Scoring | None = None
    few_shot: int | None = None
    draws: int = 1
    after: str | None = None
    starts_from: str | None = None
    learning_rates: list[float] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    max_epochs: int = 10
    patience: int = 1
    batch_size: int = 16

    @property
    def edits(self) -> bool:
        """Return whether the adapter is computed, not trained."""
        return isinstance(self.callback, Edit)

    @property
    def earlier(self) -> list[str]:
        """The names of the rows whose adapters this one needs."""
        return [name for name in (self.after, self.starts_from) if name is not None]


@dataclass
class Plan:
    """One comparison, read from YAML by `lightning-peft compare --config`.

    Args:
        name: of the comparison.
        model: a causal language model on the Hugging Face hub, or a folder.
        data: the questions.
        rows: the table's lines; the one of kind `"base"` is what all others are compared with.
        output: the folder for cells, results and report; default `runs/<name>`.
        seed: of everything random in a cell.
        dtype: the torch dtype the weights are loaded in.
        accelerator: Lightning's accelerator.
    """

    name: str
    model: str
    rows: list[Row]
    data: Data = field(default_factory=Data)
    output: str | None = None
    seed: int = 0
    dtype: str = "float32"
    accelerator: str = "auto"


def check(plan: Plan) -> None:
    """Raise `ValueError` in one sentence for a plan that could not be run to its end."""
    if plan.output is None:
        check_folder_name(plan.name, "A comparison's name")
    names = [row.name for row in plan.rows]
    for name in names:
        check_folder_name(name, "A row's name")
    if len(set(names)) < len(names):
        raise ValueError(f"The rows' names must differ, got {', '.join(names)}.")
    bases = [row.name for row in plan.rows if row.kind == "base"]
    if len(bases) != 1:
        raise ValueError(f"A plan needs exactly one row of kind base to compare with, it has {len(bases)}.")
    for i, row in enumerate(plan.rows):
        for how, earlier in (("comes after", row.after), ("starts from", row.starts_from)):
            if earlier is not None and earlier not in names[:i]:
                raise ValueError(f"Row {row.name!r} {how} {earlier!r}, which is not an earlier row.")
            if earlier is not None and plan.rows[names.index(earlier)].callback is None:
                raise ValueError(f"Row {row.name!r} {how} {earlier!r}, which has no adapter.")
        if row.starts_from is not None and not hasattr(row.callback, "init_from"):
            raise ValueError(
                f"Row {row.name!r} starts from {row.starts_from!r}, but {type(row.callback).__name__} starts from "
                "nothing saved: HeadGains and HeadOffsets do."
            )
        if row.kind in _AS_IT_IS and row.callback is not None:
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
        if (row.few_shot or 0) < 0:
            raise ValueError(f"Row {row.name!r} asks for {row.few_shot} demonstrations, which is less than none.")
        if row.draws < 1 or (row.draws > 1 and not row.few_shot):
            raise ValueError(
                f"Row {row.name!r} has {row.draws} draws: at least 1, and more only with few_shot demonstrations."
            )
    protocol_named(plan.data.protocol)
    effects = plan.data.side_effects
    if 0 < effects.tokens < 2 * effects.length or effects.capability == 1:
        raise ValueError(
            f"side_effects need 2 documents ({2 * effects.length} tokens) and 2 questions for an interval, or 0 of "
            f"either for none, got {effects.tokens} tokens and {effects.capability} questions."
        )
    effects.questions()
    if (answers := plan.data.answers) is not None:
        answers.check()
        shown = [row.name for row in plan.rows if row.few_shot is not None]
        if shown and answers.preset != "qa":
            raise ValueError(
                f"Row {shown[0]!r} has few_shot, which goes with answers of the preset 'qa', not {answers.preset!r}."
            )
    if plan.data.num_folds < 2:
        raise ValueError(
            f"num_folds must be at least 2, so that tests are on unseen questions, got {plan.data.num_folds}."
        )


def check_questions(plan: Plan, questions: Sequence[Question]) -> None:
    """Raise `ValueError` where a fold leaves too few questions to draw a row's demonstrations from."""
    tested = Counter(assign_folds(questions, plan.data.num_folds, plan.data.seed))
    left = len(questions) - max(tested.values())
    for row in plan.rows:
        if (row.few_shot or 0) > left:
            raise ValueError(
                f"Row {row.name!r} asks for {row.few_shot} demonstrations, but a fold leaves {left} questions to draw "
                "them from."
            )


def cell_key(plan: Plan, settings: Mapping[str, Any], row: Row, data_hash: str, fold: int) -> str:
    """Return a hash of everything a cell's result depends on; a finished cell with another key is computed again.

    Args:
        plan: the plan.
        settings: the plan as it was written, row settings by name under `"rows"`.
        row: the cell's row.
        data_hash: hash of the questions.
        fold: the cell's test fold.
    """
    rows: Mapping[str, Any] = settings["rows"]
    by_name, needed = {r.name: r for r in plan.rows}, [row.name]
    for name in needed:  # which grows
        needed += by_name[name].earlier
    depends = [_as_in_the_first_release(rows[name]) for name in needed]
    return hashed([depends, plan.model, plan.dtype, plan.seed, plan.data.settings(), data_hash, fold])


def _as_in_the_first_release(settings: Any) -> Any:
    """Return a row's settings as the first release would have written them, so that its finished cells still count.

    Arguments that came later are left out where they change nothing; those that callbacks share, which are written
    now only where they are given, stood there always.
    """
    if isinstance(settings, list):
        return [_as_in_the_first_release(value) for value in settings]
    if not isinstance(settings, Mapping):
        return settings
    values = {name: value for name, value in settings.items() if name not in _LATER or value != _LATER[name]}
    if "class_path" in values and issubclass(callback := resolve(values["class_path"]), AdapterCallback):
        shared = {"backbone": None, "name": callback.default_name}
        if not callback.computed:
            shared |= {"backbone_dropout": False, "gradient_checkpointing": False}
        values["init_args"] = shared | dict(values.get("init_args") or {})
    return {name: _as_in_the_first_release(value) for name, value in values.items()}
