"""`lightning-peft export`: of a checkpoint a folder, and of either a plain LoRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close, logits
from peft import LoraConfig, PeftModel
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, Language, fit, one_sentence

from lightning_peft import load_adapter, save_adapter
from lightning_peft.callbacks import LoRTA
from lightning_peft.cli import main
from lightning_peft.stack.stack import stack_of

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A module with LoRTA, and its folder and checkpoint, `saved` and `last.ckpt`."""
    folder, module = tmp_path_factory.mktemp("trained"), Language()
    fit(module, LoRTA(r=3, alpha=30.0)).save_checkpoint(folder / "last.ckpt")
    save_adapter(module, folder / "saved")
    return module, folder


@pytest.mark.parametrize("source", ["saved", "last.ckpt"])
def test_a_folder_and_a_checkpoint_are_written_as_plain_lora(
    source: str, trained: tuple[Any, Path], tmp_path: Path, tokens: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    module, folder = trained
    main(["export", str(folder / source), str(tmp_path / "lora"), "--as-lora"])
    assert re.fullmatch(r"Wrote \S+lora \([\d,]+ bytes of weights\)\.\n", capsys.readouterr().out)
    assert isinstance(config := LoraConfig.from_pretrained(tmp_path / "lora"), LoraConfig) and config.r == 3
    plain = PeftModel.from_pretrained(tiny("llama"), tmp_path / "lora").eval()
    expected = logits(module.model.eval(), tokens)
    assert close(logits(plain, tokens), expected) and not close(logits(tiny("llama"), tokens), expected, 1e-3)


def test_a_checkpoint_is_exported_as_it_was(trained: tuple[Any, Path], tmp_path: Path, tokens: Tensor) -> None:
    module, folder = trained
    main(["export", str(folder / "last.ckpt"), str(tmp_path / "out")])
    model = tiny("llama")
    load_adapter(model, tmp_path / "out")
    assert torch.equal(logits(model.eval(), tokens), logits(module.model.eval(), tokens))


def test_the_base_of_a_pissa_is_named(tmp_path: Path, tokens: Tensor) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model = tiny("llama")
    stack = stack_of(model)
    stack.add(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "a")
    for tensor in stack.tensors(stack["a"]).values():
        nn.init.normal_(tensor)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(SystemExit) as error:
        main(["export", str(tmp_path / "a"), str(tmp_path / "lora"), "--as-lora"])
    assert "names no base model: give it with --base." in str(error.value)
    main(["export", str(tmp_path / "a"), str(tmp_path / "lora"), "--as-lora", "--base", str(tmp_path / "base")])
    plain = PeftModel.from_pretrained(tiny("llama"), tmp_path / "lora").eval()
    assert close(logits(plain, tokens), logits(model.eval(), tokens))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("saved", "out"), "saved is an adapter folder already: give --as-lora to write it as plain LoRA."),
        (("nowhere", "out", "--as-lora"), "nowhere"),
        (("dora.ckpt", "out", "--as-lora"), "dora.ckpt does more than add a product to each matrix (use_dora)"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(
    args: tuple[str, ...], message: str, trained: tuple[Any, Path], tmp_path: Path
) -> None:
    _, folder = trained
    if args[0] == "dora.ckpt":
        from lightning_peft.callbacks import LoRA

        fit(Language(), LoRA(r=2, variant="dora")).save_checkpoint(folder / "dora.ckpt")
    with pytest.raises(SystemExit) as error:
        main(["export", str(folder / args[0]), str(tmp_path / args[1]), *args[2:]])
    assert message in str(error.value) and one_sentence(str(error.value).replace(".ckpt", ""))
    assert not (tmp_path / "out").exists()
