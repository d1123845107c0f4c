"""The plan of a sweep: a model, a question set, numbers of heads and strengths."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_peft.editing.directions import DIRECTIONS
from lightning_peft.positions import check_policy
from lightning_peft.stack.adapter_files.names import check_folder_name
from lightning_peft.tokens import Tokens
from lightning_peft.truthfulqa.settings import Data


@dataclass
class Sweep:
    """One sweep, read from YAML by `lightning-peft sweep --config`.

    Args:
        name: of the sweep.
        model: a causal language model on the Hugging Face hub, or a folder.
        num_heads: the numbers of heads (K).
        alphas: the strengths, in standard deviations along each head's direction. The base, which is strength 0, is
            always measured.
        data: the questions.
        split: `"validation"`: every point is computed from the inner training questions and measured on the inner
            validation questions of each fold, a point is chosen there, and the choice alone is computed anew from all
            questions outside the fold and measured on it. `"test"`: every point is computed from all questions
            outside a fold and measured on it; nothing can be chosen from that.
        choose: the metric by whose mean a point is chosen; ties go to the smaller divergence.
        direction: as in `callbacks.ITI`.
        positions: a selection within `"answer"`, as in `callbacks.ITI`: what comes before is shared by all points.
        val_fraction: share of the questions learnt from on which heads are ranked.
        C: inverse strength of the probes' L2 penalty.
        few_shot: that many demonstrations from the training questions in place of the 6-shot primer; 0 for none at all.
        kl_tokens: tokens of neutral text on which KL(base ‖ edited) is measured; 0 for none.
        rows: points of one call; more need more memory, and on a CPU beyond a few gain nothing.
        chunk: questions after which results are written.
        output: the folder for results; default `runs/<name>`.
        seed: of the heads' split and of random directions.
        dtype: the torch dtype the weights are loaded in.
        device: where to run; default a GPU where there is one.
    """

    name: str
    model: str
    num_heads: list[int]
    alphas: list[float]
    data: Data = field(default_factory=Data)
    split: Literal["validation", "test"] = "validation"
    choose: Literal["mc0", "mc1", "mc2"] = "mc2"
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
    dtype: str = "float32"
    device: str | None = None

    @property
    def points(self) -> list[tuple[int, float]]:
        """`(K, alpha)` of every point but the base."""
        return [(k, alpha) for k in self.num_heads for alpha in self.alphas if alpha != 0]


# what says how to run and not what to compute
_NOT_RESULTS = ("name", "rows", "chunk", "output", "device", "choose")


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
            f"A sweep shares each question's tokens among its points, so positions must lie within 'answer', got "
            f"{plan.positions!r}."
        )
    for name, value, least in (("rows", plan.rows, 1), ("chunk", plan.chunk, 1), ("kl_tokens", plan.kl_tokens, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if plan.data.answers is not None:
        raise ValueError("A sweep scores choices and writes no answers: leave data.answers out.")
    if (plan.few_shot or 0) < 0:
        raise ValueError(f"few_shot must be at least 0, got {plan.few_shot}.")
    if not 0.0 < plan.val_fraction < 1.0:
        raise ValueError(f"val_fraction must be between 0 and 1, got {plan.val_fraction}.")


def sweep_key(plan: Sweep, data_hash: str, model: dict[str, Any]) -> str:
    """Hash everything the numbers depend on; results under another key are computed again.

    Args:
        plan: the sweep.
        data_hash: hash of the questions.
        model: fingerprint of the base.
    """
    settings = {name: value for name, value in asdict(plan).items() if name not in _NOT_RESULTS}
    settings["data"] = plan.data.settings()
    return hashlib.sha256(json.dumps([settings, data_hash, model], sort_keys=True).encode()).hexdigest()
