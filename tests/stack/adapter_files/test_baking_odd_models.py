"""Baking on models whose blocks cannot simply be tried: one sentence, or right."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_peft import bake, save_adapter
from lightning_peft.editing import layer_offsets_config, layer_sites
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.shrunk import shrunk_model


def saved_edit(model_type: str, folder: Path) -> nn.Module:
    """Save layer offsets of every block in `folder`; return the model without them."""
    model = shrunk_model(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]), model_type)
    stack = stack_of(model)
    part = stack.add(layer_offsets_config(layer_sites(model), 1.0, "all"), "edit", computed=True)
    for offsets in stack.tensors(part).values():
        offsets.fill_(0.5)
    save_adapter(model, folder)
    stack.remove("edit")
    return model


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("phimoe", "no bias in the PhimoeDecoderLayer adds the same"),  # its last matrix gives a tuple
        ("granitemoe_swa", "no bias in the GraniteMoeSWADecoderLayer adds the same"),  # it cannot be run once more
        ("fuyu", "cannot be tried, since it does not run on two tokens alone"),
        ("internlm3", "its configuration has no setting that gives it one"),  # one that its configuration refuses
    ],
)
def test_what_cannot_be_baked_is_one_sentence_and_leaves_nothing(tmp_path: Path, model_type: str, message: str) -> None:
    model = saved_edit(model_type, tmp_path / "edit")
    with pytest.raises(ValueError, match=message):
        bake(model, tmp_path / "edit", tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_biases_that_a_setting_gives_to_norms_too_are_written_as_zero(tmp_path: Path) -> None:
    made = bake(saved_edit("xlstm", tmp_path / "edit"), tmp_path / "edit", tmp_path / "baked")
    assert made.verification is not None and any("norm" in name for name in made.zeros)
