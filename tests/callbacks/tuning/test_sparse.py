"""LT-SFT: the mask is the largest changes, exactly as many as asked for, and holds whatever the optimizer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from tuning import QUIET, Classifier, Language, fit, one_sentence, points, python, same, trainer, weights

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import LTSFT, FullFineTuning
from lightning_peft.fitting.checkpoint_files import export_checkpoint
from lightning_peft.tuners.weight_deltas.masks import Delta, deltas

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

EPOCH = 4  # optimizer steps of `points()`
ENTRIES = 408  # of Net


def ltsft(**options: Any) -> LTSFT:
    return LTSFT(**({"density": 0.1, "full_steps": EPOCH, "backbone": "net"} | options))


def by_name(module: Any) -> dict[str, Delta]:
    return {delta.full_name: delta for delta in deltas(adapters(module).backbone, "lt-sft")}


class Noted(L.Callback):
    """Copies of the masks and deltas after each step, and of the optimizer's step counts before."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.values: list[dict[str, Tensor]] = []
        self.remembered: list[int] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.remembered.append(len(optimizer.state))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        found = by_name(pl_module)
        self.masks.append({name: d.mask.clone() for name, d in found.items() if d.mask is not None})
        self.values.append({name: d.value.detach().clone() for name, d in found.items()})


class Other(Classifier):
    """Trained by another optimizer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        options: dict[str, Any] = {"weight_decay": 0.1} if self.kind != "LBFGS" else {}
        options |= {"momentum": 0.9} if self.kind == "SGD" else {}
        return getattr(torch.optim, self.kind)(self.parameters(), lr=0.01, **options)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad", "RMSprop", "LBFGS"])
def test_only_the_mask_moves_under_any_optimizer_with_weight_decay(optimizer: str) -> None:
    module, noted = Other(optimizer), Noted()
    before = weights(module)
    fit(module, ltsft(), noted, max_steps=8)
    found = by_name(module)
    assert sum(d.base.numel() for d in found.values()) == ENTRIES
    assert sum(int(d.mask.sum()) for d in found.values()) == int(0.1 * ENTRIES)
    for name, delta in found.items():
        owner, _, own = name.rpartition(".")
        effective = getattr(module.net.get_submodule(owner), own)
        assert torch.equal(effective[~delta.mask], before[f"net.{name}"][~delta.mask])
        assert torch.equal(delta.base, before[f"net.{name}"])
        assert not delta.value[~delta.mask].any()
    assert sum(int((d.value != 0).sum()) for d in found.values()) > 0.5 * 0.1 * ENTRIES


def test_the_mask_is_the_largest_changes_of_full_fine_tuning() -> None:
    full, module = Classifier(), Classifier()
    fit(full, FullFineTuning(backbone="net"), max_steps=EPOCH)
    changes = {delta.full_name: delta.value.detach().abs() for delta in deltas(full.net, "full")}
    noted = Noted()
    fit(module, ltsft(), noted, max_steps=6)
    assert all(mask.all() for masks in noted.masks[:EPOCH] for mask in masks.values())
    assert all(torch.equal(noted.values[EPOCH - 1][name].abs(), change) for name, change in changes.items())
    masks = noted.masks[EPOCH]
    kept = torch.cat([changes[name][mask] for name, mask in masks.items()])
    left = torch.cat([changes[name][~mask] for name, mask in masks.items()])
    assert len(kept) == int(0.1 * ENTRIES) and kept.min() >= left.max()
    assert all(torch.equal(masks[name], mask) for masks in noted.masks[EPOCH:] for name, mask in masks.items())


def test_the_second_phase_begins_at_the_base_with_an_optimizer_that_remembers_nothing() -> None:
    module, noted = Classifier(), Noted()
    fit(module, ltsft(), noted, max_steps=6)
    trained = sum(1 for p in module.parameters() if p.requires_grad)
    assert noted.remembered == [0, trained, trained, trained, 0, trained]
    for value in noted.values[EPOCH].values():  # one step of Adam after the return
        assert value.abs().max() <= 0.011


def test_what_is_trained_never_changes_and_heads_are_always_dense() -> None:
    module = Classifier()
    callback = ltsft()
    callback.apply(module)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    fit(module, callback, max_steps=6)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == names
    assert {"head.weight", "head.bias"} <= set(names)
    assert not torch.equal(module.head.weight, Classifier().head.weight)


@pytest.mark.parametrize("epochs", [1, 2, 3], ids=["in full", "at the change", "in sparse"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_run_resumes_exactly_in_either_phase(epochs: int, iterations: int, tmp_path: Path) -> None:
    """Four epochs at once = some, saved, and the rest by a new callback and module."""
    options: dict[str, Any] = {"iterations": iterations, "full_steps": 2 * EPOCH if iterations == 1 else 5}
    once = Classifier()
    fit(once, ltsft(**options), max_epochs=4, max_steps=-1)
    part = Classifier()
    stopped = trainer(ltsft(**options), _Stop(epochs), max_epochs=4, max_steps=-1)
    torch.manual_seed(5)
    stopped.fit(part, points())
    stopped.save_checkpoint(tmp_path / "part.ckpt")
    again = Classifier()
    fit(again, ltsft(**options), max_epochs=4, max_steps=-1, ckpt_path=tmp_path / "part.ckpt")
    assert not same(weights(part), weights(once)) and same(weights(again), weights(once))


class _Stop(L.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_a_later_sparse_phase_begins_at_the_values_that_its_iteration_began_with() -> None:
    module, noted = Still(), Noted()
    fit(module, ltsft(density=0.05, full_steps=2, iterations=3), noted, max_steps=12)
    for change in (6, 10):  # the first step of the second and third sparse phase
        began, now = noted.values[change - 3], noted.values[change]  # the last of the sparse phase before, and this
        earlier = noted.masks[change - 3]
        assert sum(int((began[name] != 0).sum()) for name in began) > 0
        assert all(torch.equal(now[name], began[name] * earlier[name]) for name in now)
        assert not all(torch.equal(noted.values[change - 1][name], began[name]) for name in began)


class Still(Classifier):
    """Trained by steps of no length from the second sparse phase on: what a phase begins with stays to be seen."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step not in (6, 10)))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize(("step", "message"), [(2, "later"), (5, "its next"), (7, "later"), (9, "its next")])
def test_a_checkpoint_of_the_first_release_goes_on_and_says_how(step: int, message: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"density": 0.05, "full_steps": 2, "iterations": 3}
    part = trainer(ltsft(**options), _StopAt(step), max_steps=12)
    torch.manual_seed(5)
    part.fit(Classifier(), points())
    part.save_checkpoint(tmp_path / "part.ckpt")
    checkpoint = torch.load(tmp_path / "part.ckpt", weights_only=True)
    (state,) = (value for key, value in checkpoint["callbacks"].items() if "LTSFT" in key)
    del state["kept"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    again, noted = Classifier(), Noted()
    with pytest.warns(UserWarning, match="is of a release in which each sparse phase of LTSFT began at zero") as caught:
        fit(again, ltsft(**options), noted, max_steps=12, ckpt_path=tmp_path / "old.ckpt")
    (sentence,) = (str(w.message) for w in caught if "began at zero" in str(w.message))
    assert f"zero: {message}" in sentence and one_sentence(sentence)
    assert sum(int(mask.sum()) for mask in noted.masks[-1].values()) == int(0.05 * ENTRIES)


def test_a_callback_stopped_while_all_is_trained_again_chooses_anew_on_another_module() -> None:
    callback, noted, fresh = ltsft(density=0.05, full_steps=2, iterations=3), Noted(), Noted()
    stopped = trainer(callback, _StopAt(5), max_steps=12)
    stopped.fit(Classifier(), points())
    assert callback.chosen and callback.kept
    fit(Classifier(seed=3), callback, noted, max_steps=12)
    fit(Classifier(seed=3), ltsft(density=0.05, full_steps=2, iterations=3), fresh, max_steps=12)
    assert all(torch.equal(fresh.masks[-1][name], mask) for name, mask in noted.masks[-1].items())


class _StopAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_iterations_add_their_shares_to_the_mask(iterations: int) -> None:
    module, noted = Classifier(), Noted()
    fit(module, ltsft(density=0.05, full_steps=2, iterations=iterations), noted, max_steps=12)
    each = 12 // iterations
    count = int(0.05 * ENTRIES)
    sizes = [sum(int(mask.sum()) for mask in masks.values()) for masks in noted.masks]
    shares = [count * (i + 1) // iterations for i in range(iterations)]
    assert sizes == [ENTRIES if step % each < 2 else shares[step // each] for step in range(12)]
    for before, after in zip(noted.masks, noted.masks[1:], strict=False):  # a mask, once chosen, only grows
        assert all((after[name] >= mask).all() for name, mask in before.items() if not mask.all())
    assert sizes[-1] == count


@pytest.mark.parametrize(
    ("options", "expected"), [({"full_steps": None}, 4), ({"full_steps": None, "full_epochs": 1}, 4), ({}, 4)]
)
def test_full_fine_tuning_lasts_half_of_the_training_or_as_asked(options: dict[str, Any], expected: int) -> None:
    callback = ltsft(**options)
    fit(Classifier(), callback, max_epochs=2, max_steps=-1)
    assert callback.steps == [expected] and callback.turn == 1


def test_the_penalty_adds_its_gradient() -> None:
    gradients = []
    for l1 in (0.0, 7.0):
        module = Classifier()
        fit(module, FullFineTuning(backbone="net"), max_steps=1)
        callback = ltsft(l1=l1, name="full")
        callback.stack = adapters(module)
        values = deltas(module.net, "full")
        for delta in values:
            delta.value.grad = torch.ones_like(delta.value)
        optimizer = torch.optim.SGD([delta.value for delta in values], lr=0.1)
        callback.on_before_optimizer_step(trainer(), module, optimizer)
        gradients.append(torch.cat([(d.value.grad - 1).flatten() for d in values]))
        signs = torch.cat([d.value.detach().sign().flatten() for d in values])
        assert torch.allclose(gradients[-1], l1 / ENTRIES * signs, atol=1e-6) and signs.any()


def test_a_folder_holds_the_kept_entries_and_loads_bit_equal(tmp_path: Path) -> None:
    module = Language("llama")
    made = fit(module, LTSFT(density=0.02, full_steps=2), max_steps=4)
    made.save_checkpoint(tmp_path / "whole.ckpt")
    export_checkpoint(tmp_path / "whole.ckpt", tmp_path / "exported")
    save_adapter(module, tmp_path / "saved")
    count = int(0.02 * sum(p.numel() for p in Language("llama").parameters()))
    x = torch.arange(3, 12)[None]
    for folder in ("saved", "exported"):
        again = Language("llama")
        load_adapter(again.model, tmp_path / folder)
        assert torch.equal(again.model(input_ids=x).logits, module.model(input_ids=x).logits)
        size = (tmp_path / folder / "adapter_model.safetensors").stat().st_size
        assert 8 * count <= size <= 8 * count + 12_000


def test_a_second_fit_goes_on_with_the_mask(tmp_path: Path) -> None:
    module = Classifier()
    callback = ltsft()
    fit(module, callback, max_steps=6)
    masks = {name: d.mask.clone() for name, d in by_name(module).items()}
    values = {name: d.value.detach().clone() for name, d in by_name(module).items()}
    for again in (callback, ltsft()):
        fit(module, again, max_steps=6)
        found = by_name(module)
        assert all(torch.equal(found[name].mask, mask) for name, mask in masks.items())
        assert any(not torch.equal(found[name].value, value) for name, value in values.items())
    other = Classifier()
    fit(other, callback, max_steps=6)  # the callback on another module begins anew
    assert all(torch.equal(d.mask, masks[name]) for name, d in by_name(other).items())


DDP = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from tuning import Classifier, points, trainer, weights
from lightning_peft.callbacks import LTSFT

def main(folder):
    module = Classifier()
    torch.manual_seed(5)
    made = trainer(LTSFT(density=0.1, full_steps=2, backbone="net"), strategy="ddp", devices=2, max_steps=4)
    made.fit(module, points())
    torch.save(weights(module), Path(folder) / f"{made.global_rank}.pt")

main(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_choose_the_same_mask(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    python(script, tmp_path)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    masks = [name for name in states[0] if ".masks." in name]
    assert masks and sum(int(states[0][name].sum()) for name in masks) == int(0.1 * ENTRIES)
    assert same(*states)


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        ({"density": 1.0}, {}, "density must be in (0, 1), got 1.0."),
        ({"full_epochs": 1}, {}, "LTSFT takes full_steps or full_epochs, not both."),
        ({"full_steps": 0}, {}, "LTSFT needs at least one full step or epoch"),
        ({"full_steps": 9}, {"max_steps": 9}, "LTSFT changes what it trains after 9 optimizer steps, but the training"),
        ({"full_steps": 3, "iterations": 2}, {"max_steps": 6}, "2 iterations of 3 steps leave none after 3 full"),
        ({"full_steps": None}, {"max_steps": -1, "max_epochs": -1}, "give max_steps or max_epochs, or full_steps."),
    ],
)
def test_what_cannot_be_done_is_one_sentence_at_the_start(
    options: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        fit(Classifier(), ltsft(**options), **training)
    assert message in str(error.value) and one_sentence(str(error.value))
