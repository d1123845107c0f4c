"""LoRA-Dash through a Trainer: what is trained before and after the switch, and a run that is resumed around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from tuning import QUIET, Language, fit, one_sentence

from lightning_peft import adapters
from lightning_peft.callbacks import LoRADash

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Noted(L.Callback):
    """Every tensor of the adapter after each step, by its kind."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        stack = adapters(pl_module)
        self.steps.append({key: value.clone() for key, value in stack.tensors(stack["dash"]).items()})

    def of(self, step: int, kind: str) -> Tensor:
        return torch.cat([v.flatten() for k, v in self.steps[step].items() if k.endswith(kind)])


def dash(**options: Any) -> LoRADash:
    return LoRADash(**({"r": 2, "alpha": 4, "directions": 3, "warmup_steps": 3, "within": "attention"} | options))


def test_coefficients_are_trained_from_the_switch_on_and_the_low_rank_part_throughout() -> None:
    module, noted = Language(), Noted()
    callback = dash()
    fit(module, callback, noted, max_steps=6)
    for kind in ("dash_coefficients", "dash_inputs", "dash_outputs"):
        assert not any(noted.of(step, kind).any() for step in range(3))
    assert all(bool((noted.of(step, "dash_coefficients") != 0).any()) for step in range(3, 6))
    for step in range(1, 6):
        assert not torch.equal(noted.of(step, "dash_A"), noted.of(step - 1, "dash_A"))
    assert torch.equal(noted.of(3, "dash_outputs"), noted.of(5, "dash_outputs"))
    assert callback.settled
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    shapes = [(layer.in_features, layer.out_features) for layer in callback._layers()]
    assert trained == sum(2 * (i + o) + 3 for i, o in shapes)


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_before_and_after_the_switch(tmp_path: Path, step: int) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole, again = Language(), Language()
    fit(whole, dash(), keep, max_steps=6, enable_checkpointing=True)
    fit(again, dash(), max_steps=6, ckpt_path=tmp_path / f"step={step}.ckpt")
    expected, tensors = (adapters(m).tensors(adapters(m)["dash"]) for m in (whole, again))
    assert expected.keys() == tensors.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_a_second_training_keeps_the_directions_of_the_first() -> None:
    module, first, second = Language(), Noted(), Noted()
    fit(module, dash(), first, max_steps=4)
    fit(module, dash(), second, max_steps=5)
    assert torch.equal(first.of(-1, "dash_outputs"), second.of(-1, "dash_outputs"))
    assert not torch.equal(first.of(-1, "dash_coefficients"), second.of(-1, "dash_coefficients"))


def test_a_training_that_ends_before_the_switch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^LoRADash changes what it trains after 100 optimizer steps, but") as error:
        fit(Language(), LoRADash(r=2), max_steps=6)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("options", [{"r": 0}, {"directions": 0}, {"warmup_steps": 0}, {"dropout": 1.0}])
def test_arguments_out_of_range_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be (at least 1|in \[0, 1\)), got") as error:
        LoRADash(**options)
    assert one_sentence(str(error.value))
