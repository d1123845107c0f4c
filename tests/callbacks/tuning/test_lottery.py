"""Lottery tickets: exactly as many weights pruned as stated, zero for good, the others back where they began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tuning import QUIET, Classifier, Language, fit, one_sentence, same, trainer, weights

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import LotteryTicket
from lightning_peft.tuners.weight_deltas.masks import Delta, deltas

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

MATRICES = 6 + 128 + 3 * 64  # entries of Net's convolution and linear layers


def ticket(**options: Any) -> LotteryTicket:
    return LotteryTicket(**({"rounds": 2, "prune": 0.3, "round_steps": 2, "backbone": "net"} | options))


def found(module: Any) -> dict[str, Delta]:
    return {delta.full_name: delta for delta in deltas(adapters(module).backbone, "ticket")}


def masked(module: Any) -> list[Delta]:
    return [delta for delta in found(module).values() if delta.mask is not None]


def effective(module: Any, delta: Delta) -> Tensor:
    owner, _, own = delta.full_name.rpartition(".")
    return getattr(adapters(module).backbone.get_submodule(owner), own).detach()


class Noted(L.Callback):
    """Masks and effective weights at the beginning of each batch, changes made, and after it."""

    def __init__(self) -> None:
        self.masks: list[list[Tensor]] = []
        self.before: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.masks.append([delta.mask.clone() for delta in masked(pl_module) if delta.mask is not None])
        self.before.append([effective(pl_module, delta).clone() for delta in masked(pl_module)])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after.append([effective(pl_module, delta).clone() for delta in masked(pl_module)])


def kept(masks: list[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("prune", [0.2, 0.5])
def test_each_round_keeps_exactly_its_share_of_what_remains(prune: float) -> None:
    noted = Noted()
    fit(Classifier(), ticket(rounds=3, prune=prune), noted, max_steps=8)
    assert [kept(masks) for masks in noted.masks] == [
        round(MATRICES * (1 - prune) ** round_) for round_ in range(4) for _ in range(2)
    ]


def test_what_is_pruned_is_the_smallest_of_what_remains() -> None:
    noted = Noted()
    fit(Classifier(), ticket(), noted, max_steps=6)
    for step in (2, 4):
        trained = torch.cat([value.abs().flatten() for value in noted.after[step - 1]])
        before = torch.cat([mask.flatten() for mask in noted.masks[step - 1]])
        after = torch.cat([mask.flatten() for mask in noted.masks[step]])
        assert not (after & ~before).any()
        assert trained[after].min() >= trained[before & ~after].max()


@pytest.mark.parametrize("rewind", [0, 1])
def test_the_survivors_begin_again_where_they_were_bit_for_bit(rewind: int) -> None:
    module, noted = Classifier(), Noted()
    before = weights(module)
    fit(module, ticket(rewind_steps=rewind), noted, max_steps=6)
    start = noted.before[rewind] if rewind else [before[f"net.{delta.full_name}"] for delta in masked(module)]
    for step in (2, 4):
        for value, mask, first in zip(noted.before[step], noted.masks[step], start, strict=True):
            assert torch.equal(value, torch.where(mask, first, 0.0))


def test_pruned_entries_stay_zero_under_weight_decay_and_the_base_is_kept() -> None:
    module = Classifier()
    before = weights(module)
    fit(module, ticket(), max_steps=8)
    for delta in masked(module):
        assert delta.mask is not None and not effective(module, delta)[~delta.mask].any()
        assert torch.equal(delta.base, before[f"net.{delta.full_name}"])
        assert not torch.equal(effective(module, delta)[delta.mask], delta.base[delta.mask])
    x = torch.randn(2, 1, 10)
    module.eval()
    with adapters(module).disabled():
        assert torch.equal(module.net(x), Classifier().eval().net(x))


def test_a_ticket_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    module = Language("gpt2")
    fit(module, LotteryTicket(rounds=2, prune=0.6, round_steps=1), max_steps=4)
    x = torch.arange(3, 12)[None]
    module.eval()
    expected = module.model(input_ids=x).logits.detach()
    save_adapter(module, tmp_path)
    again = Language("gpt2").eval()
    load_adapter(again.model, tmp_path)
    assert torch.equal(again.model(input_ids=x).logits, expected)
    stack = adapters(module)
    stack.merge()
    assert torch.equal(module.model(input_ids=x).logits, expected)
    zeros = sum(int((delta.base == 0).sum()) for delta in masked(module))
    assert zeros >= sum(int((~delta.mask).sum()) for delta in masked(module) if delta.mask is not None) > 0
    stack.unmerge()
    assert torch.equal(module.model(input_ids=x).logits, expected)


@pytest.mark.parametrize("stopped", [1, 2, 3])
@pytest.mark.parametrize("rewind", [0, 3])
def test_a_run_resumes_exactly_in_any_round(stopped: int, rewind: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rewind_steps": rewind, "round_steps": 5}
    once = Classifier()
    fit(once, ticket(**options), max_epochs=4, max_steps=-1)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 >= stopped

    part = Classifier()
    made = fit(part, ticket(**options), Stop(), max_epochs=4, max_steps=-1)
    made.save_checkpoint(tmp_path / "part.ckpt")
    again = Classifier()
    fit(again, ticket(**options), max_epochs=4, max_steps=-1, ckpt_path=tmp_path / "part.ckpt")
    assert not same(weights(part), weights(once)) and same(weights(again), weights(once))


def test_embeddings_and_vectors_are_trained_but_not_pruned() -> None:
    module = Language("llama")
    fit(module, LotteryTicket(rounds=1, round_steps=1), max_steps=2)
    names = {delta.full_name for delta in masked(module)}
    assert len(names) == 3 * 7 and all(".layers." in name for name in names)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(found(module)) - names


@pytest.mark.parametrize("rate", [0.5, 1.0, 0.0])
def test_the_output_layer_is_pruned_at_its_own_rate(rate: float) -> None:
    module = Classifier()
    fit(module, ticket(prune=0.5, output_layer="blocks.2.linear", output_rate=rate), max_steps=6)
    masks = {delta.full_name: delta.mask for delta in masked(module)}
    output = masks.pop("blocks.2.linear.weight")
    assert output is not None and int(output.sum()) == round(64 * (1 - 0.5 * rate) ** 2)
    assert kept([mask for mask in masks.values() if mask is not None]) == round((MATRICES - 64) * 0.25)
    language = Language("gpt_neox")  # not tied
    callback = LotteryTicket(rounds=1, round_steps=1, prune=0.5)
    fit(language, callback, max_steps=2)
    head = found(language)["lm_head.weight"].mask
    assert callback.output == "lm_head.weight" and head is not None and int(head.sum()) == round(64 * 32 * 0.75)


class Digits(L.LightningModule):
    """A small network for scikit-learn's digits, trained from a random start."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_ticket_beats_random_pruning_from_the_same_start() -> None:
    """Test accuracy with 3 % of the weights, paired over five seeds."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    accuracy: dict[str, list[float]] = {"magnitude": [], "random": []}
    for seed in range(5):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        loader = DataLoader(TensorDataset(x[order[:640]], y[order[:640]]), batch_size=64)
        for criterion, scores in accuracy.items():
            module = Digits(seed)
            callback = LotteryTicket(rounds=5, prune=0.5, criterion=criterion, seed=seed, output_layer="4")
            trainer(callback, max_steps=180).fit(module, loader)
            with torch.no_grad():
                scores.append(float((module.net(x[order[640:]]).argmax(-1) == y[order[640:]]).float().mean()))
    differences = torch.tensor(accuracy["magnitude"]) - torch.tensor(accuracy["random"])
    assert (differences > 0).all() and differences.mean() > 0.05


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        ({"rounds": 0}, {}, "LotteryTicket needs at least one round, and rewind_steps from 0 to below round_steps."),
        ({"rewind_steps": 2}, {}, "LotteryTicket needs at least one round, and rewind_steps from 0 to below"),
        ({"prune": 1.0}, {}, "prune must be in (0, 1) and output_rate in [0, 1], got 1.0 and 0.5."),
        ({"criterion": "size"}, {}, 'criterion must be "magnitude" or "random", got \'size\'.'),
        ({"output_layer": "blocks.0.norm"}, {}, "'blocks.0.norm' is not a linear layer or convolution that can be"),
        ({}, {"max_steps": 4}, "LotteryTicket changes what it trains after 4 optimizer steps, but the training ends"),
        ({"round_steps": None}, {"max_steps": -1, "max_epochs": -1}, "give max_steps, max_epochs or round_steps."),
        ({"round_steps": None, "rewind_steps": 3}, {"max_steps": 6}, "Each round has 2 steps, too few to rewind to"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_at_the_start(
    options: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        fit(Classifier(), ticket(**options), **training)
    assert message in str(error.value) and one_sentence(str(error.value))
