"""The check, before the first cell runs, that the model can read all texts of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.backbone.window import check_lengths, check_loaded, context_window, lengths_of, loaded
from lightning_peft.compare.cell import data_of
from lightning_peft.compare.plan import Plan, Row


def check_texts(plan: Plan, cells: Sequence[tuple[Row, int]], output: Path) -> None:
    """Raise, or warn, where texts of the cells that are to run are longer than the model's context window.

    Args:
        plan: the plan.
        cells: row and fold of each that is to be computed.
        output: the comparison's folder, in which finished answers are.

    Raises:
        ContextWindowError: the model has no positions for so many tokens.
    """
    from transformers import AutoTokenizer

    model = shape_of(plan)
    if (window := context_window(model)) is None:
        return
    tokenizer, seen = AutoTokenizer.from_pretrained(plan.model), set()

    def new(*kind: Any) -> bool:
        """Return whether texts of this kind were not seen yet, in another row."""
        known = kind in seen
        seen.add(kind)
        return not known

    def prepared(row: Row, fold: int, draw: int = 0) -> Any:
        data = data_of(plan, row, fold, draw)
        data.tokenizer, data.fit_window = tokenizer, plan.data.fit_window and window.tokens
        data.setup()
        return data

    for row, fold in cells:
        for draw in range(row.draws):
            if new("test", row.few_shot, fold, draw):
                data = prepared(row, fold, draw)
                data.side_effects = plan.data.side_effects if fold == draw == 0 else None
                check_loaded(model, data.test_dataloader(), f"test texts of {row.name!r}")
        if row.callback is not None and new("training", row.edits, fold):
            check_loaded(model, prepared(row, fold).train_dataloader(), f"training texts of {row.name!r}")
    if (options := plan.data.answers) is None:
        return
    for row in plan.rows:
        for fold in range(plan.data.num_folds):
            written = (output / "cells" / f"{row.name}-fold{fold}" / "answers.json").exists()
            if row.kind != "decoded" and not written and new("answers", row.few_shot, fold):
                data = prepared(row, fold)
                data.prompting = options.prompting(data.protocol.instruction)
                lengths = (n for batch in loaded(data.predict_dataloader()) for n in lengths_of(batch))
                check_lengths(model, lengths, f"prompts of {row.name!r} with their answers", whole=True)


def shape_of(plan: Plan) -> nn.Module:
    """Return the plan's model without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plan.model))


def text_caveats(plan: Plan, outcomes: Mapping[tuple[str, int], Mapping[str, Any]]) -> Iterable[str]:
    """Yield a sentence for each row with fewer demonstrations than were asked for, or texts beyond the window."""
    for row in plan.rows:
        counted = [outcomes[row.name, fold].get("texts") or {} for fold in range(plan.data.num_folds)]
        shown = [counts for texts in counted for counts in texts.get("demonstrations", ())]
        if any(used < total for used, total in shown):
            fewest, most = min(used for used, _ in shown), max(used for used, _ in shown)
            number = str(most) if fewest == most else f"{fewest} to {most}"
            yield f"{row.label}: {number} of {shown[0][1]} demonstrations, for more do not fit the context window."
        if beyond := [texts["beyond"] for texts in counted if texts.get("beyond")]:
            yield f"{row.label}: {beyond[0]}."
