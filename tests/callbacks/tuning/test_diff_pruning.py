"""Diff pruning: gates while the difference is learned, an exact share afterwards, nothing random in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from tuning import QUIET, Classifier, Language, fit, one_sentence, same, weights

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import DiffPruning
from lightning_peft.tuners.weight_deltas.gates import gates
from lightning_peft.tuners.weight_deltas.masks import deltas

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

ENTRIES = 408  # of Net


def pruning(**options: Any) -> DiffPruning:
    settings: dict[str, Any] = {"density": 0.1, "gate_steps": 4, "l0": 1e-2, "backbone": "net"}
    return DiffPruning(**(settings | options))


class Noted(L.Callback):
    """The effective differences after each step, the masks, the gates' logits, and how many states Adam has."""

    def __init__(self) -> None:
        self.effective: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.remembered: list[int] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.remembered.append(len(optimizer.state))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        net = adapters(pl_module).backbone
        found, gated = deltas(net, "diff-pruning"), gates(net, "diff-pruning")
        both = [d.value.detach() * g.values() for d, g in zip(found, gated, strict=True)]
        self.effective.append(torch.cat([value.flatten() for value in both]))
        self.masks.append(torch.cat([d.mask.flatten() for d in found if d.mask is not None]))
        self.logits.append(torch.cat([(g.start + g.rate * g.entries.detach()).flatten() for g in gated]))


@pytest.mark.parametrize("structured", [False, True])
def test_exactly_the_share_of_largest_differences_is_kept_and_trained_on(structured: bool) -> None:
    module, noted = Classifier(), Noted()
    before = weights(module)
    fit(module, pruning(structured=structured), noted, max_steps=8)
    assert all(mask.all() for mask in noted.masks[:4]) and noted.logits[3].std() > 0
    mask = noted.masks[4]
    assert int(mask.sum()) == round(0.1 * ENTRIES) and all(torch.equal(mask, m) for m in noted.masks[5:])
    last = noted.effective[3].abs()
    assert last[mask].min() >= last[~mask].max()
    # one step of Adam from where they were
    assert (noted.effective[4] - noted.effective[3])[mask].abs().max() <= 0.0111
    assert not noted.effective[-1][~mask].any() and (noted.effective[-1][mask] != 0).all()
    trained = len([p for p in module.parameters() if p.requires_grad])
    assert noted.remembered == [0, trained, trained, trained, 0, trained, trained, trained]
    for delta in deltas(adapters(module).backbone, "diff-pruning"):
        owner, _, own = delta.full_name.rpartition(".")
        assert delta.mask is not None
        effective = getattr(adapters(module).backbone.get_submodule(owner), own).detach()
        assert torch.equal(effective[~delta.mask], before[f"net.{delta.full_name}"][~delta.mask])
    assert not torch.equal(module.head.weight, Classifier().head.weight)  # dense


def test_an_adapter_is_an_identity_at_the_start_whatever_the_noise() -> None:
    module, x = Classifier().eval(), torch.randn(3, 1, 10)
    expected = module(x)
    callback = pruning()
    callback.apply(module)
    for gate in callback._gates():
        gate.rate.fill_(3.0)
    callback._draw()
    assert torch.equal(module.eval()(x), expected)


def test_training_is_random_alike_for_a_seed_and_evaluation_is_not_random() -> None:
    outputs: list[Tensor] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                outputs.append(pl_module.net.input.weight.detach().clone())

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                outputs.extend(pl_module.net.input.weight.detach().clone() for _ in range(2))

    for seed in (0, 0, 1):
        fit(Classifier(), pruning(seed=seed), Look(), max_steps=8)
    at_end, again, in_training = outputs[0], outputs[1], outputs[2]
    assert torch.equal(at_end, again) and not torch.equal(at_end, in_training)
    assert torch.equal(in_training, outputs[5]) and not torch.equal(in_training, outputs[8])


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_logits_have_their_own_learning_rate(optimizer: str, scheduled: bool) -> None:
    noted, gradients = Noted(), []

    class Other(Classifier):
        def configure_optimizers(self) -> Any:
            made = getattr(torch.optim, optimizer)(self.parameters(), lr=1e-3, weight_decay=0.0)
            if not scheduled:
                return made
            warmup = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
            return [made], [{"scheduler": warmup, "interval": "step"}]

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            callback: Any = trainer.callbacks[0]
            # with respect to the logits
            gradients.append(torch.cat([(g.entries.grad / g.rate).flatten() for g in callback._gates()]))

    fit(Other(), pruning(gate_lr=0.2, l0=1.0), noted, Note(), max_steps=8)
    moved = noted.logits[0] - 5.0
    rate = 0.1 if scheduled else 0.2
    if optimizer == "SGD":
        assert torch.allclose(moved, -rate * gradients[0], atol=1e-5)
    else:
        assert torch.allclose(moved, -rate * gradients[0].sign(), atol=1e-3)


@pytest.mark.parametrize("stopped", [1, 3])
def test_a_run_resumes_exactly_in_either_phase(stopped: int, tmp_path: Path) -> None:
    once = Classifier()
    fit(once, pruning(gate_steps=8), max_epochs=4, max_steps=-1)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 >= stopped

    part = Classifier()
    made = fit(part, pruning(gate_steps=8), Stop(), max_epochs=4, max_steps=-1)
    made.save_checkpoint(tmp_path / "part.ckpt")
    again = Classifier()
    fit(again, pruning(gate_steps=8), max_epochs=4, max_steps=-1, ckpt_path=tmp_path / "part.ckpt")
    assert not same(weights(part), weights(once)) and same(weights(again), weights(once))


@pytest.mark.parametrize("steps", [2, 5])
def test_a_folder_is_a_plain_difference_in_either_phase(steps: int, tmp_path: Path) -> None:
    module = Language("gpt2")

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= steps

    fit(module, DiffPruning(density=0.01, gate_steps=4, l0=1e-3), Stop(), max_steps=6)
    x = torch.arange(3, 12)[None]
    expected = module.eval().model(input_ids=x).logits.detach()
    save_adapter(module, tmp_path)
    again = Language("gpt2").eval()
    (part,) = load_adapter(again.model, tmp_path)
    assert torch.equal(again.model(input_ids=x).logits, expected)
    config: Any = part.config
    assert (config.gates is None and not config.tensor_gates and config.masked is None) or steps == 2
    stored = sum(p.numel() for p in adapters(again.model).parameters(part).values())
    entries = sum(p.numel() for p in Language("gpt2").model.parameters())
    assert stored == (entries if steps == 2 else round(0.01 * entries))


def test_gates_are_gone_from_a_deleted_adapter() -> None:
    module = Classifier()
    callback = pruning()
    callback.apply(module)
    callback._draw()
    adapters(module).remove("diff-pruning")
    assert not any("weight_deltas" in name for name, _ in module.named_modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.0}, "density must be in (0, 1), got 1.0."),
        ({"gate_epochs": 1}, "DiffPruning takes gate_steps or gate_epochs, not both."),
        ({"gate_steps": 0}, "DiffPruning needs at least one step or epoch with gates."),
        ({"gate_lr": 0.0}, "DiffPruning needs l0 and seed of at least 0, gate_lr above 0, and gate_start of log(5)."),
        ({"gate_start": 1.0}, "DiffPruning needs l0 and seed of at least 0, gate_lr above 0, and gate_start of"),
        ({"density": 0.001}, "A density of 0.001 keeps no entry of this backbone: raise it."),
        ({"gate_steps": 8}, "DiffPruning changes what it trains after 8 optimizer steps, but the training ends"),
    ],
)
def test_a_wrong_setting_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        fit(Classifier(), pruning(**options), max_steps=8)
    assert str(raised.value).startswith(message) and one_sentence(str(raised.value))
