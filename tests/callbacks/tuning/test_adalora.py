"""AdaLoRA's budget and regulariser are those of a loop written by hand with peft, and go on where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, Classifier, Language, fit, one_sentence, points, same, texts, trainer, weights

from lightning_peft import adapters
from lightning_peft.callbacks import AdaLoRA

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:.*")]
OPTIONS: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}


def adalora(**options: Any) -> AdaLoRA:
    return AdaLoRA(**(OPTIONS | {"backbone": "net"} | options))


def singular_values(module: nn.Module) -> Tensor:
    stack = adapters(module)
    return torch.cat([value.flatten() for key, value in stack.tensors(stack["adalora"]).items() if "lora_E" in key])


def test_it_trains_as_a_loop_by_hand_does() -> None:
    torch.manual_seed(0)
    module = Language("llama")
    made = AdaLoRA(**OPTIONS, target_modules=["q_proj", "down_proj"], total_steps=6)
    fit(module, made, max_steps=6, max_epochs=-1)

    config = peft.AdaLoraConfig(
        target_modules=["q_proj", "down_proj"], lora_alpha=32, total_step=6, task_type="CAUSAL_LM", **OPTIONS
    )
    base: Any = tiny("llama")
    torch.manual_seed(5)
    model: Any = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    batches = list(texts())
    for step in range(6):
        ids = batches[step % 2][0]
        loss = model(input_ids=ids, labels=ids).loss  # with the regulariser
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
    stack = adapters(module)
    theirs = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
    for key, value in stack.tensors(stack["adalora"]).items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_final_budget_is_what_was_asked_for(accumulate: int) -> None:
    module = Classifier()
    made = adalora()
    run = fit(module, made, max_steps=-1, max_epochs=4, accumulate_grad_batches=accumulate)
    steps = 16 // accumulate
    assert run.global_step == steps and made._tuner.peft_config["adalora"].total_step == steps
    values = singular_values(module)
    assert len(values) == 4 * 4 and int((values != 0).sum()) == 4 * 2


def test_nothing_is_pruned_before_tinit_or_where_the_ranks_are_the_same() -> None:
    for options in ({"tinit": 3, "total_steps": 9}, {"target_r": 4, "total_steps": 9}):
        module = Classifier()
        fit(module, adalora(**options), max_steps=3)
        assert (singular_values(module) != 0).all()


@pytest.mark.parametrize("half", [1, 3])
def test_a_resumed_training_is_the_same(half: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 4}
    whole, part, resumed = Classifier(), Classifier(), Classifier()
    fit(whole, adalora(total_steps=16), **options)
    fit(part, adalora(total_steps=16), **(options | {"max_epochs": half})).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, adalora(total_steps=16), ckpt_path=tmp_path / "half.ckpt", **options)
    assert same(weights(whole), weights(resumed))


def test_the_regulariser_is_the_gradient_of_the_mean_distance() -> None:
    gradients: list[dict[str, Tensor]] = []

    class Keep(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients.append({n: p.grad.clone() for n, p in pl_module.net.named_parameters() if p.grad is not None})

    for weight in (0.0, 0.5):
        module = Classifier()
        fit(module, adalora(orth_reg_weight=weight, total_steps=9), Keep(), max_steps=1)
    fresh = Classifier()
    torch.manual_seed(5)
    adalora(orth_reg_weight=0.5, total_steps=9).apply(fresh)
    factors = {n: p for n, p in fresh.net.named_parameters() if "lora_A" in n or "lora_B" in n}  # type: ignore[union-attr]
    products = [p @ p.T if "lora_A" in n else p.T @ p for n, p in factors.items()]
    loss = 0.5 * sum(torch.norm(product - torch.eye(4)) for product in products) / len(factors)
    for (name, _), expected in zip(factors.items(), torch.autograd.grad(loss, list(factors.values())), strict=True):
        torch.testing.assert_close(gradients[1][name] - gradients[0][name], expected)


def test_gradients_that_are_gone_are_one_sentence() -> None:
    class Manual(Classifier):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            self.manual_backward(Classifier.training_step(self, batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(ValueError, match="measures importance by gradients after each optimizer step") as error:
        fit(Manual(), adalora(total_steps=9))
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("options", "run", "words"),
    [
        ({}, {"max_steps": -1, "max_epochs": -1}, "spreads its budget over the training, which has no end"),
        (
            {"tinit": 9},
            {"max_steps": 3},
            "has 3 optimizer steps, and AdaLoRA with tinit=9 and tfinal=1 needs 11 or more",
        ),
    ],
)
def test_a_training_that_does_not_fit_the_schedule_is_one_sentence(options: Any, run: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        trainer(adalora(**options), **run).fit(Classifier(), points())
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    "options",
    [{"target_r": 13}, {"init_r": 0, "target_r": 0}, {"beta1": 1.0}, {"dropout": 1.0}, {"delta_t": 0}],
    ids=str,
)
def test_arguments_out_of_range_are_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        AdaLoRA(**options)
    assert one_sentence(str(error.value))
