"""SaRA: the small entries and no others are trained, signed, under a nuclear norm that acts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from tuning import QUIET, Classifier, Language, fit, one_sentence, same, weights

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import SaRA
from lightning_peft.callbacks.tuning.sara import nuclear_norm_gradient
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.weight_deltas.entries import entries, entries_config, place

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def sara(**options: Any) -> SaRA:
    settings: dict[str, Any] = {"threshold": 0.05, "rank_min_dim": 4, "backbone": "net"}
    return SaRA(**(settings | options))


def fresh() -> Any:
    """The network that a classifier begins with."""
    return Classifier().net


def effective(module: L.LightningModule) -> dict[str, Tensor]:
    """Every parameter of the network as it computes with it."""
    base = [name for name, _ in fresh().named_parameters()]
    owners = {name: name.rpartition(".") for name in base}
    net: Any = module.net
    return {name: getattr(net.get_submodule(o), own).detach().clone() for name, (o, _, own) in owners.items()}


class Rank(L.Callback):
    """The stable rank of `P * M` of the second linear layer, at each step."""

    def __init__(self, callback: SaRA) -> None:
        self.callback = callback
        self.values: list[float] = []
        self.trained: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        by_name = {chosen.full_name: chosen for chosen in self.callback._entries()}
        self.trained.append([chosen.trained.clone() for chosen in by_name.values()])
        chosen = by_name["input.weight"]
        matrix = torch.zeros(chosen.base.numel())
        matrix[chosen.positions] = chosen.current()
        s = np.linalg.svd(matrix.reshape(chosen.base.shape).numpy(), compute_uv=False)
        self.values.append(float((s**2).sum() / s[0] ** 2))


@pytest.mark.parametrize("lambda_rank", [0.0, 5e-4])
def test_exactly_the_small_entries_move_and_the_others_are_bit_equal_under_weight_decay(lambda_rank: float) -> None:
    module: Any = Classifier()
    before = weights(module)
    callback = sara(lambda_rank=lambda_rank, progressive_iter=0)
    assert callback.trainable_parameters(module.net) == sum(
        int(((p.abs() > 0) & (p.abs() < 0.05)).sum()) for p in module.net.parameters()
    )
    (part,) = callback.apply(module)
    assert sum(p.numel() for p in adapters(module).parameters(part).values()) == callback.trainable_parameters(fresh())
    assert all(torch.equal(now, before[f"net.{name}"]) for name, now in effective(module).items())  # an identity
    fit(module, callback, max_steps=6)
    for name, now in effective(module).items():
        old = before[f"net.{name}"]
        small = (old != 0) & (old.abs() < 0.05)
        assert torch.equal(now[~small], old[~small])
        assert not small.any() or (now != old)[small].float().mean() > 0.5 or "norm" in name  # units may be dead
        if name == "input.weight":
            assert (old[small] < 0).any() and (old[small] > 0).any()


def test_entries_that_are_zero_by_their_making_are_not_chosen() -> None:
    module = Language("gpt2")
    callback = SaRA(density=0.5, rank_min_dim=4)
    callback.apply(module)
    names = {chosen.full_name for chosen in callback._entries()}
    zero = {n for n, p in Language("gpt2").model.named_parameters() if not p.any()}
    assert zero and not zero & names


def test_a_density_is_the_share_of_the_smallest_over_all_parameters() -> None:
    module = Classifier()
    callback = sara(threshold=None, density=0.25)
    callback.apply(module)
    every = torch.cat([p.detach().abs().flatten() for p in fresh().parameters()])
    every = every[every > 0]
    smallest = every.sort().values[: int(0.25 * len(every))]
    chosen = torch.cat([entries.current().abs() for entries in callback._entries()])
    assert torch.equal(chosen.sort().values, smallest)
    assert callback.cut > smallest.max() >= callback.cut * (1 - 1e-6)
    assert callback.suggested_learning_rate() == pytest.approx(1e-3 * math.exp(-350 * callback.cut))


def test_the_gradient_of_the_low_rank_term_is_that_of_the_nuclear_norm() -> None:
    """Against central differences of numpy's singular values, on a masked 6 x 5 matrix."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(6, 5)) * (generator.random((6, 5)) < 0.7)
    mine = nuclear_norm_gradient(torch.tensor(matrix))
    expected = np.zeros((6, 5))
    for i in range(6):
        for j in range(5):
            step = np.zeros((6, 5))
            step[i, j] = 1e-5
            norms = [np.linalg.svd(matrix + sign * step, compute_uv=False).sum() for sign in (1, -1)]
            expected[i, j] = (norms[0] - norms[1]) / 2e-5
    assert np.allclose(mine.numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_of_rounding_error_are_not_part_of_the_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = 10 * torch.randn(80, 2, dtype=dtype) @ torch.randn(2, 70, dtype=dtype)
    assert torch.linalg.matrix_norm(nuclear_norm_gradient(matrix)).item() ** 2 == pytest.approx(2, rel=1e-4)


def test_the_term_is_added_to_the_gradients_of_one_matrix_s_entries() -> None:
    gradients: dict[float, dict[str, Tensor]] = {}

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            callback: Any = trainer.callbacks[0]
            noted = {chosen.full_name: chosen.value.grad.clone() for chosen in callback._entries()}
            gradients.setdefault(callback.lambda_rank, noted)

    for lambda_rank in (0.0, 2.0):
        fit(Classifier(), sara(lambda_rank=lambda_rank, progressive_iter=0), Note(), max_steps=1)
    changed = [name for name, g in gradients[2.0].items() if not torch.equal(g, gradients[0.0][name])]
    (name,) = changed
    matrix = dict(fresh().named_parameters())[name].detach().numpy()
    mask = (matrix != 0) & (np.abs(matrix) < 0.05)
    u, _, v = np.linalg.svd(np.where(mask, matrix, 0), full_matrices=False)
    difference = (gradients[2.0][name] - gradients[0.0][name]).numpy()
    assert np.allclose(difference, 2.0 * (u @ v)[mask], atol=1e-5)


def test_the_low_rank_term_drives_the_stable_rank_down_and_nothing_does_without_it() -> None:
    ranks = {}
    for lambda_rank in (0.0, 500.0):
        callback = sara(threshold=0.2, lambda_rank=lambda_rank, rank_min_dim=7, progressive_iter=0)
        rank = Rank(callback)
        fit(Still(), callback, rank, max_steps=40, max_epochs=-1)
        ranks[lambda_rank] = rank.values
    assert min(ranks[500.0]) < 0.8 * ranks[0.0][0]
    assert min(ranks[0.0]) > 0.99 * ranks[0.0][0]


class Still(Classifier):
    """Trained by small steps on a loss that hardly pulls."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 1e-3 * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_what_grows_comes_to_rest_and_the_rest_is_trained_on() -> None:
    module, callback = Classifier(), sara(progressive_iter=3)
    rank = Rank(callback)
    values: list[dict[str, Tensor]] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            values.append(effective(pl_module))

    fit(module, callback, rank, Note(), max_steps=7)
    before = fresh().state_dict()
    assert all(mask.all() for mask in rank.trained[2])
    assert all(torch.equal(a, b) for a, b in zip(rank.trained[3], rank.trained[6], strict=True))
    resting = 0
    for chosen in callback._entries():
        first, last = values[2][chosen.full_name].flatten(), values[6][chosen.full_name].flatten()
        small = (before[chosen.full_name].abs() < 0.05) & (before[chosen.full_name] != 0)
        second = small.flatten() & (first.abs() < 0.05)  # M2, in M1
        rests = small.flatten() & ~second
        assert torch.equal(chosen.trained, second[chosen.positions])
        assert torch.equal(first[~second], last[~second])
        resting += int(rests.sum())
    assert 0 < resting < sum(len(chosen.trained) for chosen in callback._entries())


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_run_resumes_exactly_on_either_side_of_the_second_choice(stopped: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"progressive_iter": 6, "lambda_rank": 0.1}
    once = Classifier()
    fit(once, sara(**options), max_epochs=4, max_steps=-1)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 >= stopped

    part = Classifier()
    made = fit(part, sara(**options), Stop(), max_epochs=4, max_steps=-1)
    made.save_checkpoint(tmp_path / "part.ckpt")
    again = Classifier()
    fit(again, sara(**options), max_epochs=4, max_steps=-1, ckpt_path=tmp_path / "part.ckpt")
    assert not same(weights(part), weights(once)) and same(weights(again), weights(once))


def test_a_folder_holds_the_chosen_entries_and_loads_with_those_at_rest(tmp_path: Path) -> None:
    module, callback = Language("gpt2"), SaRA(density=0.05, rank_min_dim=4, progressive_iter=1)
    fit(module, callback, max_steps=3)
    x = torch.arange(3, 12)[None]
    expected = module.eval().model(input_ids=x).logits.detach()
    assert any(not chosen.trained.all() and chosen.trained.any() for chosen in callback._entries())
    save_adapter(module, tmp_path)
    again = Language("gpt2").eval()
    (part,) = load_adapter(again.model, tmp_path)
    assert torch.equal(again.model(input_ids=x).logits, expected)
    config: Any = part.config
    assert config.masked is None and not any("fixed" in n for n, _ in again.model.named_buffers())
    stored = sum(p.numel() for p in adapters(again.model).parameters(part).values())
    assert stored == callback.trainable_parameters(Language("gpt2").model)
    stack = adapters(module)
    stack.merge()
    assert torch.equal(module.model(input_ids=x).logits, expected)
    stack.unmerge()
    assert torch.equal(module.model(input_ids=x).logits, expected)


def test_a_step_is_that_of_peft_s_super_tuning_with_the_same_support() -> None:
    from peft import SupertuningConfig, get_peft_model

    names = ["q_proj", "down_proj"]
    x = torch.arange(2, 14).reshape(2, 6)
    theirs = get_peft_model(
        Language("llama").model, SupertuningConfig(target_modules=names, sparsity=0.9, select_top=False)
    )
    module = Language("llama")
    support = {
        name.removeprefix("base_model.model.").removesuffix("supertuning_indices.default"): value.long()
        for name, value in theirs.named_buffers()
        if name.endswith("supertuning_indices.default")
    }
    masks = {}
    for name, indices in support.items():
        weight = module.model.get_submodule(name.removesuffix(".")).weight
        masks[f"{name}weight"] = torch.zeros(weight.numel()).index_fill(0, indices, 1).bool().reshape(weight.shape)
    stack = stack_of(module.model)
    stack.add(entries_config(masks), "sara")
    place(module.model, "sara", masks)
    for model in (theirs, module.model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model.eval()(input_ids=x, labels=x).loss.backward()
            optimizer.step()
    for chosen in entries(module.model, "sara"):
        layer: Any = theirs.get_submodule(f"base_model.model.{chosen.full_name.removesuffix('.weight')}")
        delta = layer.get_delta_weight("default").detach().flatten()
        assert torch.allclose(chosen.value.detach(), delta[chosen.positions], atol=1e-7) and chosen.value.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.1, "density": 0.1}, "SaRA takes threshold or density, not both."),
        ({"threshold": 0.0}, "threshold must be above 0 and density in (0, 1), got 0.0 and None."),
        ({"lambda_rank": -1.0}, "SaRA needs progressive_iter, lambda_rank, rank_min_dim and seed of at least 0."),
        ({"threshold": 1e-9}, "No entry of the 16 chosen parameters is below 1e-09 and not 0: raise it."),
        ({"rank_min_dim": 64}, "SaRA has no matrix of more than 64 rows and columns for its low-rank term: set"),
        ({"progressive_iter": 9}, "SaRA changes what it trains after 9 optimizer steps, but the training ends after 8"),
    ],
)
def test_a_wrong_setting_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        fit(Classifier(), sara(**options), max_steps=8)
    assert str(raised.value).startswith(message) and one_sentence(str(raised.value))


def test_a_model_without_values_is_refused_in_one_sentence() -> None:
    with torch.device("meta"):
        module = Classifier()
    with pytest.raises(ValueError, match="has no values yet: load the weights first") as raised:
        sara().apply(module)
    assert one_sentence(str(raised.value))
