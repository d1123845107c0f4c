"""What is not finite stops the run, with the step and the name, and is never saved."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from torch import Tensor
from tuning import QUIET, Classifier, data_of, fit, one_sentence, trainer

from lightning_peft import adapters, callbacks, load_adapter, save_adapter
from lightning_peft.callbacks import PEFT, AdapterCallback, LoRA
from lightning_peft.fitting.finite import FiniteLoss

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Exploding(Classifier):
    """Its loss is NaN or infinite at one step and finite afterwards."""

    def __init__(self, value: float, step: int) -> None:
        super().__init__()
        self.value, self.step = value, step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss: Any = super().training_step(batch, batch_idx)
        # added to the value alone: gradients stay finite, so that only the loss tells
        return loss + (self.value if self.global_step == self.step else 0.0)


class Poisoned(L.Callback):
    """Puts a value into one tensor of the adapter after a step."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        next(p for n, p in pl_module.named_parameters() if "lora_B" in n).data.view(-1)[-1] = self.value


def lora(**options: Any) -> LoRA:
    return LoRA(**({"r": 2, "backbone": "net"} | options))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [1, 2, 50])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(value: float, every: int) -> None:
    with pytest.raises(ValueError, match="The training loss is not finite since step 2: ") as error:
        fit(Exploding(value, 1), lora(), log_every_n_steps=every, max_steps=6)
    assert one_sentence(str(error.value))


def test_the_switch_lets_such_steps_pass() -> None:
    assert fit(Exploding(math.nan, 1), lora(check_finite=False)).global_step == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_stops_the_run_and_is_not_saved(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Adapter 'lora' is no longer finite, the first tensor is .*lora_B") as error:
        fit(Classifier(), Poisoned(value), lora(), log_every_n_steps=1)
    assert one_sentence(str(error.value))
    module = Classifier()
    done = fit(module, lora())
    next(p for n, p in module.named_parameters() if "lora_B" in n).data.fill_(value)
    with pytest.raises(ValueError, match="is no longer finite"):
        done.save_checkpoint(tmp_path / "poisoned.ckpt", weights_only=True)
    assert not list(tmp_path.iterdir())


def test_the_device_is_waited_for_only_where_metrics_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(FiniteLoss, "check", lambda self: looks.append(1))
    fit(Classifier(), lora(), log_every_n_steps=4, max_steps=9, limit_train_batches=3)
    assert len(looks) == 2 + 3  # at steps 4 and 8, and at the end of three epochs


def test_the_first_bad_step_is_kept() -> None:
    loss = FiniteLoss()
    for step, value in enumerate([1.0, math.inf, 2.0, math.nan]):
        loss.note(torch.tensor(value), step)
    with pytest.raises(ValueError, match="since step 1:"):
        loss.check()


NUMBERS = [  # every number that a method of this package can be given
    (name, argument)
    for name in callbacks.__all__
    if isinstance(cls := getattr(callbacks, name), type) and issubclass(cls, AdapterCallback)
    for argument, parameter in inspect.signature(cls).parameters.items()
    if isinstance(parameter.default, float) or argument in ("alpha", "scaling")
]


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_method_takes_a_number_that_is_not_finite(name: str, argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} needs a finite {argument}, got {value}") as error:
        getattr(callbacks, name)(**{argument: value})
    assert one_sentence(str(error.value))


def test_numbers_are_looked_for_inside_arguments() -> None:
    with pytest.raises(ValueError, match="needs a finite alpha, got nan"):
        LoRA(alpha=math.nan)
    assert len(NUMBERS) > 20


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_configuration_from_elsewhere_is_checked(number: float, tmp_path: Path) -> None:
    module = Classifier()
    with pytest.raises(ValueError, match="LoraConfig has lora_alpha="):
        PEFT(peft.LoraConfig(lora_alpha=number, target_modules=["linear"]), backbone="net").apply(module)  # type: ignore[arg-type]
    save_adapter(_adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": number}))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="LoraConfig has lora_alpha=") as error:
        load_adapter(module.net, tmp_path)
    assert one_sentence(str(error.value))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    with pytest.raises(ValueError, match="The scale must be a finite number"):
        adapters(_adapted()).scale(number)


def _adapted() -> Classifier:
    module = Classifier()
    lora().apply(module)
    return module


def test_weights_that_overflow_are_noticed() -> None:
    module = Classifier()
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.fill_(3e38)
    with pytest.raises(ValueError, match="not finite since step 1"):
        trainer(lora()).fit(module, data_of(module))


def test_a_base_with_nan_is_noticed() -> None:
    module = Classifier()
    weight: Tensor = next(module.net.parameters())
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="not finite since step 1"):
        trainer(lora()).fit(module, data_of(module))
