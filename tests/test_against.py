"""The comparison of two trees names what differs, to the last bit, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.against_cases import EDITS, TUNED, cases
from benchmarks.against_values import ERROR, compare, compare_loaded

Change = Callable[[dict[str, Any]], object]


def written(folder: Path, change: Change = lambda _: None) -> Path:
    """Write a case as a probe does, its values changed before."""
    values: dict[str, Any] = {
        "weight": torch.arange(6.0).view(2, 3),
        "odd": torch.tensor([float("nan"), -0.0]),
        "config": {"r": 2, "target_modules": ["q", "v"], "peft_version": "1"},
        "steps": {"loss": float("nan"), "taken": [1, 2]},
        "state": {"state_dict": {"scale": torch.tensor(2.0)}, "epoch": 1, "pytorch-lightning_version": "2"},
    }
    change(values)
    case = folder / "LoRA on llama"
    (case / "adapter").mkdir(parents=True)
    save_file({"weight": values["weight"], "odd": values["odd"]}, case / "adapter" / "adapter_model.safetensors")
    (case / "adapter" / "adapter_config.json").write_text(json.dumps(values["config"]))
    (case / "numbers.json").write_text(json.dumps(values["steps"]))
    torch.save(values["state"], case / "last.ckpt")
    return folder


def failed(folder: Path) -> Path:
    (folder / "LoRA on llama").mkdir(parents=True)
    described = {"error": "AttributeError", "message": "there is no LoRA\nat all"}
    (folder / "LoRA on llama" / ERROR).write_text(json.dumps(described))
    return folder


def by_one_bit(tensor: Tensor) -> Tensor:
    return torch.nextafter(tensor, torch.tensor(torch.inf))


def test_what_is_the_same_is_the_same_and_counted(tmp_path: Path) -> None:
    comparison = compare(written(tmp_path / "before"), written(tmp_path / "after"))
    assert not comparison.differing and not comparison.left_out
    assert (comparison.cases, comparison.values) == (1, 11)


DIFFERENT: dict[str, tuple[Change, str]] = {
    "one bit of a tensor": (lambda v: v.update(weight=by_one_bit(v["weight"])), "adapter_model.safetensors weight"),
    "the sign of a zero": (lambda v: v["odd"].abs_(), "adapter_model.safetensors odd"),
    "a dtype": (lambda v: v.update(weight=v["weight"].double()), "adapter_model.safetensors weight"),
    "a shape": (lambda v: v.update(weight=v["weight"].flatten()), "adapter_model.safetensors weight"),
    "a setting": (lambda v: v["config"].update(r=3), "adapter_config.json r: 2 became 3"),
    "a setting's type": (lambda v: v["config"].update(r=2.0), "adapter_config.json r: 2 became 2.0"),
    "one more setting": (lambda v: v["config"].update(bias="all"), "adapter_config.json bias: (absent) became all"),
    "one less setting": (lambda v: v["config"].pop("r"), "adapter_config.json r: 2 became (absent)"),
    "a number": (lambda v: v["steps"].update(loss=1.0), "numbers.json loss: nan became 1.0"),
    "an order": (lambda v: v["steps"]["taken"].reverse(), "numbers.json taken[0]: 1 became 2"),
    "a key of a checkpoint": (lambda v: v["state"].update(loops={}), "last.ckpt loops"),
    "a tensor of a checkpoint": (
        lambda v: v["state"]["state_dict"].update(scale=by_one_bit(torch.tensor(2.0))),
        "last.ckpt state_dict.scale: differ by up to 2.4e-07",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named(name: str, tmp_path: Path) -> None:
    change, expected = DIFFERENT[name]
    comparison = compare(written(tmp_path / "before"), written(tmp_path / "after", change))
    lines = [line.removeprefix("adapter/") for line in comparison.differing["LoRA on llama"]]
    assert any(line.startswith(expected) for line in lines)
    assert len(lines) <= 2  # of a file of tensors the bytes differ too


def test_versions_and_the_order_of_sets_are_not_compared(tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["config"] |= {"target_modules": ["v", "q"], "peft_version": "2"}
        values["state"]["pytorch-lightning_version"] = "3"

    assert not compare(written(tmp_path / "before"), written(tmp_path / "after", change)).differing


def test_a_case_that_only_the_present_tree_has_is_left_out_and_one_it_lost_differs(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    there, broken, nothing = written(tmp_path / "there"), failed(tmp_path / "broken"), tmp_path / "nothing"
    for before, reason in ((broken, "fails (AttributeError: there is no LoRA)"), (nothing, "is not there")):
        comparison = compare(before, there)
        assert comparison.left_out == {"LoRA on llama": reason} and not comparison.differing
        comparison = compare(there, before)
        assert comparison.differing == {"LoRA on llama": [f"{reason} in the present tree"]} and not comparison.cases


def test_loaded_logits_are_compared_with_those_of_what_was_saved(tmp_path: Path) -> None:
    logits = {"plain": torch.ones(2, 3)}
    places = {"saved": tmp_path / "saved"} | {name: tmp_path / "loaded" / name for name in ("folder", "checkpoint")}
    for place in places.values():
        (place / "CAA").mkdir(parents=True)
        save_file(logits, place / "CAA" / "logits.safetensors")
    assert not compare_loaded(tmp_path / "saved", tmp_path / "loaded").differing
    save_file({"plain": by_one_bit(logits["plain"])}, places["checkpoint"] / "CAA" / "logits.safetensors")
    (places["folder"] / "CAA" / ERROR).write_text(json.dumps({"error": "AdapterError", "message": "no"}))
    differing = compare_loaded(tmp_path / "saved", tmp_path / "loaded").differing
    assert differing["CAA from its folder"] == ["fails (AdapterError: no) in the present tree"]
    assert differing["CAA from its checkpoint"][0].startswith("plain: differ by up to 1.2e-07")


def test_a_method_that_no_case_names_is_a_case_by_its_default_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TUNED, "SSL")
    monkeypatch.delitem(EDITS, "Ablation")
    for name in ("block", "attention", "mlp"):
        monkeypatch.delitem(EDITS, f"Ablation of {name}")
    assert "SSL" in cases("tuning") and "SSL" not in cases("edits")
    assert "Ablation" in cases("edits") and "Ablation" not in cases("tuning")
