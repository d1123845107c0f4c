"""Validation and test log every metric, of any model, in any LightningModule; validation never sees the test fold."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from edits import add_lora, add_offsets, fill
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from tuning import trainer

from lightning_peft.callbacks import LoRA, Quantize
from lightning_peft.models import CausalLM, Seq2SeqLM
from lightning_peft.stack.stack import stack_of
from lightning_peft.truthfulqa import Answer, Evaluation, Prompting, SideEffects, TruthfulQADataModule
from lightning_peft.truthfulqa.evaluation import Batch

CHOICES = {"mc0", "mc1", "mc2", "mc3", "capability"}
TEXT = {"ce", "ce_base", "kl"}
ASKED = {"tokens": 48, "capability": 4, "length": 12}
Folder = Callable[[str], Path]


def questions(**arguments: Any) -> TruthfulQADataModule:
    short = {"source": "package", "limit": 20, "primer": "", "questions_per_batch": 1}
    return TruthfulQADataModule(**(short | {"prompting": Prompting(max_new_tokens=3)} | arguments))  # type: ignore[arg-type]


def causal(folder: Folder, kind: str = "llama") -> CausalLM:
    """A tiny model with room for whole questions, which are long in the tiny tokenizer's few letters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    module = CausalLM(str(folder(kind)), learning_rate=0.02)
    config = AutoConfig.from_pretrained(str(folder(kind)), max_position_embeddings=1024)
    torch.manual_seed(0)
    module.backbone = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return module


# -- a matrix of models ------------------------------------------------------------------------------------------------


def tuned(module: Any) -> None:
    add_lora(module.backbone, ["q_proj"])


def tuned_encoder_decoder(module: Any) -> None:
    add_lora(module.backbone, ["q", "v"])


def steered(module: Any) -> None:
    add_offsets(module.backbone)


def quantised(module: Any) -> None:
    Quantize("nf4").apply(module)


def quantised_and_tuned(module: Any) -> None:
    quantised(module)
    LoRA(r=2, target_modules=["q_proj"]).apply(module)
    fill(stack_of(module.backbone), "lora")


def wrapped(module: Any) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    module.backbone = peft.get_peft_model(module.backbone, config)


def nothing(module: Any) -> None:
    pass


MODELS: dict[str, tuple[str, Callable[[Any], None]]] = {
    **{kind: (kind, nothing) for kind in ("llama", "wide_llama", "gpt2", "gpt_neox", "opt", "t5")},
    "llama with LoRA": ("llama", tuned),
    "llama steered": ("llama", steered),
    "gpt2 steered": ("gpt2", steered),
    "llama in four bits": ("llama", quantised),
    "llama in four bits with LoRA": ("llama", quantised_and_tuned),
    "llama wrapped by peft": ("llama", wrapped),
    "t5 with LoRA": ("t5", tuned_encoder_decoder),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_validation_and_test_write_every_metric_to_the_logger(tiny_folder: Folder, tmp_path: Path, name: str) -> None:
    kind, prepare = MODELS[name]
    module: Any = Seq2SeqLM(str(tiny_folder("t5"))) if kind == "t5" else causal(tiny_folder, kind)
    prepare(module)
    data = questions(side_effects=SideEffects(**(ASKED | {"tokens": 0} if kind == "t5" else ASKED)))
    run = trainer(logger=CSVLogger(tmp_path))
    returned = dict(run.validate(module, data, verbose=False)[0]) | dict(run.test(module, data, verbose=False)[0])
    run.logger.save()  # type: ignore[union-attr]
    with open(next(tmp_path.rglob("metrics.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    written = {
        name: float(value) for row in rows for name, value in row.items() if value and name not in ("epoch", "step")
    }
    names = CHOICES if kind == "t5" else CHOICES | TEXT
    assert written.keys() == names | {f"val_{name}" for name in names} | {"val_loss"} == returned.keys()
    assert all(math.isfinite(value) for value in written.values())
    assert written == pytest.approx(returned, abs=1e-6)
    if kind != "t5":
        changed = prepare not in (nothing, quantised)
        for prefix in ("", "val_"):
            assert (written[f"{prefix}kl"] > 0) == changed == (written[f"{prefix}ce"] != written[f"{prefix}ce_base"])
        check_answers(run, module, data)


def check_answers(run: L.Trainer, module: CausalLM, data: TruthfulQADataModule) -> None:
    answers: list[Answer] = [answer for batch in run.predict(module, data) or [] for answer in batch]
    assert sorted(answer.question_id for answer in answers) == [question.id for question in data.test_questions]


PRESETS = [(preset, False) for preset in ("qa", "null", "help", "chat", "long", "harm")]
PRESETS += [("qa", True), ("null", True)]


@pytest.mark.parametrize(("preset", "chat"), PRESETS)
def test_predict_puts_the_question_as_it_is_asked_to(tiny_folder: Folder, preset: Any, chat: bool) -> None:
    module = CausalLM(str(tiny_folder("llama")))
    module.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    prompting = Prompting(preset, chat_template=chat, max_new_tokens=3)
    data = questions(primer=None, prompting=prompting, limit=12)
    check_answers(trainer(), module, data)
    asked = {question.id: question.text for question in data.test_questions}
    for batch in data.predict_dataloader():
        for row, mask, number in zip(batch["input_ids"], batch["attention_mask"], batch["group"], strict=True):
            assert row[mask.bool()].tolist() == prompting.encode(module.tokenizer, asked[int(number)])


# -- releases ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logprob(module: CausalLM, before: str, answer: str) -> float:
    ids, begin = module.tokenizer(before + answer)["input_ids"], len(module.tokenizer(before)["input_ids"])
    logprobs = module.backbone(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logprobs[t - 1, ids[t]] for t in range(begin, len(ids))))


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:.*empty choices")
def test_mc0_is_that_of_the_release_that_has_it(tiny_folder: Folder, truthfulqa_data: Path) -> None:
    module = causal(tiny_folder)
    for release in ("v0", "v1"):
        data = questions(source=str(truthfulqa_data / release), limit=24)
        assert trainer().test(module, data, verbose=False)[0].keys() == {"mc1", "mc2", "mc3"}
    data = questions(source=str(truthfulqa_data), limit=24)
    found = trainer().test(module, data, verbose=False)[0]["mc0"]
    entries = json.loads((truthfulqa_data / "mc_task.json").read_text())
    labels = {entry["question"].strip(): entry["mc0_targets"] for entry in entries}
    right = []
    for question in data.test_questions:
        rival, best = sorted(labels[question.text], key=labels[question.text].__getitem__)
        before = f"Q: {question.text}\nA:"
        right.append(float(logprob(module, before, f" {best}") > logprob(module, before, f" {rival}")))
    assert found == pytest.approx(sum(right) / len(right)) and 0 < found < 1


# -- validation --------------------------------------------------------------------------------------------------------


def test_a_validation_gives_what_a_test_of_the_inner_validation_questions_does(tiny_folder: Folder) -> None:
    module = causal(tiny_folder)
    data = questions(side_effects=SideEffects(**ASKED), protocol="original")
    found = dict(trainer().validate(module, data, verbose=False)[0])
    loss = found.pop("val_loss")
    data.test_questions = data.val_questions
    tested = trainer().test(module, data, verbose=False)[0]
    assert found == {f"val_{name}": value for name, value in tested.items()}
    data.val_metrics = False
    assert trainer().validate(module, data, verbose=False)[0] == {"val_loss": pytest.approx(loss, abs=1e-6)}


def validated(data: TruthfulQADataModule) -> list[Batch]:
    data.val_metrics = True
    data.setup()
    return list(data.val_dataloader())


def test_choices_are_of_inner_validation_questions_alone(tiny_tokenizer: Any) -> None:
    data = questions(tokenizer=tiny_tokenizer)
    ids = {int(i) for batch in validated(data) for i in batch["group"]}
    assert ids == {question.id for question in data.val_questions}
    assert ids.isdisjoint(question.id for question in data.test_questions + data.train_questions)


def test_demonstrations_before_validation_questions_are_of_inner_training_questions(tiny_tokenizer: Any) -> None:
    data = questions(tokenizer=tiny_tokenizer, primer=None, few_shot=8)
    data.setup()
    outside = [*data.val_questions, *data.test_questions]
    for question in data.val_questions:
        before = data.val_contexts()[question.id].removesuffix(f"Q: {question.text}\nA:")
        assert before.count("Q: ") == 8 and not any(other.text in before for other in outside)
    data.few_shot = 10  # as many as there are outside the test fold, of which two are held out
    assert data.val_contexts()[data.val_questions[0].id].count("Q: ") == 8 + 1


@pytest.mark.parametrize("limit", [4, 8, 0.5, 1.0])
def test_however_many_batches_are_validated_some_are_of_each_kind(tiny_folder: Folder, limit: float) -> None:
    data = questions(side_effects=SideEffects(tokens=120, capability=4, length=12), limit=40, batch_size=4)
    run = trainer(limit_val_batches=limit)
    found = run.validate(causal(tiny_folder), data, verbose=False)[0]
    assert found.keys() == {"val_loss", *(f"val_{name}" for name in CHOICES | TEXT)}


def fitted(
    folder: Folder, *callbacks: L.Callback, **arguments: Any
) -> tuple[L.Trainer, CausalLM, TruthfulQADataModule]:
    settings = {"max_steps": -1, "max_epochs": 2} | arguments.pop("settings", {})
    data = questions(side_effects=SideEffects(**ASKED), limit=40, **arguments)
    module = causal(folder)
    L.seed_everything(0, verbose=False)
    run = trainer(LoRA(r=2, dropout=0.3), *callbacks, **settings)
    run.fit(module, data)
    return run, module, data


def test_in_a_fit_metrics_are_validated_only_when_asked_for_and_leave_it_as_it_is(tiny_folder: Folder) -> None:
    (plain, module, _), (full, other, data) = (fitted(tiny_folder, val_metrics=asked) for asked in (None, True))
    names = {"train_loss", "val_loss"}
    assert plain.callback_metrics.keys() == names
    assert full.callback_metrics.keys() == names | {f"val_{name}" for name in CHOICES | TEXT}
    for name in names:
        assert float(plain.callback_metrics[name]) == pytest.approx(float(full.callback_metrics[name]), abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    # without dropout, gradients and what an earlier epoch's scorer had in its cache
    again = trainer().validate(other, data, verbose=False)[0]
    assert again == {name: pytest.approx(float(full.callback_metrics[name]), abs=1e-6) for name in again}


class Epochs(L.Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.found.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name})


def test_metrics_can_be_monitored_and_a_sanity_check_changes_none(tiny_folder: Folder, tmp_path: Path) -> None:
    found = []
    for steps in (0, 3):
        epochs, keep = Epochs(), ModelCheckpoint(tmp_path / str(steps), monitor="val_mc2", mode="max")
        stop = EarlyStopping("val_mc2", mode="max", min_delta=2.0, patience=2)
        settings = {"max_epochs": 9, "num_sanity_val_steps": steps, "enable_checkpointing": True}
        fitted(tiny_folder, epochs, keep, stop, val_metrics=True, settings=settings)
        assert len(epochs.found) == 3, "what can never improve by 2 is stopped after the patience"
        assert float(keep.best_model_score) == max(epoch["val_mc2"] for epoch in epochs.found)  # type: ignore[arg-type]
        found.append(epochs.found)
    assert found[0] == found[1] and found[0][0] != found[0][1]


# -- another's LightningModule -----------------------------------------------------------------------------------------


class Plain(L.LightningModule):
    """Knows of answers alone."""

    def __init__(self, module: CausalLM) -> None:
        super().__init__()
        self.backbone, self.tokenizer = module.backbone, module.tokenizer
        self.batches: list[Batch] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch)


@pytest.mark.parametrize(("asked", "measured"), [(None, True), (False, False), (True, True)])
def test_choices_never_come_to_a_module_that_knows_of_answers_alone(
    tiny_folder: Folder, asked: bool | None, measured: bool
) -> None:
    module = Plain(causal(tiny_folder))
    found = trainer().validate(module, questions(val_metrics=asked), verbose=False)[0]
    assert found.keys() == ({"val_mc0", "val_mc1", "val_mc2", "val_mc3"} if measured else set())
    assert module.batches and all(bool((batch["label"] == 1).all()) for batch in module.batches)


class Own(Plain):
    """Scores the benchmark with an `Evaluation`, on a head of its own making."""

    def __init__(self, module: CausalLM) -> None:
        super().__init__(module)
        self.evaluation = Evaluation()

    def on_validation_epoch_start(self) -> None:
        self.evaluation.begin(self.backbone, lambda: lambda batch: batch["mc1"].float())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.evaluation.step(batch) is None:
            self.evaluation.add_loss(torch.tensor(2.0), len(batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("mine/"))


def test_what_scores_choices_may_be_anything(tiny_folder: Folder) -> None:
    found = trainer().validate(Own(causal(tiny_folder)), questions(), verbose=False)[0]
    assert {name: found[f"mine/{name}"] for name in ("mc0", "mc1", "loss")} == {"mc0": 1.0, "mc1": 1.0, "loss": 2.0}


def test_an_evaluation_begins_before_its_first_step() -> None:
    with pytest.raises(RuntimeError, match=r"^Evaluation\.begin must be called at the start of the epoch"):
        Evaluation().step({"mc2": torch.zeros(1)})


def test_losses_weigh_by_their_tokens_and_one_that_is_no_number_is_not_hidden() -> None:
    def mean(*losses: tuple[float, int]) -> dict[str, float]:
        evaluation = Evaluation()
        evaluation.begin(nn.Identity())
        for loss, tokens in losses:
            evaluation.add_loss(torch.tensor(loss), tokens)
        return evaluation.finish("val_")

    assert mean((1.0, 3), (5.0, 1)) == {"val_loss": 2.0} and mean() == {}
    assert mean((1.0, 3), (math.nan, 0)) == {"val_loss": 1.0}, "a batch without a token has no loss"
    assert math.isnan(mean((1.0, 3), (math.nan, 2))["val_loss"])


def test_a_second_epoch_knows_nothing_of_the_first() -> None:
    evaluation = Evaluation()
    question = {"mc2": torch.tensor([1, 0]), "group": torch.tensor([3, 3])}

    def epoch(scores: list[float]) -> Callable[[], Callable[[Batch], Tensor]]:
        return lambda: lambda batch: torch.tensor(scores)

    evaluation.begin(nn.Identity(), epoch([-1.0, -9.0]))
    evaluation.step(question)  # and was interrupted
    evaluation.begin(nn.Identity(), epoch([-9.0, -1.0]))
    evaluation.step(question)
    assert evaluation.finish()["mc3"] == 0.0
