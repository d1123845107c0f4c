"""The average of the trained weights: what it is, where it stands, and that nothing else is copied or kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from tuning import QUIET, Classifier, classifier, fit, one_sentence, points, same, trainer, weights

from lightning_peft import load_from_checkpoint
from lightning_peft.callbacks import AdapterEMA, LoRA
from lightning_peft.stack.adapter_files.folder import AdapterError

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def lora(**options: Any) -> LoRA:
    return LoRA(**({"r": 2, "backbone": "net"} | options))


def trained(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Steps(L.Callback):
    """Notes the trained weights after each optimizer step, and when validation begins and ends."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(trained(pl_module))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.validated.append(trained(pl_module))


def moving(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The definition, written out."""
    average = {name: value.double() for name, value in steps[0].items()}
    for step in steps[1:]:
        average = {name: decay * average[name] + (1 - decay) * value.double() for name, value in step.items()}
    return average


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].double(), b[name].double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("every", "start"), [(1, 0), (2, 0), (1, 3)])
def test_the_module_ends_with_the_moving_average_of_the_trained_weights(every: int, start: int) -> None:
    module, steps = classifier(), Steps()
    fit(module, lora(), steps, AdapterEMA(0.7, every, start), max_steps=8)
    used = [weights for number, weights in enumerate(steps.steps, 1) if number > start and number % every == 0]
    assert len(steps.steps) == 8 and len(used) > 1
    close(trained(module), moving(used, 0.7))


def test_training_goes_on_as_if_there_were_no_average() -> None:
    alone, averaged = Steps(), Steps()
    for steps, callbacks in ((alone, []), (averaged, [AdapterEMA(0.7)])):
        module = classifier()
        torch.manual_seed(5)
        trainer(lora(), *callbacks, steps, max_epochs=3, max_steps=-1).fit(module, points(), points())
    assert all(same(a, b) for a, b in zip(alone.steps, averaged.steps, strict=True))


def test_validation_sees_the_average() -> None:
    module, steps = classifier(), Steps()
    made = trainer(lora(), AdapterEMA(0.7), steps, max_epochs=2, max_steps=-1, num_sanity_val_steps=1)
    made.fit(module, points(), points(16, 16))
    sanity, first, second = steps.validated
    assert not any(value.any() for name, value in sanity.items() if "lora_B" in name)
    close(first, moving(steps.steps[:4], 0.7))
    close(second, moving(steps.steps, 0.7))
    made.validate(module, points(16, 16), verbose=False)
    close(steps.validated[-1], second)  # and after fit it is still the average


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("built", ["__init__", "setup", "configure_model"])
def test_it_may_stand_anywhere_and_the_backbone_be_built_at_any_time(built: str, order: int) -> None:
    module, steps = classifier(built), Steps()
    fit(module, *[lora(), AdapterEMA(0.7)][::order], steps)
    close(trained(module), moving(steps.steps, 0.7))


def test_accumulated_batches_are_one_update() -> None:
    module, steps = classifier(), Steps()
    fit(module, lora(), AdapterEMA(0.7), steps, accumulate_grad_batches=2, max_epochs=2, max_steps=-1)
    assert len(steps.steps) == 4
    close(trained(module), moving(steps.steps, 0.7))


def test_half_weights_are_averaged_in_float32() -> None:
    module, steps = classifier(), Steps()
    fit(module, lora(), AdapterEMA(0.999), steps, max_steps=30, max_epochs=-1, precision="bf16-true")
    assert module.head.weight.dtype == torch.bfloat16
    average = moving(steps.steps, 0.999)["head.weight"]
    assert not torch.equal(average.bfloat16(), steps.steps[0]["head.weight"])  # what an average in bfloat16 would be
    assert torch.equal(module.head.weight, average.float().bfloat16())


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_made_in_training_holds_the_average(tmp_path: Path, weights_only: bool) -> None:
    module, steps = classifier(), Steps()
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_weights_only=weights_only)
    fit(module, lora(), AdapterEMA(0.7), steps, saved, enable_checkpointing=True, max_steps=2)
    loaded = load_from_checkpoint(Classifier, tmp_path / "step=2.ckpt")
    close(trained(loaded), moving(steps.steps, 0.7))
    tested = classifier()
    trainer(lora()).test(tested, points(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    assert same({n: v for n, v in weights(tested).items() if n in trained(loaded)}, trained(loaded))


def test_lightnings_own_average_is_not_in_a_checkpoint_of_weights_only(tmp_path: Path) -> None:
    module, steps = classifier(), Steps()
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_weights_only=True)
    fit(module, lora(), EMAWeightAveraging(decay=0.7), steps, saved, enable_checkpointing=True, max_steps=2)
    assert same(trained(load_from_checkpoint(Classifier, tmp_path / "step=2.ckpt")), steps.steps[-1])


def test_it_keeps_nothing_but_what_is_trained(tmp_path: Path) -> None:
    module, average = classifier(), AdapterEMA(0.7)
    made = fit(module, lora(), average)
    made.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    kept = state["callbacks"]["AdapterEMA"]
    assert kept["current"].keys() == trained(module).keys() == average._average.keys()
    assert kept["average"] == {}  # in float32 the state_dict says it all
    assert not any("base_layer" in name for name in state["state_dict"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("when", ["in training", "after training"])
def test_training_on_equals_training_through(tmp_path: Path, when: str, precision: str) -> None:
    path = tmp_path / "step=4.ckpt"

    def run(epochs: int, ckpt_path: Any = None) -> tuple[L.LightningModule, dict[str, Any]]:
        module, average = classifier(), AdapterEMA(0.7)
        saved = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        options = {"precision": precision, "enable_checkpointing": True, "ckpt_path": ckpt_path}
        made = fit(module, lora(), average, saved, max_epochs=epochs, max_steps=-1, **options)
        if epochs == 1:
            made.save_checkpoint(path)
        return module, average.state_dict()

    whole, kept = run(2)
    if when == "after training":
        path.unlink()
        run(1)
    on, kept_on = run(2, path)
    assert same(trained(whole), trained(on))
    assert same(kept["current"], kept_on["current"]) and kept["step"] == kept_on["step"] == 8


def test_resuming_with_other_weights_to_train_is_one_sentence() -> None:
    average, module = AdapterEMA(), classifier()
    lora().apply(module)
    average.load_state_dict({"step": 1, "current": {"head.weight": torch.zeros(3, 8)}, "average": {}})
    with pytest.raises(AdapterError, match=r"^The weights being trained and the checkpoint's average do not") as error:
        average.on_train_start(SimpleNamespace(), module)  # type: ignore[arg-type]
    assert one_sentence(str(error.value))


# -- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["on_validation_batch_start", "on_train_batch_start"])
def test_an_interrupted_run_leaves_the_weights_and_can_be_saved_and_resumed(tmp_path: Path, where: str) -> None:
    class Interrupt(L.Callback):
        pass

    def interrupt(self: Any, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("interrupted")

    setattr(Interrupt, where, interrupt)
    module, steps = classifier(), Steps()
    saved = ModelCheckpoint(tmp_path, filename="a", every_n_epochs=9, save_on_exception=True)
    made = trainer(lora(), AdapterEMA(0.7), steps, Interrupt(), saved, max_steps=9, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="interrupted"):
        made.fit(module, points(), points())
    assert same(trained(module), steps.steps[3])
    (path,) = tmp_path.glob("*.ckpt")
    close(trained(load_from_checkpoint(Classifier, path)), moving(steps.steps, 0.7))
    assert same(torch.load(path, weights_only=True)["callbacks"]["AdapterEMA"]["current"], steps.steps[3])


def test_nothing_is_left_on_the_module() -> None:
    module, average = classifier(), AdapterEMA(0.7)
    before = lora().apply(module) and module.on_save_checkpoint
    fit(module, lora(), average)
    assert module.on_save_checkpoint == before


def test_a_second_fit_starts_an_average_of_its_own() -> None:
    module, average, steps = classifier(), AdapterEMA(0.7), Steps()
    fit(module, lora(), average)
    fit(module, lora(), average, steps)
    close(trained(module), moving(steps.steps, 0.7))


def test_it_works_without_an_adapter() -> None:
    module, steps = classifier(), Steps()
    module.net.requires_grad_(False)
    fit(module, AdapterEMA(0.7), steps)
    assert trained(module).keys() == {"head.weight", "head.bias"}
    close(trained(module), moving(steps.steps, 0.7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"^decay must be in \[0, 1\), got 1\.0\.$"),
        ({"every_n_steps": 0}, r"^every_n_steps must be at least 1 .*, got 0 and 0\.$"),
        ({"starting_at_step": -1}, r"^every_n_steps must be at least 1 .*, got 1 and -1\.$"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        AdapterEMA(**options)
    assert one_sentence(str(error.value))


def test_a_strategy_whose_shards_it_cannot_read_is_one_sentence() -> None:
    made: Any = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match=r"^AdapterEMA cannot read the shards of FSDPStrategy: use ") as error:
        AdapterEMA().setup(made, classifier(), "fit")
    assert one_sentence(str(error.value))
