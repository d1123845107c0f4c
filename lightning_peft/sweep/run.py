"""Run a sweep chunk by chunk, resumably, and put the results together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import nn

from lightning_peft.backbone.find_backbone import find_backbone
from lightning_peft.backbone.fingerprint import fingerprint
from lightning_peft.backbone.heads import HeadSite, head_sites
from lightning_peft.backbone.window import check_lengths, context_window
from lightning_peft.compare.writing import plural
from lightning_peft.editing.iti import HeadEdit
from lightning_peft.effects.slices import text_batches, text_slice
from lightning_peft.files.kept import kept
from lightning_peft.files.locking import only_writer
from lightning_peft.stack.adapter_files.saving import save_adapter
from lightning_peft.stack.stack import stack_of
from lightning_peft.sweep.fit import Statements, best_heads, fit
from lightning_peft.sweep.grid import Grid
from lightning_peft.sweep.results import Measured, best_point, collect, write_results
from lightning_peft.sweep.settings import Sweep, check, choice_task, chosen_by, sweep_key
from lightning_peft.sweep.texts import Batch, SplitTexts, check_texts, splits_of
from lightning_peft.tasks.arguments import described


def run(
    plan: Sweep, settings: Mapping[str, Any] | None = None, console: Console | None = None, wait: bool = False
) -> dict[str, Any]:
    """Measure every point, or take up where a killed run stopped; write `results.json`, `table.csv` and the choice.

    Every finished chunk of units is written whole under its own name, so a killed run loses at most a chunk. A part
    that is not as it was written is named and computed again.

    Args:
        plan: the sweep.
        settings: the plan as it was written, for the record; default its own description.
        console: where to report progress; default the terminal.
        wait: where another run writes to the same folder, wait for its end.

    Returns:
        The content of `results.json`: `points` (one entry a point, the base first), `chosen` and `confirmed` (by
        fold), and what was measured.

    Raises:
        ValueError: the sweep could not be run to its end.
        FolderInUseError: another run writes to the same folder.
    """
    check(plan)
    settings, console = described(plan)["init_args"] if settings is None else settings, console or Console()
    with only_writer(Path(plan.output or f"runs/{plan.name}"), wait, console.print):
        return _Run(plan, console, settings).results()


class _Run:
    def __init__(self, plan: Sweep, console: Console, settings: Mapping[str, Any]) -> None:
        self.plan, self.console, self.settings = plan, console, settings
        self.output = Path(plan.output or f"runs/{plan.name}")
        self.task = choice_task(plan)
        device = plan.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.module = self.task.module().eval().to(device)
        self.backbone, self.sites = _heads(self.module)
        available = sum(site.num_heads for site in self.sites)
        if max(plan.num_heads) > available:
            raise ValueError(f"num_heads is {max(plan.num_heads)}, but the model has {available} heads.")
        if plan.kl_tokens and not hasattr(self.module, "tokenizer"):
            raise ValueError(
                f"Neutral text is read with the module's tokenizer, which {type(self.module).__name__} has not: give "
                "it one, or set kl_tokens to 0."
            )
        self.splits = splits_of(plan, self.module)
        whole = [texts for name, texts in self.splits.items() if not name.startswith("validation")]
        self.units = sum(len(texts.units) for texts in whole)  # each is in one fold
        self.model = getattr(self.backbone, "name_or_path", "") or type(self.backbone).__name__
        check_texts(self.backbone, self.task.unit, self.splits)
        self.key = sweep_key(plan, fingerprint(self.backbone))

    def results(self) -> dict[str, Any]:
        measured, confirmed = Measured([(0, 0.0), *self.plan.points]), Measured([(0, 0.0), (-1, 0.0)])
        choose = chosen_by(self.plan)
        edits = self._fit()
        chosen: list[dict[str, Any]] = []
        for fold in range(self.task.folds):
            name = f"{self.plan.split}-fold{fold}"
            here = Measured(measured.points)
            here.add(*self._measure(name, edits[name], self.plan.points))
            measured.add(here.scores, here.divergences, here.tokens)
            if self.plan.split == "validation":
                best = best_point(here, choose, self.task.measures[choose].better)
                chosen.append({"fold": fold, "num_heads": best[0], "alpha": best[1]})
                name = f"chosen-fold{fold}"
                confirmed.add(*self._measure(name, edits[name], [best]))
                self._save(edits[name], best, fold)
        results = collect(
            self.plan, self.settings, self.model, self.units, measured, chosen, confirmed if chosen else None
        )
        if shown := [texts.demonstrations for texts in self.splits.values() if texts.demonstrations]:
            results["demonstrations"] = shown
            fitted, shots = min(shown)
            if fitted < shots:
                results["measured"] += f" {fitted} of {shots} demonstrations fit the context window."
        write_results(results, self.output)
        return results

    def _fit(self) -> dict[str, HeadEdit]:
        """Fit the interventions of every split to what it learns from."""
        edits: dict[str, HeadEdit] = {}
        statements: list[Statements] = []  # read when something is left to fit

        def fitted(texts: SplitTexts) -> dict[str, Any]:
            if not statements:
                self.console.print("reading the head outputs of the training statements", highlight=False)
                whole_first = sorted(self.splits, key=lambda name: name.startswith("validation"))
                read = Statements(self.backbone, self.sites, [self.splits[name] for name in whole_first])
                statements.append(read)
            edit = fit(self.plan, statements[0], texts)
            tensors = {"directions": edit.directions, "sigma": edit.sigma, "accuracy": edit.accuracy}
            return {"record": edit.record} | {name: tensor.tolist() for name, tensor in tensors.items()}

        for name, texts in self.splits.items():
            progress = f"{name}: probes of {texts.groups} {plural(self.task.unit)}"
            part = self._part(f"{name}-edit", progress, {}, partial(fitted, texts), _is_edit)
            directions, sigma, accuracy = (torch.tensor(part[key]) for key in ("directions", "sigma", "accuracy"))
            heads = [(layer, head) for layer, head in part["record"]["heads"]]
            edits[name] = HeadEdit(heads, directions, sigma, accuracy, part["record"])
        return edits

    def _measure(
        self, name: str, edit: HeadEdit, points: Sequence[tuple[int, float]]
    ) -> tuple[dict[int, list[dict[str, float]]], list[list[float]], list[int]]:
        """Measure each point on each unit of a split and on each neutral text.

        Returns:
            By unit each row's scores; of each text each row's summed divergence; the tokens of each text.
        """
        units, units_called = self.splits[name].units, plural(self.task.unit)
        edits = [(best_heads(edit, k), alpha) for k, alpha in points]
        grid = Grid(self.backbone, self.sites, edits, self.plan.positions, self.plan.rows)
        of_point = {"points": [list(point) for point in points]}
        scores: dict[int, list[dict[str, float]]] = {}
        for first in range(0, len(units), self.plan.chunk):
            some = dict(islice(units.items(), first, first + self.plan.chunk))
            progress = f"{name}: {units_called} {first + 1} to {first + len(some)} of {len(units)}"
            make = partial(self._scored, grid, list(some.values()))
            fits = partial(_are_rows, len(some), 1 + len(points))
            rows = self._part(f"{name}-{first:04d}", progress, of_point, make, fits)
            scores |= dict(zip(some, rows, strict=True))
        progress, fits = f"{name}: neutral text", partial(_are_sums, 1 + len(points))
        divergence = self._part(f"{name}-text", progress, of_point, partial(self._diverged, grid), fits)
        return scores, divergence["sums"], divergence["tokens"]

    def _scored(self, grid: Grid, batches: Sequence[Batch]) -> list[list[dict[str, float]]]:
        scores = zip(grid.scores(batches), batches, strict=True)
        return [[self._unit_scores(row, batch) for row in rows] for rows, batch in scores]

    def _unit_scores(self, logprobs: torch.Tensor, batch: Batch) -> dict[str, float]:
        scores = self.task.choice_scores(logprobs, batch)
        if unknown := scores.keys() - self.task.measures.keys():
            raise ValueError(
                f"{type(self.task).__name__}.choice_scores gives {', '.join(sorted(unknown))}, which is not among its "
                f"measures ({', '.join(self.task.measures)})."
            )
        return {name: float(score) for name, score in scores.items()}

    def _diverged(self, grid: Grid) -> dict[str, Any]:
        if not self.plan.kl_tokens:
            return {"sums": [], "tokens": []}
        text = text_slice(tokens=self.plan.kl_tokens, seed=self.plan.seed)
        tokenizer: Any = self.module.tokenizer
        ids = [batch["input_ids"][0] for batch in text_batches(text, tokenizer, batch_size=1)]
        window = context_window(self.backbone)
        if window is not None and window.fixed:
            check_lengths(self.backbone, map(len, ids), "neutral texts", cut=True)
            ids = [tokens[: window.tokens] for tokens in ids]
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

    def _save(self, edit: HeadEdit, point: tuple[int, float], fold: int) -> None:
        """Save the chosen point as an adapter folder."""
        stack, (count, alpha) = stack_of(self.backbone), point
        stack.put("iti", best_heads(edit, count).adapter(self.sites, alpha, self.plan.positions))
        save_adapter(self.backbone, self.output / f"adapter-fold{fold}")
        stack.remove("iti")


def _heads(module: L.LightningModule) -> tuple[nn.Module, list[HeadSite]]:
    """Return a module's backbone and its attention heads.

    Raises:
        ValueError: there is none, or it has no heads.
    """
    name = find_backbone(module, "backbone" if isinstance(getattr(module, "backbone", None), nn.Module) else None)
    backbone = module.get_submodule(name or "")
    try:
        return backbone, head_sites(backbone)
    except ValueError as error:
        raise ValueError(
            f"A sweep moves attention heads, and those of {type(backbone).__name__} cannot be found: {error}"
        ) from error


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


def _are_rows(units: int, points: int, content: Any) -> bool:
    """Return whether a part's content can be every point's scores of that many units."""
    return (
        isinstance(content, list)
        and len(content) == units
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
