"""However an optimizer came about, it holds what is trainable once and nothing frozen, or the run does not start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from tuning import QUIET, Classifier, base_weights, classifier, fit, moved, one_sentence, points, weights

from lightning_peft.callbacks import LoRA
from lightning_peft.fitting.optimizers import check, repair

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

Make = Callable[[L.LightningModule], Any]


class Optimized(Classifier):
    """A classifier whose optimizers are made in `__init__`, before any callback runs, and given out later."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.made = make(self)

    def configure_optimizers(self) -> Any:
        return self.made


def configured(make: Make) -> Classifier:
    """A classifier whose optimizers are made in `configure_optimizers`."""

    class Configured(Classifier):
        def configure_optimizers(self) -> Any:
            return make(self)

    return Configured()


def lora() -> LoRA:
    return LoRA(r=2, backbone="net")


def held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def trainable(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters() if p.requires_grad}


# -- repaired -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Optimized, configured], ids=["in __init__", "in configure_optimizers"])
def test_an_optimizer_of_all_parameters_trains_the_adapter_and_nothing_frozen(make: Any) -> None:
    module = make(lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1))
    made = fit(module, lora())
    assert held(made.optimizers[0]) == trainable(module)
    assert moved(base_weights(classifier()), base_weights(module)) == {"head.weight", "head.bias"}
    assert all(value.any() for name, value in weights(module).items() if "lora_B" in name)


def test_it_trains_as_one_built_after_the_injection_does() -> None:
    early = Optimized(lambda m: SGD(m.parameters(), lr=0.1))
    late = configured(lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
    fit(early, lora())
    fit(late, lora())
    assert moved(weights(early), weights(late)) == set()


def test_adapters_take_the_place_of_the_backbone_with_its_groups_settings() -> None:
    def make(module: Any) -> Optimizer:
        groups = [{"params": module.net.parameters(), "lr": 0.03}, {"params": module.head.parameters(), "lr": 0.001}]
        return AdamW(groups)

    module = Optimized(make)
    made = fit(module, lora())
    backbone, head = made.optimizers[0].param_groups
    assert backbone["lr"] == 0.03 and head["lr"] == 0.001
    assert {id(p) for p in backbone["params"]} == {id(p) for n, p in module.named_parameters() if "lora_" in n}
    assert {id(p) for p in head["params"]} == {id(p) for p in module.head.parameters()}


def test_a_second_group_of_frozen_parameters_is_left_empty() -> None:
    def make(module: Any) -> Optimizer:
        named = dict(module.named_parameters())
        decayed = [p for p in named.values() if p.dim() > 1]
        return AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": [named["net.input.bias"]]}])

    module = Optimized(make)
    module.head.bias.requires_grad_(False)
    made = fit(module, lora())
    assert made.optimizers[0].param_groups[1]["params"] == []
    assert held(made.optimizers[0]) == trainable(module)


def test_an_optimizer_that_keeps_its_parameters_in_a_list_of_its_own() -> None:
    module = Optimized(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2))
    before = weights(module)
    fit(module, lora(), max_steps=2)
    assert {n for n in moved(before, base_weights(module)) if n.startswith("net.")} == set()
    assert all(value.any() for name, value in weights(module).items() if "lora_B" in name)


def test_the_learning_rate_schedule_still_applies() -> None:
    def make(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    made = fit(Optimized(make), lora(), max_steps=3)
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_resuming_restores_the_repaired_group(tmp_path: Any) -> None:
    def make(module: Any) -> Optimizer:
        return AdamW(module.parameters(), lr=0.01)

    whole, first, second = Optimized(make), Optimized(make), Optimized(make)
    made = fit(whole, lora(), max_steps=-1, max_epochs=2)
    fit(first, lora(), max_steps=-1, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(second, lora(), max_steps=-1, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert moved(weights(whole), weights(second)) == set()
    state, other = (o.optimizers[0].state_dict()["state"] for o in (made, resumed))
    assert len(state) == len(other) == len(trainable(whole))
    assert all(torch.equal(state[i]["exp_avg_sq"], other[i]["exp_avg_sq"]) for i in state)


def test_two_optimizers_with_manual_optimization() -> None:
    class Manual(Optimized):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    module = Manual(lambda m: [SGD(m.net.parameters(), lr=0.1), SGD(m.head.parameters(), lr=0.1)])
    made = fit(module, lora())
    assert [len(o.param_groups[0]["params"]) for o in made.optimizers] == [8, 2]
    assert all(value.any() for name, value in weights(module).items() if "lora_B" in name)


def test_repairing_twice_changes_nothing() -> None:
    module = classifier()
    optimizer = SGD(module.parameters(), lr=0.1)
    lora().apply(module)
    assert repair(module, [optimizer]) == 8
    assert repair(module, [optimizer]) == 0
    assert held(optimizer) == trainable(module)


def test_the_state_of_frozen_parameters_is_forgotten() -> None:
    module = classifier()
    optimizer = AdamW(module.parameters(), lr=0.1)
    module.training_step(next(iter(points())), 0).backward()
    optimizer.step()
    lora().apply(module)
    repair(module, [optimizer])
    assert {id(p) for p in optimizer.state} == {id(p) for p in module.head.parameters()}


# -- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: SGD(m.head.parameters(), lr=0.1),
            r"^8 trainable parameters are in no optimizer, the first is net\.blocks\.0\.linear\.lora_A\.lora\.weight: "
            r"build the optimizer from `self\.parameters\(\)` in `configure_optimizers`\.$",
        ),
        (
            lambda m: None,
            r"^10 trainable parameters are in no optimizer, the first is head\.bias: ",
        ),
        (
            lambda m: [SGD(m.parameters(), lr=0.1), SGD(m.head.parameters(), lr=0.1)],
            r"^2 parameters are in more than one optimizer group, the first is head\.bias\.$",
        ),
    ],
    ids=["the head's only", "none", "the head's twice"],
)
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_parameters_missing_or_held_twice_are_one_sentence(make: Make, message: str) -> None:
    module = Optimized(make)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=message) as error:
        fit(module, lora())
    assert one_sentence(str(error.value))


def test_nothing_trainable_is_one_sentence() -> None:
    class Frozen(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            self.requires_grad_(False)
            return optimizer

    with pytest.raises(ValueError, match=r"^Nothing in Frozen is trainable\.$"):
        fit(Frozen(), lora())


def test_check_is_content_with_what_is_right() -> None:
    module = classifier()
    lora().apply(module)
    check(module, [SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)])
