"""The command beside Lightning's verbs: what each prints and writes, and its errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningModule
from lightning.pytorch.demos.boring_classes import BoringDataModule
from tuning import ROOT, python

from lightning_peft import load_adapter, save_adapter
from lightning_peft.cli import COMMANDS, main
from lightning_peft.stack.adapter_files.folder import COMPRESSED, WEIGHTS


@pytest.fixture(scope="module")
def fitted(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which LoRA has been fitted from a recipe: `base`, `lora.yaml`, `lora.ckpt`, `adapter`, `start`."""
    from lightning.pytorch import seed_everything

    from lightning_peft.callbacks import LoRA
    from lightning_peft.models import CausalLM

    folder = tmp_path_factory.mktemp("fitted")
    recipe = yaml.safe_load((ROOT / "configs" / "lora.yaml").read_text())
    recipe["model"]["init_args"] |= {"pretrained": str(tiny_folder("llama")), "learning_rate": 0.02}
    recipe["data"]["init_args"]["limit"] = 24
    recipe["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 4}
    recipe["trainer"] |= {"default_root_dir": str(folder / "runs"), "logger": False}
    recipe["trainer"]["callbacks"][1]["init_args"]["dirpath"] = str(folder)
    (folder / "lora.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "base").symlink_to(tiny_folder("llama"))
    main(["fit", "--config", str(folder / "lora.yaml")])
    seed_everything(0)
    module = CausalLM(str(folder / "base"))
    LoRA(r=8, alpha=16).apply(module)
    save_adapter(module, folder / "start")
    main(["export", str(folder / "lora.ckpt"), str(folder / "adapter")])
    return folder


def failure(*args: object) -> str:
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    return str(caught.value)


# -- the command itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(args)
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if COMMANDS[name].file not in ("verbs", "completion")])
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        main([command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
    printed = capsys.readouterr().out
    assert f"lightning-peft {command}" in printed and "--" in printed


@pytest.mark.parametrize(
    ("typed", "nearest"), [("mrge", "merge"), ("comprss", "compress"), ("tset", "test"), ("q", "")]
)
def test_an_unknown_command_is_answered_with_the_nearest(typed: str, nearest: str) -> None:
    said = failure(typed)
    assert said.startswith(f"lightning-peft has no command '{typed}'") and nearest in said
    assert said.count(".") == 1 and said.endswith(".")


def test_completion_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion"])
    line = capsys.readouterr().out
    assert line.startswith("complete ") and all(name in line.split('"')[1].split() for name in COMMANDS)


def test_no_command_is_imported_before_it_is_called() -> None:
    python("import sys, lightning_peft.cli\nassert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)")


# -- plan ------------------------------------------------------------------------------------------------------------


def test_plan_takes_the_recipe_of_fit_and_is_right(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", str(fitted / "lora.yaml"), "--batch_size", "2", "--length=16", "--json"])
    found = json.loads(capsys.readouterr().out)
    state = torch.load(fitted / "lora.ckpt", weights_only=True)["state_dict"]
    assert found["trainable"] == sum(tensor.numel() for tensor in state.values())
    assert found["checkpoint_bytes"] == pytest.approx((fitted / "lora.ckpt").stat().st_size, rel=0.04)
    assert found["adapters"][0]["modules"] == {"q_proj": 3, "v_proj": 3}
    assert found["activation_bytes"] > 0 and found["notes"] == []


def test_plan_prints_a_table(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", str(fitted / "lora.yaml")])
    printed = capsys.readouterr().out
    assert "2,688 of 28,000 parameters are trained (9.600 %)." in printed
    assert all(word in printed for word in ("3 × q_proj", "gradients", "optimizer state (AdamW)", "checkpoint"))


def test_plan_needs_neither_weights_nor_tokenizer_nor_data(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((fitted / "base" / "config.json").read_text())
    options = [f"--model.init_args.pretrained={tmp_path}", "--data.init_args.source=/nowhere", "--json"]
    main(["plan", "--config", str(fitted / "lora.yaml"), *options, "--trainer.accelerator=gpu"])
    assert json.loads(capsys.readouterr().out)["trainable"] == 2688


def test_plan_sees_the_optimizer_and_precision_of_the_command_line(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--optimizer=torch.optim.SGD", "--optimizer.lr=0.1", "--trainer.precision=bf16-true", "--json"]
    main(["plan", "--config", str(fitted / "lora.yaml"), *options])
    found = json.loads(capsys.readouterr().out)
    assert (found["optimizer"], found["optimizer_bytes"]) == ("SGD", 0)
    assert found["frozen_bytes"] < 101_280 * 0.6


def test_plan_says_in_one_sentence_what_is_wrong(fitted: Path) -> None:
    recipe = yaml.safe_load((fitted / "lora.yaml").read_text())
    recipe["trainer"]["callbacks"][0]["init_args"]["target_modules"] = ["q_prj"]
    (fitted / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    assert "nearest names are" in failure("plan", "--config", fitted / "wrong.yaml")
    assert "at least 1" in failure("plan", "--config", fitted / "lora.yaml", "--length=0")


class Reading(LightningModule):
    """Looks at the values of its weights while it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 2)
        self.norm = float(self.net.weight.norm())


def test_a_module_that_reads_values_while_it_is_made_is_refused(tmp_path: Path) -> None:
    recipe = {
        "model": {"class_path": f"{Reading.__module__}.Reading"},
        "data": {"class_path": f"{BoringDataModule.__module__}.BoringDataModule"},
    }
    callback = {"class_path": "lightning_peft.callbacks.LoRA", "init_args": {"backbone": "net"}}
    recipe |= {"trainer": {"callbacks": [callback]}}
    (tmp_path / "reading.yaml").write_text(yaml.safe_dump(recipe))
    assert "reads values while it is made" in failure("plan", "--config", tmp_path / "reading.yaml")


# -- export and merge ------------------------------------------------------------------------------------------------


def test_export_writes_what_peft_reads(fitted: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(fitted / "base"), fitted / "adapter")
    saved = torch.load(fitted / "lora.ckpt", weights_only=True)["state_dict"]
    own = [value for name, value in model.state_dict().items() if "lora_" in name]
    assert sorted(float(v.sum()) for v in own) == sorted(float(v.sum()) for v in saved.values())


@pytest.mark.parametrize("source", ["lora.ckpt", "adapter"])
def test_merge_takes_a_checkpoint_or_a_folder(fitted: Path, tmp_path: Path, source: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(["merge", str(fitted / source), str(tmp_path / "merged"), "--base", str(fitted / "base")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = AutoModelForCausalLM.from_pretrained(fitted / "base").eval()
    load_adapter(adapted, fitted / "adapter")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("true").input_ids


def test_what_stands_outside_the_backbone_is_named(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lightning as L

    from lightning_peft.callbacks import LoRA
    from lightning_peft.models import SequenceClassifier

    module = SequenceClassifier(str(tiny_folder("llama")), num_labels=2)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    LoRA(r=2).apply(module)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    main(["export", str(tmp_path / "head.ckpt"), str(tmp_path / "adapter")])
    main(["merge", str(tmp_path / "head.ckpt"), str(tmp_path / "merged"), "--base", str(tiny_folder("llama"))])
    printed = capsys.readouterr().out
    assert printed.count("head.weight, head.bias") == 2 and "LlamaModel" in printed


def test_a_checkpoint_that_only_unpickling_reads_is_refused_unless_it_is_trusted(fitted: Path, tmp_path: Path) -> None:
    whole = torch.load(fitted / "lora.ckpt", weights_only=True)
    # made by a call of what another call gives, which nothing can stand for
    whole["callbacks"]["mine"] = MadeByMethod()
    torch.save(whole, tmp_path / "odd.ckpt")
    for command in (["export"], ["merge", "--base", fitted / "base"]):
        given = [command[0], tmp_path / "odd.ckpt", tmp_path / command[0], *command[1:]]
        said = failure(*given)
        assert "builtins.getattr" in said and "(--trust)" in said and not (tmp_path / command[0]).exists()
        main([*map(str, given), "--trust"])
        assert (tmp_path / command[0]).is_dir()


class MadeByMethod:
    """An object that is pickled as a call of its class's method."""

    def __reduce__(self) -> tuple[Any, ...]:
        return MadeByMethod.make, ()

    @classmethod
    def make(cls) -> MadeByMethod:
        return cls()


# -- compress --------------------------------------------------------------------------------------------------------


def test_a_trained_adapter_survives_compression(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(fitted / "adapter"), str(tmp_path / "small"), "--density=0.3", "--alpha=auto"]
    given += ["--config", str(fitted / "lora.yaml")]
    main(["compress", *given, "--initial", str(fitted / "start")])
    printed = capsys.readouterr().out
    tried = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("alpha ")]
    before, after = (float(printed.split("val_loss: ")[1].split()[i]) for i in (0, 2))
    base = _score(fitted)
    assert before < base - 0.1, "training did something"
    assert after == min(tried) and len(tried) == 9
    assert base - after > 0.8 * (base - before), "most of it is left"
    assert "times smaller" in printed and "not known" not in printed
    size = (tmp_path / "small" / COMPRESSED).stat().st_size
    assert f"{(fitted / 'adapter' / WEIGHTS).stat().st_size:,} bytes before, {size:,} after" in printed


def _score(fitted: Path) -> float:
    """The base model's validation loss: an adapter at its start changes nothing."""
    from lightning_peft.cli.validation import Scorer

    return Scorer(str(fitted / "lora.yaml"), "val_loss").score(fitted / "start")


def test_choices_are_scored_only_where_they_are_the_score(fitted: Path) -> None:
    from lightning_peft.cli.validation import Scorer

    for monitor, asked in (
        ("val_loss", {"val_loss"}),
        ("val_mc2", {"val_loss", "val_mc0", "val_mc1", "val_mc2", "val_mc3"}),
    ):
        scorer = Scorer(str(fitted / "lora.yaml"), monitor)
        assert scorer.score(fitted / "adapter") == scorer.trainer.callback_metrics[monitor]
        assert scorer.trainer.callback_metrics.keys() == asked


def test_a_start_that_is_not_known_is_said(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compress", str(fitted / "adapter"), str(tmp_path / "small")])
    printed = capsys.readouterr().out
    assert "The start of 6 tensors is not known" in printed and "lora_A" in printed
    main(["decompress", str(tmp_path / "small"), str(tmp_path / "plain")])
    assert (tmp_path / "plain" / WEIGHTS).is_file()


WRONG: dict[str, tuple[list[Any], str]] = {
    "export no file": (["export", "nowhere.ckpt", "out"], "nowhere.ckpt does not exist"),
    "export no checkpoint": (["export", "lora.yaml", "out"], "lora.yaml is no checkpoint"),
    "merge nothing": (["merge", "nowhere", "out"], "nowhere does not exist"),
    "merge over something": (["merge", "adapter", "start", "--base", "base"], "is not an empty folder"),
    "merge without base": (["merge", "adapter", "out"], "names no base model"),
    "merge another base": (["merge", "lora.ckpt", "out", "--base", "other"], "lora.ckpt was made for another base"),
    "compress nothing": (["compress", "nowhere", "out"], "is not an adapter folder"),
    "compress too much": (["compress", "adapter", "out", "--density", "2"], "density must be in"),
    "compress at no strength": (["compress", "adapter", "out", "--alpha", "0"], "alpha must be"),
    "compress by a word": (["compress", "adapter", "out", "--alpha", "big"], "must be a number or auto"),
    "compress auto alone": (["compress", "adapter", "out", "--alpha", "auto"], "needs validation data"),
    "compress no recipe": (["compress", "adapter", "out", "--config", "nowhere.yaml"], "is not a file"),
    "compress no metric": (["compress", "adapter", "out", "--config", "lora.yaml", "--monitor", "f1"], "logs no 'f1'"),
    "decompress plain": (["decompress", "adapter", "out"], "is not compressed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_one_sentence(
    fitted: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(fitted)
    if not (fitted / "other").exists():
        (fitted / "other").symlink_to(tiny_folder("gpt2"))
    args, expected = WRONG[case]
    said = failure(*args)
    assert expected in said and said.startswith(f"lightning-peft {args[0]}: ") and said.endswith(".")
    assert "\n" not in said and not os.path.exists("out"), "nothing is written"
