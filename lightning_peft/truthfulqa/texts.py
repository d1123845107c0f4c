"""The check, before the first cell runs, that the model can read all texts of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_peft.backbone.window import check_lengths, check_loaded, context_window, lengths_of, loaded
from lightning_peft.tasks.cell import Cell

if TYPE_CHECKING:
    from lightning_peft.truthfulqa.task import TruthfulQA


def check_texts(task: TruthfulQA, missing: Sequence[Cell], cells: Sequence[Cell]) -> None:
    """Raise, or warn, where texts of the cells that are to run are longer than the model's context window.

    Args:
        task: the task.
        missing: the cells that are to be computed.
        cells: all of them, in some of which answers may be missing.

    Raises:
        ContextWindowError: the model has no positions for so many tokens.
    """
    from transformers import AutoTokenizer

    model = shape_of(task.model)
    if (window := context_window(model)) is None:
        return
    tokenizer, seen = AutoTokenizer.from_pretrained(task.model), set()

    def new(*kind: Any) -> bool:
        """Return whether texts of this kind were not seen yet, in another row."""
        known = kind in seen
        seen.add(kind)
        return not known

    def prepared(cell: Cell, draw: int = 0) -> Any:
        data = task.data(cell.split, **cell.options_of(draw))
        data.tokenizer, data.fit_window = tokenizer, task.fit_window and window.tokens
        data.setup()
        return data

    for cell in missing:
        shots, edits = cell.options.get("few_shot"), cell.options.get("edits", False)
        for draw in range(cell.draws):
            if new("test", shots, cell.fold, draw):
                data = prepared(cell, draw)
                data.side_effects = task.side_effects if cell.fold == draw == 0 else None
                check_loaded(model, data.test_dataloader(), f"test texts of {cell.row!r}")
        if cell.adapts and new("training", edits, cell.fold):
            check_loaded(model, prepared(cell).train_dataloader(), f"training texts of {cell.row!r}")
    if (options := task.answers) is None:
        return
    for cell in cells:
        written = (cell.folder / "answers.json").exists()
        if cell.scoring is None and not written and new("answers", cell.options.get("few_shot"), cell.fold):
            data = prepared(cell)
            data.prompting = options.prompting(data.protocol.instruction)
            lengths = (n for batch in loaded(data.predict_dataloader()) for n in lengths_of(batch))
            check_lengths(model, lengths, f"prompts of {cell.row!r} with their answers", whole=True)


def shape_of(model: str) -> nn.Module:
    """Return a model without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def text_caveats(cells: Sequence[Cell]) -> Iterable[str]:
    """Yield sentences on fewer demonstrations of a row than were to be, and on texts beyond the window."""
    counted = [cell.result.get("texts") or {} for cell in cells]
    shown = [counts for texts in counted for counts in texts.get("demonstrations", ())]
    if any(used < total for used, total in shown):
        fewest, most = min(used for used, _ in shown), max(used for used, _ in shown)
        number = str(most) if fewest == most else f"{fewest} to {most}"
        yield f"{cells[0].label}: {number} of {shown[0][1]} demonstrations, for more do not fit the context window."
    if beyond := [texts["beyond"] for texts in counted if texts.get("beyond")]:
        yield f"{cells[0].label}: {beyond[0]}."
