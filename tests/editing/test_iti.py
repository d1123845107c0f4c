"""ITI finds the heads that tell true from false, on questions the probes have not seen, from the rows it is given."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_peft.editing import HeadSite, compute_iti
from lightning_peft.editing import iti as iti_module
from lightning_peft.editing.directions import contrast_pairs, mass_mean
from lightning_peft.editing.iti import split_questions

LAYERS, HEADS, WIDTH = 3, 4, 6
PLANTED = {(1, 2): 3.0, (2, 0): 1.5}
SITES = [HeadSite(f"layers.{i}.o_proj", i, HEADS, WIDTH) for i in range(LAYERS)]

Data = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def data() -> Data:
    """40 questions of 4 statements; two heads know the truth, the first better."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, LAYERS, HEADS, WIDTH, generator=generator)
    truth = torch.arange(160) % 2
    for (layer, head), strength in PLANTED.items():
        x[truth == 1, layer, head, 1] += strength
    return x, truth, torch.arange(160) // 4


def test_planted_heads_are_found_best_first(data: Data) -> None:
    edit = compute_iti(*data, num_heads=2)
    assert edit.heads == [(1, 2), (2, 0)]
    assert edit.accuracy.shape == (LAYERS, HEADS) and edit.accuracy[1, 2] == edit.accuracy.max()


def test_heads_are_ranked_on_held_out_questions(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planted only in the rows the probes are fitted on is not believed."""
    x, truth, question_id = data
    train, val = split_questions(question_id, 0.2, seed=0)
    x[train[truth[train] == 1], 0, 3, 0] += 50.0
    seen: dict[str, int] = {}
    fit = iti_module.LogisticProbes.fit

    def spy(self: object, given: Tensor, labels: Tensor) -> object:
        seen["rows"] = len(given)
        return fit(self, given, labels)

    monkeypatch.setattr(iti_module.LogisticProbes, "fit", spy)
    edit = compute_iti(x, truth, question_id, num_heads=2)
    assert seen["rows"] == len(train) and (0, 3) not in edit.heads
    assert edit.record["validation_questions"] == len(question_id[val].unique()) == 8


@pytest.mark.parametrize("seed", range(5))
def test_no_question_is_on_both_sides_of_the_split(data: Data, seed: int) -> None:
    question_id = data[2][torch.randperm(160, generator=torch.Generator().manual_seed(seed))]
    train, val = split_questions(question_id, 0.3, seed)
    assert not set(question_id[train].tolist()) & set(question_id[val].tolist())
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(160))
    assert len(question_id[val].unique()) == 12


def test_direction_and_sigma_are_those_of_the_rows_given(data: Data) -> None:
    x, truth, _ = data
    edit = compute_iti(*data, num_heads=2)
    for i, (layer, head) in enumerate(edit.heads):
        z = x[:, layer, head].numpy()
        theta = z[truth == 1].mean(0) - z[truth == 0].mean(0)
        theta /= np.linalg.norm(theta)
        np.testing.assert_allclose(edit.directions[i], theta, atol=1e-6)
        np.testing.assert_allclose(edit.sigma[i], np.std(z @ theta), rtol=1e-5)


def test_the_probe_direction_is_the_unit_weight_of_the_heads_probe(data: Data) -> None:
    x, truth, question_id = data
    edit = compute_iti(*data, num_heads=1, direction="probe_weight")
    train, _ = split_questions(question_id, 0.2, seed=0)
    coef = iti_module.LogisticProbes().fit(x[train, 1, 2:3], truth[train]).coef_[0].float()
    torch.testing.assert_close(edit.directions[0], coef / coef.norm())
    np.testing.assert_allclose(edit.sigma[0], np.std((x[:, 1, 2] @ edit.directions[0]).numpy()), rtol=1e-5)


def test_the_random_control_has_the_same_heads_and_lengths(data: Data) -> None:
    found, control = compute_iti(*data, num_heads=3), compute_iti(*data, num_heads=3, direction="random")
    assert control.heads == found.heads and torch.equal(control.sigma, found.sigma)
    torch.testing.assert_close(control.directions.norm(dim=-1), torch.ones(3))
    assert float((control.directions * found.directions).sum(-1).abs().max()) < 0.99
    assert torch.equal(control.directions, compute_iti(*data, num_heads=3, direction="random").directions)
    assert not torch.equal(control.directions, compute_iti(*data, num_heads=3, direction="random", seed=1).directions)


@pytest.mark.parametrize("name", ["ccs", "pca"])
def test_directions_from_contrast_pairs_point_to_the_truth(data: Data, name: str) -> None:
    x, truth, question_id = data
    x[truth == 1, 1, 2, 1] += 5
    edit = compute_iti(x, truth, question_id, num_heads=1, direction=name)
    assert edit.heads == [(1, 2)] and float(edit.directions[0, 1]) > 0.7
    z = x[:, 1, 2].numpy()
    np.testing.assert_allclose(edit.sigma[0], np.std(z @ edit.directions[0].numpy()), rtol=1e-5)
    again = compute_iti(x, truth, question_id, num_heads=1, direction=name)
    assert torch.equal(edit.directions, again.directions)


def test_pairs_hold_a_true_and_a_false_statement_of_one_question_in_any_order(data: Data) -> None:
    _, truth, question_id = data
    pairs = contrast_pairs(truth, question_id, seed=1)
    assert question_id[pairs[:, 0]].tolist() == question_id[pairs[:, 1]].tolist() == list(range(40))
    assert (truth[pairs].sum(1) == 1).all()
    assert 10 < int(truth[pairs[:, 0]].sum()) < 30, "which comes first tells nothing"
    assert not torch.equal(pairs, contrast_pairs(truth, question_id, seed=2))


def test_pairs_need_questions_with_both(data: Data) -> None:
    x, truth, _ = data
    with pytest.raises(ValueError, match=r"^direction 'ccs' needs at least two questions with both a true and a fal"):
        compute_iti(x, truth, torch.arange(160), num_heads=1, direction="ccs")


def test_strength_by_accuracy_is_in_proportion_above_chance_and_one_on_average(data: Data) -> None:
    equal, edit = compute_iti(*data, num_heads=3), compute_iti(*data, num_heads=3, strength="accuracy")
    assert edit.heads == equal.heads and edit.strength is not None
    above = torch.stack([edit.accuracy[head] for head in edit.heads]) - 0.5
    torch.testing.assert_close(edit.strength, 3 * above / above.sum())
    assert float(edit.strength[0]) > 1 > float(edit.strength[2])
    for i, (layer, head) in enumerate(edit.heads):
        order = sorted(h for at, h in edit.heads if at == layer).index(head)
        ratio = edit.offsets(SITES)[SITES[layer].name][order] / equal.offsets(SITES)[SITES[layer].name][order]
        torch.testing.assert_close(ratio, edit.strength[i].expand(WIDTH))


def test_strength_by_accuracy_needs_a_head_above_chance(data: Data) -> None:
    x, truth, question_id = data
    train, _ = split_questions(question_id, 0.2, seed=0)
    nothing_held_out = torch.zeros_like(x)
    nothing_held_out[train[truth[train] == 1][0]] = 1
    with pytest.raises(ValueError, match=r"^No head is better than chance on the held-out questions: use strength="):
        compute_iti(nothing_held_out, truth, question_id, num_heads=3, strength="accuracy")


def test_sigma_may_come_from_other_texts(data: Data) -> None:
    others = 3 * torch.randn(50, LAYERS, HEADS, WIDTH, generator=torch.Generator().manual_seed(9))
    own, edit = compute_iti(*data, num_heads=2), compute_iti(*data, num_heads=2, sigma_activations=others)
    assert edit.heads == own.heads and torch.equal(edit.directions, own.directions)
    for i, (layer, head) in enumerate(edit.heads):
        expected = np.std(others[:, layer, head].numpy() @ edit.directions[i].numpy())
        np.testing.assert_allclose(edit.sigma[i], expected, rtol=1e-5)
    assert edit.record["sigma_texts"] == 50


def test_sigma_from_another_models_heads_is_an_error(data: Data) -> None:
    with pytest.raises(
        ValueError, match=r"^sigma_activations are of heads \(3, 4, 5\), but those of the statements are"
    ):
        compute_iti(*data, num_heads=2, sigma_activations=torch.zeros(5, LAYERS, HEADS, 5))


def test_ties_are_broken_by_log_loss(data: Data) -> None:
    """Two heads that are always right: the surer comes first, although it is the later one."""
    x, truth, question_id = data
    spread = torch.linspace(-0.1, 0.1, len(truth))
    x[:, 0, 1] = 0
    x[:, 0, 1, 0] = truth * 2.0 - 1.0 + 9 * spread  # right, but near the boundary at times
    x[:, 2, 3] = 0
    x[:, 2, 3, 0] = truth * 2.0 - 1.0 + spread
    edit = compute_iti(x, truth, question_id, num_heads=2)
    assert edit.accuracy[0, 1] == edit.accuracy[2, 3] == 1
    assert edit.heads == [(2, 3), (0, 1)]


def test_rows_in_another_order_give_the_same_edit(data: Data) -> None:
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    edit, shuffled = compute_iti(*data, num_heads=4), compute_iti(*(t[order] for t in data), num_heads=4)
    assert shuffled.heads == edit.heads and torch.equal(shuffled.accuracy, edit.accuracy)
    torch.testing.assert_close(shuffled.directions, edit.directions)
    torch.testing.assert_close(shuffled.sigma, edit.sigma)


def test_offsets_are_sigma_times_direction_by_site_and_head(data: Data) -> None:
    edit = compute_iti(*data, num_heads=12)
    offsets, config = edit.offsets(SITES), edit.config(SITES, alpha=5.0, positions="all")
    assert config.heads == {site.name: [0, 1, 2, 3] for site in SITES}
    for i, (layer, head) in enumerate(edit.heads):
        expected = edit.sigma[i] * edit.directions[i]
        torch.testing.assert_close(offsets[SITES[layer].name][head], expected)


def test_the_record_is_json_and_says_how(data: Data) -> None:
    record = json.loads(json.dumps(compute_iti(*data, num_heads=2, seed=3).record))
    assert record["heads"] == [[1, 2], [2, 0]] and record["statements"] == 160 and record["questions"] == 40
    assert len(record["accuracy"]) == LAYERS and len(record["sigma"]) == 2 and record["seed"] == 3
    assert record["data_hash"] == compute_iti(*data, num_heads=1).record["data_hash"]
    x, truth, question_id = data
    assert record["data_hash"] != compute_iti(x, 1 - truth, question_id, num_heads=1).record["data_hash"]


@pytest.mark.parametrize("num_heads", [0, 13])
def test_more_heads_than_the_model_has_are_an_error(data: Data, num_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"^num_heads is {num_heads}, but the model has 12 heads \(3 x 4\)\.$"):
        compute_iti(*data, num_heads=num_heads)


def test_one_class_is_an_error(data: Data) -> None:
    x, truth, question_id = data
    with pytest.raises(
        ValueError, match=r"^Statements of both classes are needed, truth 0 and 1; the values given are \[1\]"
    ):
        compute_iti(x, torch.ones_like(truth), question_id, num_heads=1)


def test_one_class_on_one_side_of_the_split_is_an_error(data: Data) -> None:
    x, truth, question_id = data
    truth[question_id != 0] = 1
    with pytest.raises(
        ValueError, match=r"^The inner (validation|training) split has statements of one class only: give more que"
    ):
        compute_iti(x, truth, question_id, num_heads=1)


def test_a_split_with_one_class_on_one_side_is_drawn_again(data: Data) -> None:
    x, truth, question_id = data
    _, val = split_questions(question_id, 0.2, seed=0)
    truth[val] = 1
    again, next_seed = (compute_iti(x, truth, question_id, num_heads=3, seed=seed) for seed in (0, 1))
    assert again.heads == next_seed.heads and torch.equal(again.accuracy, next_seed.accuracy)


def test_examples_that_are_the_same_on_average_are_an_error(data: Data) -> None:
    x, truth, question_id = data
    with pytest.raises(ValueError, match=r"^What the model computes in true and in false statements is the same on "):
        compute_iti(x[:1].expand_as(x) * (1 + 1e-8 * truth[:, None, None, None]), truth, question_id, num_heads=1)


def test_activations_that_are_not_finite_are_an_error_naming_the_head(data: Data) -> None:
    data[0][5, 2, 1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^The activations of layer 2, head 1 contain NaN or infinite values\.$"):
        compute_iti(*data, num_heads=1)


def test_one_question_is_an_error(data: Data) -> None:
    x, truth, question_id = data
    message = r"^An inner validation split needs statements of at least two questions\.$"
    with pytest.raises(ValueError, match=message):
        compute_iti(x, truth, torch.zeros_like(question_id), num_heads=1)


def test_an_unknown_direction_is_an_error(data: Data) -> None:
    with pytest.raises(
        ValueError, match=r"^direction must be one of mass_mean, probe_weight, ccs, pca, random, got 'up'\.$"
    ):
        compute_iti(*data, num_heads=1, direction="up")


def test_rows_of_different_number_are_an_error(data: Data) -> None:
    x, truth, question_id = data
    with pytest.raises(
        ValueError, match=r"^160 activations, 159 truth values and 160 question ids were given: one of "
    ):
        compute_iti(x, truth[:-1], question_id, num_heads=1)


def test_mass_mean_of_a_head_without_signal_still_has_length_one(data: Data) -> None:
    x, truth, _ = data
    torch.testing.assert_close(mass_mean(x[:, 0], truth).norm(dim=-1), torch.ones(HEADS))
