"""fit ends with a short report that is true, changes nothing, and never loses a finished training."""

from __future__ import annotations

import math
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from statements import Module, Statements, trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from tuning import classifier, points

from lightning_peft import adapters
from lightning_peft.callbacks import CAA, ITI, Ablation, AdapterEMA, LoRA
from lightning_peft.cli import COMMANDS
from lightning_peft.cli import main as command
from lightning_peft.effects import TextSettings
from lightning_peft.effects import kl as measured_kl
from lightning_peft.fitting import closing_report
from lightning_peft.fitting.closing_report import ReportSettings
from lightning_peft.fitting.sample_prompts import SamplePrompts
from lightning_peft.models import CausalLM, Seq2SeqLM, SequenceClassifier

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = ReportSettings(TextSettings(tokens=48, length=24), new_tokens=4)


def talking(tokenizer: Any) -> Module:
    """A module with a tokenizer, which is no hyperparameter of it."""
    module = Module()
    module.tokenizer = tokenizer
    return module


def fit(module: L.LightningModule, *callbacks: L.Callback, data: Any = None, **options: Any) -> L.Trainer:
    loaders = [Statements().loader(), Statements().loader()] if data is None else data
    made = trainer(*callbacks, **options)
    made.fit(module, *loaders)
    return made


def lines(printed: str) -> dict[str, str]:
    """The lines of the report by heading; of several of one heading the last."""
    report = printed.partition("What fit did\n")[2].splitlines()
    return {line[2:].split("  ")[0]: line[2:].partition("  ")[2].strip() for line in report if line.startswith("  ")}


def test_an_edits_numbers_are_those_of_its_heads(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module, logger = talking(tiny_tokenizer), CSVLogger(tmp_path)
    method = ITI(num_heads=3, val_fraction=0.3, report=SMALL)
    fit(module, method, logger=logger, enable_model_summary=True)
    printed = capsys.readouterr().out
    width = method.edit_.directions.shape[1]
    assert f"{3 * width} numbers are computed and nothing is trained" in " ".join(printed.split())
    found = lines(printed)
    assert found["edited"].startswith(f"iti: {3 * width} numbers in 3 heads of ") and "nothing was trained" in printed
    best = float(method.edit_.accuracy.max())
    assert found["probes"].startswith(f"best head {best:.2f} [") and "on 3 held-out groups, the best of 12" in printed
    text = SMALL.text.text()
    assert text is not None
    kl = measured_kl(module.backbone, "iti", text, tiny_tokenizer).mean
    assert found["KL to base"].startswith(f"{kl:.3g} nats a token")
    assert found["prompt"] and "before" in printed and "after" in printed
    rows = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert f"{kl}"[:8] in rows and "neutral_kl" in rows
    head, first = (line.split(",") for line in rows.splitlines()[:2])
    logged = dict(zip(head, first, strict=True))
    assert float(logged["trainable_parameters"]) == 0 and float(logged["adapter_bytes"]) == 4 * 3 * width


def test_what_lora_trains_is_counted_by_matrices(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    module = talking(tiny_tokenizer)
    fit(module, LoRA(r=2, target_modules=["q_proj"], report=SMALL))
    found, count = lines(capsys.readouterr().out), 3 * 2 * (32 + 32)
    total = sum(p.numel() for p in module.parameters())
    assert found["trained"] == f"lora: {count} parameters trained in 3 matrices, {100 * count / total:.2g} % of all"
    assert found["validation"].startswith("val_loss ") and found["checkpoint"].startswith("none was written; ")
    assert "next" not in found


def test_of_several_callbacks_there_is_one_report(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [LoRA(r=2, report=SMALL), LoRA(r=1, name="other", report=SMALL)]
    fit(talking(tiny_tokenizer), *both, limit_train_batches=1, limit_val_batches=1)
    printed = capsys.readouterr().out
    assert printed.count("What fit did") == 1 and "outside of adapters" not in printed
    assert printed.count(" parameters trained in ") == 2


def test_a_classifier_has_its_numbers_and_no_kl(capsys: pytest.CaptureFixture[str]) -> None:
    module = classifier()
    trainer(LoRA(r=2, backbone="net", report=True)).fit(module, points())
    printed = capsys.readouterr().out
    assert "outside of adapters: 27 parameters trained" in printed
    assert lines(printed)["not measured"] == "KL and answers, which only language models have"


def test_by_default_it_stands_where_the_summary_does(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    monkeypatch.setattr(closing_report.ClosingReport, "_measure", lambda *_: measured.append(1))
    fit(talking(tiny_tokenizer), LoRA(r=2), fast_dev_run=True)
    fit(talking(tiny_tokenizer), LoRA(r=2, report=False), enable_model_summary=True)
    assert not measured and "What fit did" not in capsys.readouterr().out


def state(module: L.LightningModule) -> list[Any]:
    return [torch.get_rng_state().tolist(), [m.training for m in module.modules()], sorted(vars(module))]


def trained(report: Any, tokenizer: Any, folder: Path) -> tuple[dict[str, Any], list[Any], dict[str, float]]:
    L.seed_everything(3)
    module = talking(tokenizer)
    loader = Statements().loader(shuffle=True)
    callbacks = [LoRA(r=2, dropout=0.3, report=report), AdapterEMA(decay=0.5), ModelCheckpoint(folder, save_last=True)]
    made = fit(module, *callbacks, data=[loader, loader], enable_checkpointing=True, max_epochs=2)
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    return checkpoint, state(module), {n: float(v) for n, v in made.callback_metrics.items()}


def test_training_and_checkpoints_are_the_same_with_it_and_without(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with_it, state_with, metrics_with = trained(SMALL, tiny_tokenizer, tmp_path / "with")
    without, state_without, metrics_without = trained(False, tiny_tokenizer, tmp_path / "without")
    assert state_with == state_without and metrics_with == metrics_without
    assert with_it.keys() == without.keys() and with_it["lightning_peft"] == without["lightning_peft"]
    assert all(torch.equal(value, without["state_dict"][name]) for name, value in with_it["state_dict"].items())


def test_the_average_that_stands_in_the_weights_place_is_what_is_measured(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    module = talking(tiny_tokenizer)
    fit(module, LoRA(r=2, report=SMALL), AdapterEMA(decay=0.9), max_epochs=4)
    text = SMALL.text.text()
    assert text is not None
    kl = measured_kl(module.backbone, "lora", text, tiny_tokenizer).mean
    assert lines(capsys.readouterr().out)["KL to base"].startswith(f"{kl:.3g} nats")


def test_a_report_that_fails_is_one_warning(
    tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    module = talking(tiny_tokenizer)
    monkeypatch.setattr(closing_report, "_kl", fail)
    fit(module, CAA(report=SMALL))
    assert "no KL: out of luck" in capsys.readouterr().out
    monkeypatch.setattr(closing_report, "_print", fail)
    with pytest.warns(UserWarning, match=r"^fit is done, but its report could not be made \(RuntimeError: out of luck"):
        made = fit(module, CAA(report=SMALL))
    assert made.state.finished and adapters(module)["caa"].enabled


def test_above_one_nat_it_says_what_to_do(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    module = talking(tiny_tokenizer)
    module.backbone.lm_head.weight.data *= 40  # so that it is sure of what it says, and can be far from it
    with pytest.warns(
        UserWarning, match=r"^With 'caa' the model is .* it often writes gibberish\. .*CAA\(max_kl=0\.5\)"
    ):
        fit(module, CAA(multiplier=50.0, report=SMALL))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="(?!With )")
        fit(talking(tiny_tokenizer), CAA(multiplier=0.01, report=SMALL))


def test_a_model_that_predicts_no_numbers_is_said(
    tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl = closing_report.PerToken(math.nan, (math.nan,), (3,))
    monkeypatch.setattr(closing_report, "_kl", lambda *_: kl)
    with pytest.warns(UserWarning, match=r"^With 'lora' the model no longer predicts numbers: KL on neutral text is N"):
        fit(talking(tiny_tokenizer), LoRA(r=2, report=SMALL))


def test_an_edit_on_a_tuned_adapter_is_measured_against_the_tuned_model(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    module = talking(tiny_tokenizer)
    fit(module, LoRA(r=2, report=SMALL))
    fit(module, Ablation(report=SMALL))
    text = SMALL.text.text()
    assert text is not None
    kl = measured_kl(module.backbone, "ablation", text, tiny_tokenizer).mean
    capsys.readouterr()
    fit(module, Ablation(report=SMALL))  # a second fit says the same
    found = lines(capsys.readouterr().out)
    assert found["KL to base"].startswith(f"{kl:.3g} nats") and "numbers taken out of " in found["edited"]


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_the_packages_modules_answer_before_and_after(
    kind: str, tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    module = (Seq2SeqLM if kind == "t5" else CausalLM)(str(tiny_folder(kind)))
    fit(module, LoRA(r=2, report=SMALL), limit_train_batches=2, limit_val_batches=1)
    printed = capsys.readouterr().out
    assert printed.count("  before") == printed.count("  after") == 2
    assert ("KL to base" in printed) == (kind == "gpt2")


def test_an_encoder_with_a_head_says_what_applies(
    tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    module = SequenceClassifier(str(tiny_folder("bert")), num_labels=2)
    rows = [{"input_ids": torch.tensor([5, 6, 7 + i]), "labels": i} for i in range(2)]
    fit(module, LoRA(r=2, report=True), data=[DataLoader(rows), DataLoader(rows)])  # type: ignore[arg-type]
    found = lines(capsys.readouterr().out)
    assert "val_accuracy" in found["validation"] and found["not measured"].startswith("KL and answers, which only lang")


def test_prompts_of_ones_own_and_none(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Module()
    given = ReportSettings(TextSettings(tokens=0), ["Q: Who is he? A:"], 3, tiny_tokenizer)
    fit(module, CAA(report=given))
    found = lines(capsys.readouterr().out)
    assert found["prompt"] == "Q: Who is he? A:" and "KL to base" not in found
    fit(module, CAA(report=True))
    assert lines(capsys.readouterr().out)["not measured"].startswith("KL and answers, for want of a tokenizer")


def test_prompts_are_those_of_validation_and_each_once() -> None:
    prompts, ids = SamplePrompts(2), torch.tensor([[5, 6, 7], [5, 6, 8], [9, 6, 8]])
    prompts.note({"input_ids": ids + 1, "prompt_end": torch.tensor([1, 1, 1])}, validating=False)
    assert prompts.rows == [[6, 7], [10, 7]]
    prompts.note({"input_ids": ids, "prompt_end": torch.tensor([1, 1, 1])}, validating=True)
    prompts.note({"input_ids": ids + 2, "prompt_end": torch.tensor([1, 1, 1])}, validating=True)
    prompts.note((ids, ids), validating=True)
    assert prompts.rows == [[5, 6], [9, 6]]


CONFIG = """
model:
  class_path: lightning_peft.models.CausalLM
  init_args: {{pretrained: {model}}}
data:
  class_path: lightning_peft.truthfulqa.TruthfulQADataModule
  init_args: {{source: package, train: statements, val_metrics: false, batch_size: 64}}
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
  limit_val_batches: 1
  limit_test_batches: 1
  default_root_dir: {folder}
  callbacks:
    - class_path: lightning_peft.callbacks.ITI
      init_args:
        num_heads: 2
        max_kl: 0.5
        kl_texts: {{tokens: 48, length: 24}}
        report: {{text: {{tokens: 48, length: 24}}, new_tokens: 4}}
"""


def test_the_commands_that_it_names_run(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(model=tiny_folder("llama"), folder=tmp_path))
    command(["fit", "--config", str(config)])
    printed = capsys.readouterr().out
    found = lines(printed)
    assert Path(found["checkpoint"]).is_file() and "strength" in found
    verb, *arguments = shlex.split(found["next"].removeprefix("lightning-peft "))
    assert verb in COMMANDS
    command([verb, *arguments])
    assert "test_loss" in capsys.readouterr().out or verb == "test"
    base = next(line for line in printed.splitlines() if "lightning-peft generate" in line)
    assert f"--base {tiny_folder('llama')}" in base
