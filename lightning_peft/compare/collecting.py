"""The results of finished cells, put together: scores by question, intervals, differences, what the report needs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_peft import __version__
from lightning_peft.compare.answering import answer_rates, answer_scores, described
from lightning_peft.compare.effects import effect_scores, forgotten_scores
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.compare.statistics import mean_interval, minimal_detectable, paired_difference
from lightning_peft.compare.texts import shape_of, text_caveats
from lightning_peft.truthfulqa.metrics import mc0, mc1, mc2, mc3
from lightning_peft.truthfulqa.protocols import PROTOCOLS
from lightning_peft.truthfulqa.samples import TASKS, by_category

Scores = dict[str, dict[int, list[float]]]  # by metric and question, or document, one a draw of demonstrations
_PACKAGES = ("torch", "lightning", "transformers", "peft", "torchmetrics", "scikit-learn")


def collect(
    plan: Plan,
    settings: Mapping[str, Any],
    outcomes: Mapping[tuple[str, int], dict[str, Any]],
    answers: Mapping[tuple[str, int], list[dict[str, Any]]],
    questions: int,
    hashed: str,
    output: Path,
) -> dict[str, Any]:
    """Put finished cells together into the content of `results.json`.

    That is scores by question, side effects by document, free answers, intervals, paired differences and head
    accuracies.
    """
    base, options = next(row.name for row in plan.rows if row.kind == "base"), plan.data.answers
    scores = {row.name: _question_scores(plan, row, outcomes) for row in plan.rows}
    cells = {row.name: [(row.name, fold) for fold in range(plan.data.num_folds)] for row in plan.rows}
    effects = {n: effect_scores([outcomes[c]["effects"] for c in cs]) for n, cs in cells.items() if scores[n]}
    for name, measures in effects.items():
        if "capability" in measures and any((known := effects.get(base, {}).get("capability", {})).values()):
            measures["forgotten"] = forgotten_scores(known, measures["capability"])
        scores[name] |= _once(measures)
    answered = {n: [a for c in cs for a in answers[c]] for n, cs in cells.items() if all(c in answers for c in cs)}
    for name, written in answered.items():
        scores[name] |= _once(answer_scores(written))
    rows = [_row(plan, row, outcomes, scores, base) for row in plan.rows]
    for row in rows:
        row["rates"] = answer_rates(options, answered[row["method"]]) if options and row["method"] in answered else {}
    contrasts = []
    for a, b in _contrasted(plan):
        if scores[a] and scores[b]:
            change = _difference(scores[a]["mc2"], scores[b]["mc2"])
            contrasts.append({"a": a, "b": b, "metric": "mc2", **{k: change[k] for k in ("mean", "low", "high", "p")}})
    from_package = plan.data.source == "package"
    label = "this package's own question set" if from_package else "TruthfulQA"
    return {
        "name": plan.name,
        "data": {
            "source": plan.data.source,
            "label": f"{label}, {questions} questions",
            "questions": questions,
            "hash": hashed,
            "folds": plan.data.num_folds,
        },
        "model": _model(plan),
        "rows": rows,
        "contrasts": contrasts,
        "answers": None if options is None else described(options),
        "categories": _categories(plan, outcomes, scores),
        "head_accuracy": _head_accuracy(plan, output),
        "settings": dict(settings),
        "versions": {"lightning-peft": __version__} | {package: version(package) for package in _PACKAGES},
        "caveats": [*_caveats(plan, questions, from_package), *text_caveats(plan, outcomes)],
    }


def _question_scores(plan: Plan, row: Row, outcomes: Mapping[tuple[str, int], dict[str, Any]]) -> Scores:
    """Return the scores of each question by each metric over all folds, one a draw; empty if a fold failed."""
    folds = [outcomes[row.name, fold] for fold in range(plan.data.num_folds)]
    if any(outcome["failed"] for outcome in folds):
        return {}
    samples: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for outcome in folds:
        for sample in outcome["samples"]:
            samples[sample["question_id"], sample["draw"]].append(sample)
    ties = PROTOCOLS[plan.data.protocol].ties
    functions: dict[str, Callable[..., float]] = {
        "mc0": partial(mc0, ties=ties),
        "mc1": partial(mc1, ties=ties),
        "mc2": mc2,
        "mc3": mc3,
    }
    scores: Scores = {name: defaultdict(list) for name in functions}
    for (question, _), choices in samples.items():
        logprobs = torch.tensor([c["logprob"] for c in choices])
        for name, score in functions.items():
            truth = torch.tensor([c["mc2" if name == "mc3" else name] for c in choices])
            if {0, 1} <= set(truth.tolist()):
                scores[name][question].append(score(logprobs, truth))
    return {name: values for name, values in scores.items() if values}


def _row(
    plan: Plan,
    row: Row,
    outcomes: Mapping[tuple[str, int], dict[str, Any]],
    scores: Mapping[str, Scores],
    base: str,
) -> dict[str, Any]:
    folds = [outcomes[row.name, fold] for fold in range(plan.data.num_folds)]
    failed = next((outcome["failed"] for outcome in folds if outcome["failed"]), None)
    metrics, difference, draws = {}, {}, {}
    for name, values in scores[row.name].items():
        by_draw = _by_draw(values, values)
        interval = mean_interval(by_draw)
        metrics[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        if len(by_draw) > 1:
            draws[name] = by_draw.mean(1).tolist()
        if row.name != base and name in scores[base]:
            difference[name] = _difference(values, scores[base][name])
    chosen: dict[str, list[Any]] = defaultdict(list)
    for outcome in folds:
        for name, value in outcome["chosen"].items():
            chosen[name].append(value)
    return {
        "method": row.name,
        "label": row.label,
        "kind": row.kind,
        "metrics": metrics,
        "difference": difference or None,
        "draws": draws,
        "trainable_parameters": max(outcome["trainable_parameters"] for outcome in folds),
        "edited_parameters": max(outcome["edited_parameters"] for outcome in folds),
        "adapter_bytes": max(outcome["adapter_bytes"] for outcome in folds),
        "seconds": sum(outcome["seconds"] for outcome in folds),
        "scoring_seconds": sum(outcome["scoring_seconds"] for outcome in folds),
        "failed": failed,
        "chosen": dict(chosen),
    }


def _once(scores: Mapping[str, Mapping[int, float]]) -> Scores:
    """Return the scores of what is measured once, whatever the draws."""
    return {name: {i: [value] for i, value in values.items()} for name, values in scores.items()}


def _by_draw(values: Mapping[int, list[float]], questions: Iterable[int]) -> NDArray[np.float64]:
    """Return the scores of some questions, `[draws, n]`."""
    return np.array([values[question] for question in questions]).T


def _difference(a: Mapping[int, list[float]], b: Mapping[int, list[float]]) -> dict[str, float | None]:
    shared = sorted(a.keys() & b.keys())
    x, y = _by_draw(a, shared), _by_draw(b, shared)
    difference = paired_difference(x, y)
    return {
        "mean": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p": difference.p,
        "mde": minimal_detectable(x, y),
    }


def _contrasted(plan: Plan) -> list[tuple[str, str]]:
    """Return the pairs to contrast: edited against tuned and control rows, a stack against what it is on."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for row in plan.rows:
        kinds[row.kind].append(row.name)
    pairs = [(a, b) for a in kinds["edited"] for b in [*kinds["tuned"], *kinds["control"]]]
    return pairs + [(row.name, row.after) for row in plan.rows if row.kind == "stack" and row.after is not None]


def _categories(
    plan: Plan, outcomes: Mapping[tuple[str, int], dict[str, Any]], scores: Mapping[str, Scores]
) -> dict[str, dict[str, Any]]:
    """Return MC1 and MC2 with their intervals, by category and row; `n` is the number of questions."""
    category = {s["question_id"]: s["category"] for o in outcomes.values() for s in o["samples"]}
    table: dict[str, dict[str, Any]] = {name: {"n": n} for name, n in sorted(Counter(category.values()).items())}
    for row in plan.rows:
        for metric in TASKS:
            values = scores[row.name].get(metric, {})
            samples = [{"category": category[q], "acc": sum(accs) / len(accs)} for q, accs in values.items()]
            for name, score in by_category(samples).items():
                interval = {"mean": score.mean, "low": score.low, "high": score.high}
                table[name].setdefault(row.name, {})[metric] = interval
    return table


def _head_accuracy(plan: Plan, output: Path) -> dict[str, Any] | None:
    """Return the probe accuracy by layer and head, mean over folds, as the first edited row's adapters note it."""
    edited = next((row for row in plan.rows if row.kind == "edited"), None)
    if edited is None:
        return None
    notes = [
        output / "cells" / f"{edited.name}-fold{f}" / "adapter" / "lightning_peft.json"
        for f in range(plan.data.num_folds)
    ]
    records = [json.loads(path.read_text(encoding="utf-8")).get("record") for path in notes if path.exists()]
    if not records or any("accuracy" not in (record or {}) for record in records):
        return None
    accuracy = torch.tensor([record["accuracy"] for record in records]).mean(0)
    return {"accuracy": accuracy.tolist(), "selected": records[0]["heads"]}


def _model(plan: Plan) -> dict[str, Any]:
    from lightning_peft.backbone.fingerprint import fingerprint

    model: Any = shape_of(plan)
    config = model.config
    return {
        "pretrained": plan.model,
        "fingerprint": fingerprint(model)["names"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
    }


def _caveats(plan: Plan, questions: int, from_package: bool) -> list[str]:
    caveats = []
    if from_package:
        caveats.append(
            "These are the package's own questions, not TruthfulQA: the numbers cannot be compared with published ones."
        )
    if questions < 400:
        caveats.append(f"With {questions} questions only large differences can be detected.")
    caveats.append(
        "Tuned rows choose learning rate and epochs on held-out training questions; edited rows choose heads, and "
        "a strength where several are given, on held-out training questions."
    )
    source = Path(plan.model) / "source.txt"
    if source.is_file():
        caveats.append(f"Weights: {source.read_text(encoding='utf-8').strip()}")
    return caveats
