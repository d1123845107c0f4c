"""The two pictures of a comparison: where probes read the label, and how far each method got.

Both return a :class:`matplotlib.figure.Figure` of its own, without pyplot's global state, so they can be drawn in any
thread and leave nothing open. The background is transparent; ``ink`` is the colour of text and lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lightning_peft.compare.results import Results, Row, completed, measure_named, measures_of

INK = "#1f2430"
KIND_COLORS = {
    # Okabe & Ito's colours, which readers with any colour vision tell apart, on white and on near-black.
    "base": "#7f7f7f",
    "prompt": "#cc79a7",
    "decoded": "#cc79a7",
    "tuned": "#0072b2",
    "edited": "#d55e00",
    "stack": "#009e73",
    "control": "#a0a0a0",
}
OTHER_KINDS = "#56b4e9"


def head_accuracy_map(head_accuracy: Mapping[str, Any], *, ink: str = INK) -> Figure:
    """Draw a heat map of probe accuracy, layers upwards and heads to the right, with the selected heads framed.

    The picture is Figure 2 of Li et al. 2023 (Inference-Time Intervention, arXiv:2306.03341) with heads in the order
    of the model rather than sorted.

    Args:
        head_accuracy: ``{"accuracy": [layers, heads], "selected": [[layer, head], ...]}``, accuracies in [0, 1].
        ink: Colour of text and lines.

    Returns:
        The figure, sized after the number of layers and heads, at most 9 inches wide for up to 40 heads.

    Raises:
        ValueError: The accuracies are no rectangle, or a selected head is outside it.

    Examples:
        >>> figure = head_accuracy_map({"accuracy": [[0.5, 0.6], [0.7, 0.5]], "selected": [[1, 0]]})
        >>> figure.axes[0].get_xlabel()
        'Head'
    """
    try:
        accuracy = np.atleast_2d(np.asarray(head_accuracy["accuracy"], dtype=float))
    except ValueError:
        raise ValueError("Head accuracies must be one row a layer of equal length, but the rows differ.") from None
    layers, heads = accuracy.shape
    outside = [site for site in head_accuracy["selected"] if not (0 <= site[0] < layers and 0 <= site[1] < heads)]
    if outside:
        raise ValueError(f"Selected head {outside[0]} is outside the map of {layers} layers and {heads} heads.")

    # Inches a cell: the map fills about a page, whatever the model, and cells are wide where there are few heads.
    width, height = np.clip(6.4 / heads, 0.17, 0.5), np.clip(5.6 / layers, 0.17, 0.34)
    figure = Figure(figsize=(heads * width + 1.8, max(layers * height + 0.9, 2.0)), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    image = axes.imshow(accuracy, origin="lower", cmap="viridis", aspect="auto", interpolation="none")
    for layer, head in head_accuracy["selected"]:
        # A light frame in a dark one shows on both ends of the colour map; inset, so that neighbours stay apart.
        for color, width in (("black", 2.2), ("white", 1.1)):
            frame = Rectangle((head - 0.36, layer - 0.36), 0.72, 0.72, fill=False, edgecolor=color, linewidth=width)
            axes.add_patch(frame)
    axes.set(xlabel="Head", ylabel="Layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    bar = figure.colorbar(image, ax=axes, label="Probe accuracy", fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    for part in (axes, bar.ax):
        _draw_with(part, ink)
    return figure


def by_method(results: Mapping[str, Any], metric: str | None = None, *, ink: str = INK) -> Figure:
    """Draw one line a method: its score (left) and its paired difference to base (right), each with its 95% interval.

    The right side is the one to compare by: intervals of two scores may overlap although the difference, which is
    paired by unit, is resolved.

    Args:
        results: The results of a comparison, as in ``results.json``; failed rows and rows without the measure are
            left out.
        metric: The measure's name; by default the one that ranks the rows, or where no row has that, the first.
        ink: Colour of text and lines.

    Returns:
        The figure, 11 inches wide; its height follows from the number of methods.

    Raises:
        ValueError: No row has a value of the measure.

    Examples:
        >>> row = {"label": "Base", "kind": "base", "metrics": {"f1": {"mean": 0.4, "low": 0.38, "high": 0.42}}}
        >>> [text.get_text() for text in by_method({"rows": [row]}, "f1").axes[0].get_yticklabels()]
        ['Base']
    """
    results = completed(results)
    metric = metric or drawn_measure(results)
    rows = [row for row in results["rows"] if _has(row, metric)]
    if metric is None or not rows:
        raise ValueError(f"There is nothing to draw: no row has a value of {metric or 'any measure'}.")
    measure = measure_named(results, metric)
    figure = Figure(figsize=(11, 0.34 * len(rows) + 1.0), layout="constrained")
    figure.patch.set_alpha(0)
    score, difference = figure.subplots(1, 2, sharey=True)
    for height, row in enumerate(rows):
        color = KIND_COLORS.get(row["kind"], OTHER_KINDS)
        _interval(score, height, row["metrics"][metric], color)
        if to_base := (row["difference"] or {}).get(metric):
            _interval(difference, height, to_base, color)
    for row in rows:
        if row["kind"] == "base":
            score.axvline(row["metrics"][metric]["mean"], color=ink, alpha=0.5, linewidth=0.9, linestyle=(0, (4, 3)))
    difference.axvline(0, color=ink, alpha=0.5, linewidth=0.9, linestyle=(0, (4, 3)))
    # Labels come from the user's plan: a dollar sign in one is a dollar sign, not the start of a formula.
    score.set_yticks(range(len(rows)), [row["label"] for row in rows], parse_math=False)
    score.set_ylim(len(rows) - 0.4, -0.6)
    lower = " (lower is better)" if measure.better < 0 else ""
    score.set_xlabel(f"{measure.label}{lower}", parse_math=False)
    difference.set_xlabel(f"{measure.label} difference to base{lower}", parse_math=False)
    for axes in (score, difference):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.grid(axis="x", color=ink, alpha=0.12, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        _draw_with(axes, ink)
    return figure


def drawn_measure(results: Results) -> str | None:
    """Return the primary measure, or where no row has a value of it the first of which one has; None for none."""
    names = [results["primary"], *measures_of(results)]
    return next((name for name in names if any(_has(row, name) for row in results["rows"])), None)


def _has(row: Row, metric: str | None) -> bool:
    return not row["failed"] and (row["metrics"].get(metric) or {}).get("mean") is not None


def _interval(axes: Axes, height: float, value: Mapping[str, Any], color: str) -> None:
    # Not errorbar: it takes lengths and refuses a mean that rounding has put just outside its interval.
    if value.get("low") is not None and value.get("high") is not None:
        axes.plot([value["low"], value["high"]], [height, height], color=color, linewidth=2.4, solid_capstyle="round")
    if value["mean"] is not None:
        axes.plot(value["mean"], height, "o", color=color, markersize=6)


def _draw_with(axes: Axes, ink: str) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(colors=ink, labelsize=9)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save_pictures(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the pictures as PNG files on white, for use outside the report.

    Args:
        results: the content of ``results.json``; without probes there is no heat map, without values no other.
        folder: where ``by_method.png`` and ``head_accuracy.png`` go; it must exist.

    Returns:
        The files written.
    """
    results = completed(results)
    figures = {}
    if drawn_measure(results) is not None:
        figures["by_method"] = by_method(results)
    if results.get("head_accuracy"):
        figures["head_accuracy"] = head_accuracy_map(results["head_accuracy"])
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], facecolor="white", dpi=110)
    return paths
