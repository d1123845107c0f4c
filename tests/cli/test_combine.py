"""`lightning-peft combine`: what it writes and prints, and its errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from edits import add_lora, close, logits
from tiny_models import tiny
from torch import Tensor, nn
from tuning import one_sentence

from lightning_peft import load_adapter, save_adapter
from lightning_peft.cli import main
from lightning_peft.stack.stack import stack_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two adapters, `a` and `b`, a model `base`, and `tuned` from it."""
    for name, target in (("a", "q_proj"), ("b", "v_proj")):
        model = tiny("llama")
        add_lora(model, [target])
        save_adapter(model, tmp_path / name)
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path


def run(folder: Path, *args: str) -> None:
    main(["combine", *(a if a.startswith("-") or not a[0].isalpha() else _named(folder, a) for a in args)])


def _named(folder: Path, word: str) -> str:
    return word if word in ("sum", "ties", "dare", "dare_ties") else str(folder / word)


def loaded(*folders: Path) -> nn.Module:
    model = tiny("llama")
    for path in folders:
        load_adapter(model, path, name=path.name)
    return model


def test_it_writes_the_weighted_sum_and_says_of_what(
    folder: Path, tokens: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, "a", "b", "out", "--weights", "1", "-0.5")
    assert re.fullmatch(r"Wrote \S+out: 1 x \S+a and -0.5 x \S+b\.\n", capsys.readouterr().out)
    both = loaded(folder / "a", folder / "b")
    stack_of(both).scale(-0.5, "b")
    assert close(logits(loaded(folder / "out"), tokens), logits(both, tokens))


def test_an_adapter_less_itself_is_nothing(folder: Path, tokens: Tensor) -> None:
    run(folder, "a", "a", "out", "--weights", "1", "-1")
    assert close(logits(loaded(folder / "out"), tokens), logits(tiny("llama"), tokens))


def test_a_cut_rank_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "a", "b", "out", "--method", "ties", "--density", "0.5", "--rank", "1")
    kept = re.search(r"kept (\d+\.\d+)% of its squared norm", capsys.readouterr().out)
    assert kept and 10 < float(kept[1]) < 95


def test_a_tuned_model_is_taken_as_its_difference_to_the_base(folder: Path, tokens: Tensor) -> None:
    run(folder, "tuned", "out", "--base", str(folder / "base"))
    expected = type(tiny("llama")).from_pretrained(folder / "tuned")
    assert close(logits(loaded(folder / "out"), tokens), logits(expected, tokens), 1e-6)
    run(folder, "tuned", "out", "less", "--weights", "1", "-1", "--base", str(folder / "base"))
    assert torch.equal(logits(loaded(folder / "less"), tokens), logits(tiny("llama"), tokens))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a", "b", "out", "--weights", "1"), "--weights needs one number for each of the 2 adapters."),
        (("a", "nowhere", "out"), "nowhere does not exist."),
        (("tuned", "out"), "name the one it was tuned from with --base."),
        (("base", "out", "--base", "/nowhere"), "/nowhere is neither a folder with a transformers config.json"),
        (("a", "out", "--density", "2", "--method", "ties"), "density must be in (0, 1], got 2.0."),
    ],
)
def test_what_cannot_be_combined_is_one_sentence(folder: Path, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        run(folder, *args)
    assert message in str(error.value) and not (folder / "out").exists()
    assert one_sentence(str(error.value).replace("config.json", "config"))
