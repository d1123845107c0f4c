"""Packed scoring gives the plain definition's log-probabilities, whatever the model, the order and the answers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from choice_rows import PRIMER, batch, definition, question
from tiny_models import LANGUAGE_MODELS, VOCABULARY, tiny
from torch import Tensor, nn

from lightning_peft.editing import head_offsets_config, head_sites
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.stack.stack import stack_of


def edit(model: nn.Module, positions: str) -> None:
    stack = stack_of(model)
    config = head_offsets_config(head_sites(model), [(0, 1), (1, 0), (2, 3)], 2.0, positions)
    part = stack.add(config, "edit", computed=True)
    for tensor in stack.tensors(part).values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("positions", [None, "answer", "generated", "all"])
def test_packed_equals_the_definition(kind: str, positions: str | None) -> None:
    model = tiny(kind)
    if positions:
        edit(model, positions)
    scorer = ChoiceScorer(model)
    for seed in range(4):
        rows, prompt = question(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # falling back to the plain way would warn
            scores = scorer.score(*batch(rows, prompt))
        expected = torch.tensor([definition(model, row, prompt) for row in rows])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert scorer._packs


def test_every_distinct_beginning_is_computed_once() -> None:
    model = tiny("llama")
    scorer, seen, distinct = ChoiceScorer(model), [], []
    scorer._packs = True  # without the trial, to count tokens
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    for seed in range(3):
        rows, prompt = question(seed)
        rows.append([*rows[0], 3])  # an answer that begins as another
        scorer.score(*batch(rows, prompt))
        # an answer's last token predicts nothing
        distinct.append(len({tuple(row[:end]) for row in rows for end in range(len(PRIMER) + 1, len(row))}))
    assert distinct[0] < 6 + sum(len(row) - prompt for row in rows)
    assert seen[0] == len(PRIMER) + distinct[0]
    assert seen[1:] == distinct[1:], "later questions run their own tokens only"


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("positions", [None, "answer", "answer[0:2]"])
def test_questions_together_are_scored_as_each_alone(kind: str, positions: str | None) -> None:
    model = tiny(kind)
    if positions is not None:
        edit(model, positions)
    pairs = [question(seed, answers) for seed, answers in enumerate([(3, 1), (2, 2, 5), (4, 1)])]
    pairs[1] = ([row[:-3] for row in pairs[1][0]], pairs[1][1] - 3)  # a shorter prompt
    rows = [row for rows, _ in pairs for row in rows]
    prompts = [prompt for rows, prompt in pairs for _ in rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    alone = torch.tensor([definition(model, rows[i], prompts[i]) for i in order])
    ids, mask, labels = batch([rows[i] for i in order], 0)
    for row, i in zip(labels, order, strict=True):
        row[: prompts[i]] = -100
    scorer = ChoiceScorer(model)
    for _ in range(2):
        torch.testing.assert_close(scorer.score(ids, mask, labels), alone, atol=1e-4, rtol=1e-5)
    assert scorer.packs


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_order_do_not_matter(side: str) -> None:
    model = tiny("llama")
    rows, prompt = question(0)
    straight = ChoiceScorer(model).score(*batch(rows, prompt, "right"))
    order = [2, 0, 3, 1]
    turned = ChoiceScorer(model).score(*batch([rows[i] for i in order], prompt, side))
    torch.testing.assert_close(turned, straight[order], atol=1e-5, rtol=1e-5)


def test_answers_that_are_prefixes_of_each_other_and_equal_answers() -> None:
    model = tiny("llama")
    rows, prompt = question(0, (4,))
    rows = [rows[0], rows[0][:-1], rows[0][: prompt + 1], list(rows[0])]
    scores = ChoiceScorer(model).score(*batch(rows, prompt))
    expected = torch.tensor([definition(model, row, prompt) for row in rows])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert scores[0] == scores[3]


def test_one_choice_alone() -> None:
    model = tiny("gpt2")
    rows, prompt = question(3, (2,))
    score = ChoiceScorer(model).score(*batch(rows, prompt))
    assert float(score[0]) == pytest.approx(definition(model, rows[0], prompt), abs=1e-4)


def test_a_boundary_that_differs_between_choices_is_scored_row_by_row() -> None:
    model = tiny("llama")
    rows, prompt = question(0)
    ids, mask, labels = batch(rows, prompt)
    labels[1, prompt - 1] = ids[1, prompt - 1]  # this answer begins a token earlier
    scores = ChoiceScorer(model).score(ids, mask, labels)
    assert float(scores[1]) == pytest.approx(definition(model, rows[1], prompt - 1), abs=1e-4)
    assert float(scores[0]) == pytest.approx(definition(model, rows[0], prompt), abs=1e-4)


def test_a_model_that_cannot_be_packed_is_scored_row_by_row_with_a_warning() -> None:
    class Recurrent(nn.Module):
        """Sees a running mean: no attention mask can keep packed answers apart."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.out = nn.Linear(8, VOCABULARY)
            self.config = tiny("llama").config

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None):
            hidden = self.embed(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
            return type("Output", (), {"logits": self.out(hidden)})()

    torch.manual_seed(0)
    model, (rows, prompt) = Recurrent(), question(0)
    with pytest.warns(UserWarning, match="scored row by row"):
        scores = ChoiceScorer(model).score(*batch(rows, prompt))
    expected = torch.tensor([definition(model, row, prompt) for row in rows])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("own", [0, 6, 30])
def test_a_model_that_ignores_its_cache_is_scored_row_by_row_with_a_warning(own: int) -> None:
    def without_cache(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        length = kwargs["input_ids"].shape[1]
        mask = kwargs["attention_mask"]
        return args, kwargs | {"past_key_values": None, "attention_mask": mask[..., -length:]}

    model = tiny("llama")
    rows = [PRIMER + [number] * own + [5, number] for number in (20, 30)]
    prompts = [len(row) for row in rows]
    answered = [[*row, number] for row in rows for number in (7, 8)]
    ids, mask, labels = batch(answered, prompts[0])
    expected = torch.tensor([definition(model, row, prompts[0]) for row in answered])
    model.register_forward_pre_hook(without_cache, with_kwargs=True)
    with pytest.warns(UserWarning, match="scored row by row: packed, it differs"):
        scores = ChoiceScorer(model).score(ids, mask, labels)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


def test_a_row_without_answer_or_prompt_is_one_sentence() -> None:
    rows, prompt = question(0)
    ids, mask, labels = batch(rows, prompt)
    scorer = ChoiceScorer(tiny("llama"))
    with pytest.raises(ValueError, match="needs a prompt and an answer"):
        scorer.score(ids, mask, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match="needs a prompt and an answer"):
        scorer.score(ids, mask, ids)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_edits_of_answers_scored_on_one_cache_equal_the_definition(kind: str) -> None:
    def given(alpha: float) -> nn.Module:
        model = tiny(kind)
        edit(model, "answer")
        stack_of(model).scale(alpha)
        return model

    model = given(1.0)

    @contextmanager
    def strength(alpha: float) -> Iterator[None]:
        stack_of(model).scale(alpha)
        yield
        stack_of(model).scale(0.0)

    stack_of(model).scale(0.0)
    scorer = ChoiceScorer(model)
    for seed in range(3):
        rows, prompt = question(seed)
        plain, edited = scorer.score_edited(*batch(rows, prompt), lambda _: [strength(1.0), strength(-2.0)])
        for scores, alpha in ((plain, 0.0), (edited[0][0], 1.0), (edited[1][0], -2.0)):
            expected = torch.tensor([definition(given(alpha), row, prompt) for row in rows])
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


def test_edits_run_the_last_prompt_token_and_the_answers_only() -> None:
    model = tiny("llama")
    scorer, seen = ChoiceScorer(model), []
    scorer._packs = True
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    for seed in range(2):
        rows, prompt = question(seed)
        scorer.score_edited(*batch(rows, prompt), lambda _: [nullcontext(), nullcontext()])
    assert seen[1] == seen[2] == seen[0] - (len(PRIMER) + 5)
    assert seen[4] == seen[5] == seen[3] - 5
