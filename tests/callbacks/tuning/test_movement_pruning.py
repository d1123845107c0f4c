"""Mask-only movement pruning: the density at each step, which weights go, and what masks alone can learn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tuning import QUIET, Classifier, Language, fit, one_sentence, points, same, texts, trainer, weights

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import MovementPruning
from lightning_peft.testing import check_adaptation

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def pruning(**options: Any) -> MovementPruning:
    return MovementPruning(**({"density": 0.25, "backbone": "net"} | options))


def layers(module: nn.Module, name: str = "movement") -> list[Any]:
    return list(adapters(module)[name].injection.layers())


def kept(module: nn.Module) -> list[int]:
    return [int(layer.mask("movement").sum()) for layer in layers(module)]


def call(module: Any, batch: list[Tensor]) -> Tensor:
    return module(batch[0])


class Noted(L.Callback):
    """How many entries of each matrix act in each step."""

    def __init__(self) -> None:
        self.kept: list[list[int]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.kept.append(kept(pl_module))


# -- the density ----------------------------------------------------------------------------------------------------


def test_each_matrix_keeps_exactly_its_share_along_the_cubic_curve() -> None:
    noted, module = Noted(), Classifier()
    made = fit(module, pruning(), noted, max_steps=20)
    shares = [1.0] * 2 + [0.25 + 0.75 * (1 - (t - 2) / 14) ** 3 for t in range(2, 16)] + [0.25] * 4
    assert noted.kept == [[round(64 * share)] * 3 for share in shares]
    assert float(made.callback_metrics["movement_density"]) == 0.25


@pytest.mark.parametrize(
    ("begin", "end", "steps"), [(1, 3, [64, 64, 22, 16]), (0, 0, [16] * 4), (2, 2, [64, 64, 16, 16])]
)
def test_the_curve_in_steps(begin: int, end: int, steps: list[int]) -> None:
    noted = Noted()
    fit(Classifier(), pruning(begin_step=begin, end_step=end), noted, max_steps=4)
    assert noted.kept == [[count] * 3 for count in steps]


def test_a_second_training_goes_on_at_the_density_of_the_first() -> None:
    module, callback, noted = Classifier(), pruning(), Noted()
    fit(module, callback, max_steps=8)
    before = weights(module)
    fit(module, callback, noted, max_steps=8)
    assert noted.kept == [[16] * 3] * 8 and not same(before, weights(module))
    fit(module, pruning(), noted, max_steps=8)
    assert noted.kept == [[16] * 3] * 16


def test_early_stopping_waits_for_the_final_density() -> None:
    settled: list[bool] = []
    callback = pruning(begin_step=1, end_step=3)

    class Ask(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            settled.append(callback.settled)

    fit(Classifier(), callback, Ask(), max_steps=5)
    assert settled == [False, False, False, True, True]


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_run_resumes_exactly(stopped: int, tmp_path: Path) -> None:
    once, part, again = Classifier(), Classifier(), Classifier()
    fit(once, pruning(), max_epochs=4, max_steps=-1)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 >= stopped

    fit(part, pruning(), Stop(), max_epochs=4, max_steps=-1).save_checkpoint(tmp_path / "part.ckpt")
    fit(again, pruning(), max_epochs=4, max_steps=-1, ckpt_path=tmp_path / "part.ckpt")
    assert not same(weights(part), weights(once)) and same(weights(again), weights(once))


# -- which weights go -----------------------------------------------------------------------------------------------


class Two(L.LightningModule):
    """Two weights, 3 and 0.1, each on its own input; the target wants the small one larger and no large one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 1, bias=False))
        self.net[0].weight.data = torch.tensor([[3.0, 0.1]])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize(("criterion", "expected"), [("movement", [False, True]), ("magnitude", [True, False])])
def test_the_sign_of_the_gradient_decides_and_not_the_size(criterion: Any, expected: list[bool]) -> None:
    """A weight that would move towards 0 is dropped however large it is, and one that would move away is kept."""
    module = Two()
    x = torch.eye(2).repeat(4, 1)
    batches = DataLoader(TensorDataset(x, x @ torch.tensor([0.0, 1.0])), batch_size=4)
    made = trainer(pruning(density=0.5, criterion=criterion, target_modules=["0"]), max_steps=5, max_epochs=-1)
    made.fit(module, batches)
    (layer,) = layers(module)
    assert layer.mask("movement")[0].tolist() == expected
    assert torch.equal(layer.base_layer.weight, torch.tensor([[3.0, 0.1]]))
    if (
        criterion == "movement"
    ):  # by hand: S <- S - 0.1 * dL/dW' * W, summed over five steps, W' = W while both are kept
        assert float(layer.weight_mask_scores["movement"][0, 0]) < 0 < float(layer.weight_mask_scores["movement"][0, 1])


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_controls_train_no_mask_whatever_the_optimizer_decays(criterion: Any) -> None:
    class Decayed(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1, weight_decay=0.1)

    module = Decayed()
    callback = pruning(criterion=criterion)
    callback.apply(module)
    before = [layer.weight_mask_scores["movement"].clone() for layer in layers(module)]
    fit(module, callback, max_steps=4)
    after = [layer.weight_mask_scores["movement"] for layer in layers(module)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and kept(module) == [16] * 3


class Digits(L.LightningModule):
    """A small network for digits; which five, the data says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 5))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_masks_alone_teach_a_network_digits_that_it_has_not_seen_and_random_ones_do_not() -> None:
    """A network of digits 0 to 4, every weight frozen, on digits 5 to 9: accuracy on those held out."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    new = y >= 5
    train, test = new.nonzero()[:300, 0], new.nonzero()[300:, 0]
    module = Digits()
    trainer(max_steps=150, max_epochs=-1).fit(
        module, DataLoader(TensorDataset(x[~new], y[~new]), batch_size=32, shuffle=False)
    )

    @torch.no_grad()
    def measured(module: Any) -> tuple[float, float]:
        loss = nn.functional.cross_entropy(module.net(x[train]), y[train] - 5)
        return float(loss), float((module.net(x[test]).argmax(-1) == y[test] - 5).float().mean())

    results = {"before": measured(module)}
    for criterion in ("movement", "magnitude", "random"):
        adapted = copy.deepcopy(module)
        options: dict[str, Any] = {"density": 0.75, "criterion": criterion, "target_modules": ["0", "2", "4"]}
        trainer(pruning(train_head=False, **options), max_steps=150, max_epochs=-1).fit(
            adapted, DataLoader(TensorDataset(x[train], y[train] - 5), batch_size=32)
        )
        results[criterion] = measured(adapted)
        with torch.no_grad(), adapters(adapted).disabled():
            assert measured(adapted) == results["before"]
    losses, accuracies = ({name: result[i] for name, result in results.items()} for i in (0, 1))
    assert accuracies["movement"] > 0.5 and max(accuracies[n] for n in ("before", "magnitude", "random")) < 0.4
    assert losses["movement"] < 0.5 * min(losses[name] for name in ("before", "magnitude", "random"))


# -- laws -----------------------------------------------------------------------------------------------------------


def test_laws_hold_from_a_density_of_one() -> None:
    """The table of laws has a row that begins at a half; by default it begins at one, as the base."""
    callback = pruning(begin_step=1, end_step=2)
    laws = ("identity", "frozen", "off", "merge", "round trip", "complete", "alive", "restored", "count", "resume")
    outcomes = check_adaptation(Classifier, callback, list(points()), call, lambda _: 3 * 64, laws)
    assert {outcome.law for outcome in outcomes if not outcome.holds} == {"off", "complete"}  # which it declares
    half = check_adaptation(Classifier, pruning(initial_density=0.5, begin_step=1, end_step=2), list(points()), call)
    assert {"off", "frozen", "round trip", "resume"} <= {outcome.law for outcome in half if outcome.holds}
    assert {outcome.law: outcome.reason for outcome in half}[
        "identity"
    ] == "initial_density=0.5 drops weights at the start"


# -- on language models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_saved_loaded_merged_and_stacked(kind: str, tmp_path: Path) -> None:
    module = Language(kind)
    fit(module, MovementPruning(density=0.8, begin_step=0, end_step=2), max_steps=4)
    module.eval()
    ids = next(iter(texts()))[0]
    expected = module.model(input_ids=ids).logits.detach()
    assert not torch.equal(expected, Language(kind).eval().model(input_ids=ids).logits)
    save_adapter(module, tmp_path)
    again = Language(kind).eval()
    load_adapter(again.model, tmp_path, "movement")
    assert torch.equal(again.model(input_ids=ids).logits, expected)
    adapters(module).merge()
    torch.testing.assert_close(module.model(input_ids=ids).logits, expected)
    adapters(module).unmerge()
    assert torch.equal(module.model(input_ids=ids).logits, expected)
    # a further adapter on what was loaded: its masks are trained, the first ones stay
    fit(again, MovementPruning(density=0.8, begin_step=0, end_step=2, name="further"), max_steps=4)
    first, further = layers(again)[0].mask("movement"), layers(again)[0].mask("further")
    assert torch.equal(first, layers(module)[0].mask("movement")) and not torch.equal(first, further)


def test_a_loaded_folder_is_not_trained_further_which_is_said(tmp_path: Path) -> None:
    module, again = Classifier(), Classifier()
    fit(module, pruning(), max_steps=8)
    save_adapter(module, tmp_path)
    load_adapter(again.net, tmp_path, "movement")  # type: ignore[arg-type]
    with pytest.raises(ValueError) as error:
        fit(again, pruning(), max_steps=8)
    assert one_sentence(str(error.value)) and "scores" in str(error.value) and "checkpoint" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0},
        {"density": 0.6, "initial_density": 0.5},
        {"begin": 0.5, "end": 0.4},
        {"end": 1.0},
        {"begin_step": -1},
        {"begin_step": 3, "end_step": 2},
        {"criterion": "size"},
    ],
)
def test_wrong_arguments_are_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        MovementPruning(**options)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        ({}, {"max_epochs": -1, "max_steps": -1}, "give max_steps, max_epochs, or begin_step and end_step"),
        ({"end_step": 9}, {"max_steps": 4}, "after 9 optimizer steps, but the training ends after 4"),
    ],
)
def test_a_training_without_an_end_or_too_short_is_one_sentence(
    options: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fit(Classifier(), pruning(**options), **training)
    assert one_sentence(str(error.value))
