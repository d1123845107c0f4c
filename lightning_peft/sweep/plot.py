"""The picture of a sweep: what the task's measures cost in everything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from lightning_peft.compare.plots import INK
from lightning_peft.moved.sweeps import completed

_MARKERS = "osD^vPX*"


def against_divergence(results: Mapping[str, Any], *, ink: str = INK) -> Figure:
    """Plot two measures against KL(base ‖ edited), a line for each number of heads along its strengths.

    They are the primary measure and the one that points were chosen by; where these are one, its neighbour in the
    table, of which a task may have none. The base is the dashed line, its 95% interval the band about it. A point
    chosen on a fold's validation units has a ring.

    Args:
        results: the content of `results.json`, with divergences.
        ink: colour of text and lines.

    Returns:
        The figure, 5.5 inches wide for each measure.
    """
    results = completed(results)
    base, *points = results["points"]
    counts = sorted({point["num_heads"] for point in points})
    chosen = {(choice["num_heads"], choice["alpha"]) for choice in results["chosen"]}
    measures = _shown(results)
    figure = Figure(figsize=(5.5 * len(measures), 4.2), layout="constrained")
    figure.patch.set_alpha(0)
    panels = figure.subplots(1, len(measures), sharex=True, squeeze=False)[0]
    for axes, metric in zip(panels, measures, strict=True):
        of_base = base["metrics"][metric]
        axes.axhline(of_base["mean"], color=ink, alpha=0.6, linewidth=1, linestyle=(0, (4, 3)))
        axes.axhspan(of_base["low"], of_base["high"], color=ink, alpha=0.07, linewidth=0)
        for number, count in enumerate(counts):
            line = sorted((p for p in points if p["num_heads"] == count), key=lambda p: p["alpha"])
            x, y = [p["kl"]["mean"] for p in line], [p["metrics"][metric]["mean"] for p in line]
            color = colormaps["viridis"](0.9 * number / max(1, len(counts) - 1))
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(x, y, color=color, marker=marker, markersize=4.5, linewidth=1.4, label=f"K = {count}")
            for point, at in zip(line, zip(x, y, strict=True), strict=True):
                if (count, point["alpha"]) in chosen:
                    axes.plot(*at, "o", markersize=12, markerfacecolor="none", markeredgecolor=ink)
            for point, at in ((line[0], (x[0], y[0])), (line[-1], (x[-1], y[-1]))):
                label = f"α={point['alpha']:g}"
                axes.annotate(label, at, (4, 4), textcoords="offset points", color=ink, fontsize=7)
        axes.set_xscale("log")
        axes.set(xlabel="KL(base ‖ edited), nats per token", ylabel=results["measures"][metric]["label"])
        axes.grid(color=ink, alpha=0.12, linewidth=0.8)
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=ink, labelsize=9)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set_color(ink)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.axes[0].legend(frameon=False, labelcolor=ink, fontsize=9)
    return figure


def _shown(results: Mapping[str, Any]) -> list[str]:
    """Return at most two of the measures, in the table's order."""
    names = [name for name in results["measures"] if name in results["points"][0]["metrics"]]
    shown = {results["primary"], results["choose"]} & {*names}
    if len(shown) == 1 and len(names) > 1:
        (name,) = shown
        place = names.index(name)
        shown.add(names[place - 1 if place else 1])
    return [name for name in names if name in shown]


def save_picture(results: Mapping[str, Any], folder: Path) -> Path | None:
    """Write `sweep.png` on white; None where no divergence was measured, or too few units for an interval."""
    if results["points"][0]["kl"] is None or not _shown(completed(results)):
        return None
    path = folder / "sweep.png"
    against_divergence(results).savefig(path, facecolor="white", dpi=110)
    return path
