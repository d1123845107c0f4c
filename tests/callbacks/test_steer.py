"""`Steer` applies a saved adapter while a Trainer evaluates, and at no other time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from edits import add_offsets, logits
from lightning.pytorch.callbacks import ModelCheckpoint
from statements import Module, Statements, trainer
from torch import Tensor

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import LoRA, Steer
from lightning_peft.positions import answering
from lightning_peft.stack.stack import find_stacks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode", "ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
]
DATA = Statements()


class Evaluated(Module):
    """Gives the logits of its batches in every evaluation loop."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def _logits(self, batch: dict[str, Any], batch_idx: int) -> None:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        self.given.append(logits(self.backbone, ids, attention_mask=mask))

    validation_step = test_step = predict_step = _logits  # type: ignore[assignment]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module = Module()
    add_offsets(module.backbone, "answer")
    return save_adapter(module, tmp_path / "edit")


def evaluated(verb: str, *callbacks: L.Callback) -> Tensor:
    module = Evaluated()
    getattr(trainer(*callbacks), verb)(module, DATA.loader())
    assert not find_stacks(module), "nothing is left"
    module.given, seen = [], module.given
    getattr(trainer(), verb)(module, DATA.loader())
    assert torch.equal(torch.cat(module.given), torch.cat(unsteered(verb))), "afterwards it is itself, bit for bit"
    return torch.cat(seen)


def unsteered(verb: str) -> list[Tensor]:
    module = Evaluated()
    getattr(trainer(), verb)(module, DATA.loader())
    return module.given


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_while_evaluating_the_model_is_that_with_the_adapter_from_where_the_answers_begin(
    verb: str, folder: Path
) -> None:
    module = Module()
    load_adapter(module.backbone, folder)
    expected = []
    for batch in DATA.loader():
        with answering(module.backbone, start=batch["prompt_end"]):
            expected.append(logits(module.backbone, batch["input_ids"], attention_mask=batch["attention_mask"]))
    assert torch.equal(evaluated(verb, Steer(folder)), torch.cat(expected))


def test_at_strength_zero_nothing_changes(folder: Path) -> None:
    assert torch.equal(evaluated("test", Steer(folder, scale=0.0)), torch.cat(unsteered("test")))


def test_strength_and_positions_are_those_asked_for(folder: Path) -> None:
    module = Module()
    load_adapter(module.backbone, folder)
    adapters(module).scale(-2.0)
    expected = []
    for batch in DATA.loader():
        with answering(module.backbone, mask=torch.ones_like(batch["input_ids"]) > 0):
            expected.append(logits(module.backbone, batch["input_ids"], attention_mask=batch["attention_mask"]))
    given = evaluated("test", Steer(folder, scale=-2.0, positions="all"))
    real = DATA.column("attention_mask") > 0
    torch.testing.assert_close(given[real], torch.cat(expected)[real], atol=1e-5, rtol=1e-5)


def test_two_of_them_act_together(folder: Path) -> None:
    twice = evaluated("test", Steer(folder), Steer(folder))
    torch.testing.assert_close(twice, evaluated("test", Steer(folder, scale=2.0)), atol=1e-4, rtol=1e-4)


def test_an_exception_while_evaluating_leaves_the_module_as_it_was(folder: Path) -> None:
    class Failing(Evaluated):
        def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            assert find_stacks(self)
            raise KeyError

    module = Failing()
    with pytest.raises(KeyError):
        trainer(Steer(folder)).test(module, DATA.loader())
    assert not find_stacks(module)


def test_a_fit_is_validated_with_it_trains_without_it_and_saves_none_of_it(folder: Path, tmp_path: Path) -> None:
    def fit(*callbacks: L.Callback) -> tuple[Module, float, dict[str, Any]]:
        torch.manual_seed(0)
        module = Module()
        kept = ModelCheckpoint(tmp_path, filename=f"with-{len(callbacks)}", monitor="val_loss")
        made = trainer(LoRA(r=2), *callbacks, kept, enable_checkpointing=True, num_sanity_val_steps=1, max_epochs=2)
        made.fit(module, DATA.loader(), DATA.loader())
        saved = torch.load(kept.best_model_path, weights_only=True)
        return module, float(made.callback_metrics["val_loss"]), saved["state_dict"]

    plain, plain_loss, plain_saved = fit()
    steered, steered_loss, steered_saved = fit(Steer(folder))
    assert steered_loss != plain_loss
    assert steered_saved.keys() == plain_saved.keys()
    assert [part.name for part in adapters(steered).parts] == ["lora"]
    for name, value in plain.state_dict().items():
        assert torch.equal(steered.state_dict()[name], value)


WRONG = {
    "no folder": ({"adapter": "nowhere"}, "nowhere is not a folder"),
    "no number": ({"scale": float("nan")}, "The scale must be a finite number, 1 as saved and 0 off, got nan"),
    "no number either": ({"scale": "x"}, "The scale must be a finite number, 1 as saved and 0 off, got 'x'"),
    "positions": ({"positions": "some"}, "positions must be one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_when_it_is_made(case: str, folder: Path) -> None:
    options, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        Steer(**({"adapter": folder} | options))  # type: ignore[arg-type]
