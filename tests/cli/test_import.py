"""`lightning-peft import`: what it writes and prints, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapterhub_models import FOLDERS, base, logits_differ
from tuning import one_sentence

from lightning_peft import load_adapter
from lightning_peft.cli import main


def run(adapter: Path, folder: Path, kind: str, *options: str) -> None:
    main(["import", str(adapter), str(folder), "--base", str(FOLDERS / kind / "base"), *options])


def failure(adapter: Path, folder: Path, kind: str, *options: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(adapter, folder, kind, *options)
    message = str(caught.value)
    assert one_sentence(message)
    assert not folder.exists()
    return message


def test_it_writes_a_folder_and_says_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(FOLDERS / "gpt2" / "mam", tmp_path / "out", "gpt2")
    assert capsys.readouterr().out == (
        f"Wrote {tmp_path / 'out'}, for a GPT2LMHeadModel: adapter (BOTTLENECK), prefix (ATTENTION_PREFIX).\n"
    )
    model = base("gpt2")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, "gpt2", "mam") <= 1e-6


def test_the_base_is_named_in_the_folder(tmp_path: Path) -> None:
    run(FOLDERS / "bert" / "lora", tmp_path / "out", "bert")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(FOLDERS / "bert" / "base")


def test_the_class_is_the_one_that_had_the_adapter_and_its_head_comes_along(tmp_path: Path) -> None:
    run(FOLDERS / "classifier" / "lora", tmp_path / "out", "classifier")
    model = base("classifier")
    load_adapter(model, tmp_path / "out")
    assert logits_differ(model, "classifier", "lora") <= 1e-6


def test_of_adapterhubs_own_class_the_base_says_which_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(FOLDERS / "classifier" / "own_head", tmp_path / "out", "bert")
    first, second = capsys.readouterr().out.splitlines()
    assert "for a BertForMaskedLM" in first
    assert "The head 'peer' of BertAdapterModel was left out" in second


def test_a_class_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(FOLDERS / "gpt2" / "houlsby", tmp_path / "out", "gpt2", "--model-class", "GPT2Model")
    assert "for a GPT2Model" in capsys.readouterr().out


def test_a_class_with_weights_that_nobody_has_is_refused(tmp_path: Path) -> None:
    message = failure(
        FOLDERS / "bert" / "lora", tmp_path / "out", "bert", "--model-class", "BertForSequenceClassification"
    )
    assert "has no weights for bert.pooler.dense.bias of a BertForSequenceClassification" in message


def test_gates_are_imported_where_asked_for(tmp_path: Path) -> None:
    assert "--token-gates" in failure(FOLDERS / "bert" / "unipelt", tmp_path / "out", "bert")
    run(FOLDERS / "bert" / "unipelt", tmp_path / "out", "bert", "--token-gates")
    assert (tmp_path / "out" / "stack.json").is_file()


def test_what_it_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    lora, out = FOLDERS / "bert" / "lora", tmp_path / "out"
    assert "nowhere does not exist" in failure(tmp_path / "nowhere", out, "bert")
    assert "neither a folder with a transformers config.json" in failure(lora, out, "no such architecture")
    assert "of the type gpt2, which no BertForMaskedLM can be" in failure(lora, out, "gpt2")
    assert "transformers has no model of the class BertForLuck" in failure(
        lora, out, "bert", "--model-class", "BertForLuck"
    )
    assert "dtype must be auto or name a torch dtype" in failure(lora, out, "bert", "--dtype", "float7")
    shutil.copytree(lora, tmp_path / "in")
    (tmp_path / "in" / "adapter.safetensors").unlink()
    assert "neither adapter.safetensors nor pytorch_adapter.bin" in failure(tmp_path / "in", out, "bert")
