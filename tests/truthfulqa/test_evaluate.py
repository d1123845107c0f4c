"""The callback that measures the benchmark takes its batches from any module's steps, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tuning import trainer

from lightning_peft.callbacks import ITI, LoRA
from lightning_peft.models import CausalLM
from lightning_peft.truthfulqa import Evaluate, Evaluation, Prompting, SideEffects, TruthfulQADataModule

Folder = Callable[[str], Path]
MC = {"mc0", "mc1", "mc2", "mc3"}
STEPS = ("validation_step", "test_step", "predict_step")

pytestmark = pytest.mark.filterwarnings("ignore")


def questions(**arguments: Any) -> TruthfulQADataModule:
    settings: dict[str, Any] = {"source": "package", "limit": 12, "primer": ""}
    return TruthfulQADataModule(**(settings | {"prompting": Prompting(max_new_tokens=2)} | arguments))


class Foreign(L.LightningModule):
    """Somebody's module; its steps keep what they are given."""

    def __init__(self, tokenizer: Any, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models or [tiny("llama")])
        self.tokenizer = tokenizer
        self.batches: list[Any] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.models[0](**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss

    def validation_step(self, batch: Any, batch_idx: int) -> str:
        self.batches.append(batch)
        return "mine"

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def callbacks(run: L.Trainer) -> list[L.Callback]:
    return list(vars(run)["callbacks"])


class During(L.Callback):
    """Keep how many callbacks of the kind the Trainer has while it runs, and what steps return."""

    def __init__(self, fail: bool = False) -> None:
        self.counts: set[int] = set()
        self.outputs: list[Any] = []
        self.fail = fail

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.counts.add(sum(isinstance(callback, Evaluate) for callback in callbacks(trainer)))
        self.outputs.append(outputs)
        if self.fail:
            raise RuntimeError("the disk is full")

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end


def check_gone(run: L.Trainer, module: L.LightningModule, before: list[L.Callback]) -> None:
    assert callbacks(run) == before and not vars(module).keys() & set(STEPS)


def test_each_verb_has_one_while_it_runs_and_none_after(tiny_tokenizer: Any) -> None:
    module, data, during = Foreign(tiny_tokenizer), questions(val_metrics=True), During()
    run = trainer(during, LoRA(r=2, backbone="models.0"), max_epochs=1, max_steps=-1)
    before = callbacks(run)
    for _ in range(2):
        run.fit(module, data)
        assert {f"val_{name}" for name in MC} <= run.callback_metrics.keys()
        check_gone(run, module, before)
        run.fit_loop.max_epochs = 2
    for verb in (run.validate, run.test, run.predict):
        verb(module, data)
        check_gone(run, module, before)
    assert during.counts == {1} and "mine" in during.outputs
    data.setup()
    check_gone(run, module, before)
    assert all("label" in batch for batch in module.batches), "answers alone come to the module"


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_after_an_exception_there_is_no_trace(verb: str, tiny_tokenizer: Any) -> None:
    module, data = Foreign(tiny_tokenizer), questions()
    run = trainer(During(fail=True))
    before = callbacks(run)
    with pytest.raises(RuntimeError, match="the disk is full"):
        getattr(run, verb)(module, data)
    check_gone(run, module, before)
    own = Evaluate()
    run = trainer(own, During(fail=True))
    with pytest.raises(RuntimeError, match="the disk is full"):
        getattr(run, verb)(module, data)
    assert own in callbacks(run) and not vars(module).keys() & set(STEPS)


def test_what_a_user_has_put_on_a_step_is_called_with_the_other_batches_and_stays(tiny_tokenizer: Any) -> None:
    module, kept = Foreign(tiny_tokenizer), []

    def own(batch: Any, batch_idx: int) -> None:
        kept.append(batch)

    module.validation_step = own  # type: ignore[method-assign, assignment]
    trainer().validate(module, questions(), verbose=False)
    assert module.__dict__["validation_step"] is own and kept and not module.batches
    assert all("mc2" not in batch for batch in kept)


def test_a_users_own_callback_is_the_only_one_and_stays(tiny_tokenizer: Any) -> None:
    def even(module: Any) -> Callable[[Any], Tensor]:
        return lambda batch: batch["mc1"].float()

    during, own = During(), Evaluate(even)
    run = trainer(own, during)
    found = run.test(Foreign(tiny_tokenizer), questions(), verbose=False)[0]
    assert found["mc1"] == 1.0 and during.counts == {1} and own in callbacks(run)


def test_a_module_with_an_evaluation_of_its_own_is_left_alone(tiny_tokenizer: Any) -> None:
    module = Foreign(tiny_tokenizer)
    module.evaluation = Evaluation()
    assert trainer().test(module, questions(), verbose=False)[0] == {}
    assert all("mc2" in batch for batch in module.batches)


class Written(nn.Module):
    """A hand-written language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.embed(input_ids))


@pytest.mark.parametrize("make", [lambda: [Written()], lambda: [tiny("llama"), tiny("gpt2")]], ids=["written", "two"])
def test_where_no_language_model_can_be_told_batches_come_to_the_module_and_a_users_callback_refuses(
    make: Callable[[], list[nn.Module]], tiny_tokenizer: Any
) -> None:
    module = Foreign(tiny_tokenizer, *make())
    assert trainer().test(module, questions(), verbose=False)[0] == {}
    assert module.batches and all("mc2" in batch for batch in module.batches)
    module.batches = []
    assert trainer().validate(module, questions(), verbose=False)[0] == {}
    assert all("label" in batch for batch in module.batches), "false choices are no answers"
    with pytest.raises(ValueError, match=r"name (it|one) with the argument backbone\.$"):
        trainer(Evaluate()).test(module, questions(), verbose=False)


def test_one_of_two_language_models_may_be_named(tiny_tokenizer: Any) -> None:
    both = Foreign(tiny_tokenizer, tiny("llama"), tiny("wide_llama"))
    alone = Foreign(tiny_tokenizer, tiny("wide_llama"))
    run = trainer(Evaluate(backbone="models.1"))
    assert run.test(both, questions(), verbose=False) == trainer().test(alone, questions(), verbose=False)


def test_answers_are_written_with_the_data_modules_tokenizer_where_the_module_has_none(tiny_tokenizer: Any) -> None:
    data = questions(tokenizer=tiny_tokenizer)
    answers = [answer for batch in trainer().predict(Foreign(None), data) or [] for answer in batch]
    assert sorted(answer.question_id for answer in answers) == [question.id for question in data.test_questions]
    with pytest.raises(ValueError, match=r"^Foreign has no tokenizer to write answers with: give it one, "):
        trainer(Evaluate()).predict(Foreign(None), data)


def test_batches_that_are_no_mapping_come_to_the_module(tiny_tokenizer: Any) -> None:
    module = Foreign(tiny_tokenizer)
    loader = DataLoader([torch.zeros(2)], batch_size=1)  # type: ignore[arg-type]
    for verb in ("validate", "test", "predict"):
        getattr(trainer(Evaluate()), verb)(module, loader)
    assert len(module.batches) == 3


def test_a_loader_alone_is_measured_with_a_callback(tiny_folder: Folder) -> None:
    module, data = CausalLM(str(tiny_folder("llama"))), questions(side_effects=SideEffects(tokens=24, length=12))
    found = trainer().test(module, data, verbose=False)[0]
    assert trainer(Evaluate()).test(module, data.test_dataloader(), verbose=False)[0] == found


def test_checkpoints_know_nothing_of_it(tiny_tokenizer: Any, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_mc2", mode="max")
    run = trainer(keep, LoRA(r=2, backbone="models.0"), max_epochs=1, max_steps=-1, enable_checkpointing=True)
    run.fit(Foreign(tiny_tokenizer), questions(val_metrics=True))
    saved = torch.load(keep.best_model_path, weights_only=True)
    assert not any("Evaluate" in name for name in saved["callbacks"]) and keep.best_model_score is not None
    assert not any("evaluation" in name for name in saved["state_dict"])


# -- what else a data module gives its Trainer's callbacks -------------------------------------------------------------


def test_interventions_get_the_texts_that_end_in_a_question_for_as_long_as_they_fit(tiny_tokenizer: Any) -> None:
    data = questions(train="statements", limit=20)
    data.tokenizer = tiny_tokenizer
    given, own = ITI(num_heads=2, seed=3, question_ends=True), ITI(num_heads=2, seed=3, sigma_texts=[[5, 6], [7, 8]])
    for callback in (given, own):
        trainer(callback, max_epochs=1, max_steps=-1, limit_val_batches=0).fit(Foreign(tiny_tokenizer), data)
    assert given.edit_.record["sigma_texts"] == len(data.question_ends(3)) and own.edit_.record["sigma_texts"] == 2
    assert given.sigma_texts is None and own.sigma_texts == [[5, 6], [7, 8]]
    by_hand = ITI(num_heads=2, seed=3, sigma_texts=data.question_ends(3))
    trainer(by_hand, max_epochs=1, max_steps=-1, limit_val_batches=0).fit(Foreign(tiny_tokenizer), data)
    assert torch.equal(by_hand.edit_.sigma, given.edit_.sigma)


def test_after_an_exception_they_are_taken_back(tiny_tokenizer: Any) -> None:
    callback = ITI(num_heads=2, question_ends=True)
    with pytest.raises(ValueError, match=r"^Statements of both classes are needed"):
        trainer(callback, max_epochs=1, max_steps=-1, limit_val_batches=0).fit(
            Foreign(tiny_tokenizer), questions(train="answers")
        )
    assert callback.sigma_texts is None
