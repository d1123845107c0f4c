"""What an error message says behind a mistyped name."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from torch import nn

from lightning_peft.backbone.nearest_names import nearest_clause
from lightning_peft.stack.checks import check_targets


@pytest.mark.parametrize(
    ("known", "clause"),
    [
        (["layers.0.q_proj", "layers.1.q_proj", "head"], "; the nearest names are q_proj"),
        (["0", "3", "7"], "; the nearest names are 0, 3, 7"),
        ([], ""),
    ],
)
def test_names_are_offered_where_there_are_some(known: list[str], clause: str) -> None:
    assert nearest_clause("q_prj", known) == clause


@pytest.mark.parametrize(
    ("backbone", "end"),
    [(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "; the nearest names are 0, 1."), (nn.Linear(2, 2), "'9'.")],
)
def test_modules_with_numbers_for_names_are_offered_and_none_where_there_are_none(
    backbone: nn.Module, end: str
) -> None:
    with pytest.raises(ValueError, match="No module of the backbone is called '9'") as caught:
        check_targets(LoraConfig(target_modules=["9"]), backbone)
    assert str(caught.value).endswith(end)
