"""Models whose layers see no further back than a window are packed, and score and read as each text alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from choice_rows import PRIMER, batch, definition, question
from edits import fill
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn
from windowed_models import PACKED, PLAIN, WINDOW, without_windows

from lightning_peft.editing import capture_texts, head_offsets_config, head_sites, layer_sites
from lightning_peft.packing.attention import attention_of
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.packing.packed_call import growing_cache
from lightning_peft.stack.stack import stack_of

MODELS: dict[str, Callable[[], nn.Module]] = {
    **PACKED,
    **{kind: lambda kind=kind: tiny(kind) for kind in LANGUAGE_MODELS},
}
SHORT, LONG = (1, 2), (3, 1, 5, 2)


@contextmanager
def packed_without_a_word() -> Iterator[None]:
    """Fail where a model is not packed, of which `give_up` would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def edit(model: nn.Module, positions: str) -> None:
    heads = [(layer, layer % 4) for layer in range(len(head_sites(model)))]
    stack_of(model).add(head_offsets_config(head_sites(model), heads, 2.0, positions), "edit", computed=True)
    fill(stack_of(model), "edit")


def calls(model: nn.Module) -> list[tuple[int, int]]:
    """The shape of each call's tokens, as they come."""
    seen: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    return seen


def short_question(seed: int) -> tuple[list[list[int]], int]:
    """A question whose texts are shorter than the windows."""
    rows, prompt = question(seed, SHORT)
    return [row[-WINDOW + 1 :] for row in rows], prompt - (len(rows[0]) - WINDOW + 1)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("positions", [None, "answer", "all"])
def test_choices_score_as_each_row_alone(kind: str, positions: str | None) -> None:
    model = MODELS[kind]()
    if positions is not None:
        edit(model, positions)
    with packed_without_a_word():
        scorer = ChoiceScorer(model)
        for seed in range(3):  # on one cache
            rows, prompt = question(seed, LONG)
            expected = torch.tensor([definition(model, row, prompt) for row in rows])
            torch.testing.assert_close(scorer.score(*batch(rows, prompt)), expected, atol=1e-4, rtol=0)
    assert scorer.packs and scorer._packs_windows in ([True] if kind in PACKED else [None])


@pytest.mark.parametrize("kind", PACKED)
def test_texts_shorter_and_longer_than_the_window_follow_each_other_on_one_cache(kind: str) -> None:
    model = PACKED[kind]()
    order = [short_question(0), question(1), short_question(2), question(3)]
    with packed_without_a_word():
        scorer = ChoiceScorer(model)
        for rows, prompt in order:
            expected = torch.tensor([definition(model, row, prompt) for row in rows])
            torch.testing.assert_close(scorer.score(*batch(rows, prompt)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("positions", [None, "answer"])
def test_questions_together_score_as_each_alone(kind: str, positions: str | None) -> None:
    model = PACKED[kind]()
    if positions is not None:
        edit(model, positions)
    pairs = [question(seed, answers) for seed, answers in enumerate([(3, 1), (2, 2, 5), (4, 1)])]
    pairs[1] = ([row[:-3] for row in pairs[1][0]], pairs[1][1] - 3)  # a shorter prompt
    rows = [row for rows, _ in pairs for row in rows]
    prompts = [prompt for rows, prompt in pairs for _ in rows]
    ids, mask, labels = batch(rows, 0)
    for row, prompt in zip(labels, prompts, strict=True):
        row[:prompt] = -100
    expected = torch.tensor([definition(model, *pair) for pair in zip(rows, prompts, strict=True)])
    seen = calls(model)
    with packed_without_a_word():
        scorer = ChoiceScorer(model)
        for _ in range(2):
            torch.testing.assert_close(scorer.score(ids, mask, labels), expected, atol=1e-4, rtol=0)
    assert len(seen[-1]) == 2 and seen[-1][0] == 1, "the three stand in one row"


@pytest.mark.parametrize("kind", PACKED)
def test_a_window_changes_what_is_computed(kind: str) -> None:
    """Else the tests above would hold without any window in the masks."""
    rows, prompt = question(0, LONG)
    with_windows = ChoiceScorer(PACKED[kind]()).score(*batch(rows, prompt))
    without = ChoiceScorer(without_windows(kind)).score(*batch(rows, prompt))
    assert float((with_windows - without).abs().max()) > 5e-3, "fifty times what may differ"


@pytest.mark.parametrize("kind", PACKED)
def test_every_distinct_beginning_is_computed_once(kind: str) -> None:
    model = PACKED[kind]()
    scorer, distinct = ChoiceScorer(model), []
    scorer._packs = scorer._packs_windows = True  # without the trials, to count tokens
    seen = calls(model)
    for seed in range(3):
        rows, prompt = question(seed)
        scorer.score(*batch(rows, prompt))
        distinct.append(len({tuple(row[:end]) for row in rows for end in range(len(PRIMER) + 1, len(row))}))
    assert seen == [(1, len(PRIMER) + distinct[0]), *((1, count) for count in distinct[1:])]


@pytest.mark.parametrize("kind", PACKED)
def test_edits_score_on_the_kept_cache_as_each_alone(kind: str) -> None:
    model = PACKED[kind]()
    edit(model, "answer")

    @contextmanager
    def strength(alpha: float) -> Iterator[None]:
        stack_of(model).scale(alpha)
        yield
        stack_of(model).scale(0.0)

    stack_of(model).scale(0.0)
    rows, prompt = question(0)
    with packed_without_a_word():
        scorer = ChoiceScorer(model)
        plain, edited = scorer.score_edited(*batch(rows, prompt), lambda _: [strength(1.0), strength(-2.0)])
    for scores, alpha in ((plain, 0.0), (edited[0][0], 1.0), (edited[1][0], -2.0)):
        stack_of(model).scale(alpha)
        expected = torch.tensor([definition(model, row, prompt) for row in rows])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", PLAIN)
def test_what_cannot_be_exact_is_scored_row_by_row_with_a_warning(kind: str) -> None:
    make, warning = PLAIN[kind]
    model = make()
    rows, prompt = question(0, (1, 3, 8, 2))
    expected = torch.tensor([definition(model, row, prompt) for row in rows])
    with pytest.warns(UserWarning, match=warning):
        scores = ChoiceScorer(model).score(*batch(rows, prompt))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    few, prompt = short_question(0)
    with packed_without_a_word():
        scores = ChoiceScorer(model).score(*batch(few, prompt))
    torch.testing.assert_close(scores, torch.tensor([definition(model, row, prompt) for row in few]), atol=1e-4, rtol=0)


def test_a_model_that_takes_no_mask_by_layer_is_scored_row_by_row_where_windows_cut_with_a_warning() -> None:
    model = PACKED["gemma2"]()

    def one_mask(module: nn.Module, args: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
        if isinstance(given.get("attention_mask"), dict):
            raise TypeError("a mask is a tensor")

    model.register_forward_pre_hook(one_mask, with_kwargs=True)
    scorer, (rows, prompt) = ChoiceScorer(model), short_question(0)
    with packed_without_a_word():
        scorer._packs = True  # the trial's texts, too, are longer than this window
        scorer.score(*batch(rows, prompt))
    rows, prompt = question(0)
    expected = torch.tensor([definition(model, row, prompt) for row in rows])
    with pytest.warns(UserWarning, match=r"^Gemma2ForCausalLM scores texts longer than its window row by row: packed"):
        scores = scorer.score(*batch(rows, prompt))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("primer", [0, 40])
def test_texts_are_read_as_each_alone(kind: str, primer: int) -> None:
    model = PACKED[kind]()
    texts = [[5] * primer + row for seed in range(3) for row in question(seed)[0]]
    sites = layer_sites(model)
    expected = []
    for text in texts:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
        expected.append(torch.stack([state[0, -1] for state in states[1:-1]]))  # the last is normed
    seen: list[int] = []
    block = model.get_submodule(sites[1].name)
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    with packed_without_a_word():
        read = capture_texts(model, sites, texts, share=True, row_tokens=48).values
    scale = torch.stack(expected).abs().max()
    torch.testing.assert_close(read[:, :-1] / scale, torch.stack(expected) / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", PLAIN)
def test_texts_too_long_to_be_packed_exactly_are_read_one_by_one_with_a_warning(kind: str) -> None:
    model = PLAIN[kind][0]()
    texts = [row for seed in range(2) for row in question(seed, (1, 9))[0]]
    sites = head_sites(model)
    expected = torch.cat([capture_texts(model, sites, [text], share=False).values for text in texts])
    with pytest.warns(UserWarning, match="reads texts one by one: some are longer than the 2. tokens up to which"):
        read = capture_texts(model, sites, texts, batch_size=1).values
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=1e-5)


def test_the_cache_of_a_model_with_windows_forgets_nothing() -> None:
    for kind, make in PACKED.items():
        model = make()
        cache = growing_cache(model)
        with torch.no_grad():
            model(input_ids=torch.arange(3, 3 + 3 * WINDOW)[None], past_key_values=cache, use_cache=True)
        assert {layer.keys.shape[-2] for layer in cache.layers} == {3 * WINDOW}, kind
        cache.crop(-2 * WINDOW)
        assert cache.get_seq_length() == WINDOW


def test_how_far_back_layers_see_is_known_by_the_configuration() -> None:
    whole = {kind: attention_of(make()).whole for kind, make in MODELS.items()}
    assert whole == {kind: WINDOW if kind in PACKED else float("inf") for kind in MODELS}
