"""ReFT that AdapterHub saved computes here what it computed there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapterhub_models import FOLDERS, base, logits_differ

from lightning_peft import AdapterError, import_adapterhub, load_adapter


def folder(kind: str, method: str, into: Path, **options: Any) -> Path:
    """A copy of AdapterHub's folder, with these options in its config."""
    shutil.copytree(FOLDERS / "reft" / kind / method, into)
    file = into / "adapter_config.json"
    values = json.loads(file.read_text())
    values["config"] |= options
    file.write_text(json.dumps(values))
    return into


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("method", "subtracts"), [("loreft", None), ("noreft", True), ("direft", False)])
def test_an_imported_adapter_computes_what_it_computed(
    kind: str, method: str, subtracts: bool | None, tmp_path: Path
) -> None:
    model = base(kind)
    imported = import_adapterhub(
        model, folder(kind, method, tmp_path / "in", subtract_projection=subtracts), tmp_path / "out"
    )
    assert imported.parts == {"reft": "REFT"}
    assert any("dropout=0.05" in note for note in imported.notes)
    assert any("counts positions anew" in note for note in imported.notes) == (kind != "bert")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, kind, method, f"reft/{kind}") <= 1e-6
    assert logits_differ(model, kind, "base") > 1e-2


def test_first_and_last_tokens_of_an_encoder_have_weights_of_their_own(tmp_path: Path) -> None:
    model = base("bert")
    import_adapterhub(model, folder("bert", "loreft_suffix", tmp_path / "in"), tmp_path / "out")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, "bert", "loreft_suffix", "reft/bert") <= 1e-6


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {}, "AdapterHub's NoReFT or its DiReFT, which it saves alike: write subtract_projection"),
        ("bert", {"subtract_projection": True, "prefix_positions": 0}, "prefix_positions=0 and .* edit no token"),
        ("bert", {"subtract_projection": True, "prefix_positions": -1}, "must not be negative, got -1"),
        ("bert", {"subtract_projection": True, "non_linearity": "wave"}, "non_linearity='wave' has no equal"),
        ("bert", {"subtract_projection": True, "layers": [7]}, r"layers=\[7\] names no layer"),
        ("bert", {"subtract_projection": True, "layers": "some"}, "layers='some' is neither all nor"),
        ("bert", {"subtract_projection": True, "output_reft": False}, "output_reft=False"),
        ("bert", {"subtract_projection": True, "layers": [0]}, "no encoder.layer.0.reft_layer"),
        ("vit", {"subtract_projection": True}, "not for a ViTForImageClassification"),
        ("t5", {"subtract_projection": True}, "not for a T5ForConditionalGeneration"),
    ],
)
def test_what_has_no_equal_is_refused_in_a_sentence(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = folder("bert", "noreft", tmp_path / "in", **options)
    file = source / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind}))
    with pytest.raises(AdapterError, match=message):
        import_adapterhub(base(kind), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
