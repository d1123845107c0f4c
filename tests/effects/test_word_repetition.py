"""Variety of words and repetition are those of a count by hand, and gibberish shows in them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft.effects import distinct, repetition, text_slice

TEXTS = ["The cat saw the dog, and the cat ran.", "The dog slept."]


def test_distinct_counts_words_and_marks_of_all_texts_together_whatever_their_case() -> None:
    """the cat saw the dog , and the cat ran . | the dog slept . : 15 words, 9 of them different."""
    assert distinct(TEXTS) == 9 / 15
    # the cat, cat saw, saw the, the dog, dog ",", "," and, and the, the cat, cat ran, ran "."; the dog, dog slept,
    # slept ".": 13 pairs, of which two come twice
    assert distinct(TEXTS, n=2) == 11 / 13


def test_no_ngram_goes_from_one_text_into_the_next() -> None:
    assert distinct(["a b", "c d"], n=2) == 1.0 and distinct(["a b", "a b"], n=2) == 0.5
    assert math.isnan(distinct(["a", "b"], n=2))


def test_repetition_is_within_a_text_and_the_mean_over_texts_that_are_long_enough() -> None:
    circle = "so it is and so it is and so it is"  # 8 runs of four words, 4 of them different
    assert repetition([circle]) == 0.5
    assert repetition([circle, "A dog ran to the river.", "Too short"]) == 0.25
    assert repetition(["A dog ran to the river."] * 2) == 0.0
    assert repetition(["no no no no"], n=1) == 0.75
    assert math.isnan(repetition(["Too short"])) and math.isnan(repetition([]))


def test_gibberish_shows_and_prose_does_not() -> None:
    prose = text_slice(tokens=1280).documents
    looping = [" ".join([*text.split()[:8]] * 12) for text in prose]
    marks = ["! ! ! , , ! ! ! , , ! ! ! , , ! ! !"]
    assert repetition(prose) < 0.02 and repetition(looping) > 0.85 and repetition(marks) > 0.6
    assert distinct(prose, 2) > 0.85 and distinct(looping, 2) < 0.15 and distinct(marks * 5) < 0.03


def test_distinct_falls_with_the_number_of_words_as_its_docstring_warns() -> None:
    few, many = (distinct(text_slice(tokens=tokens).documents) for tokens in (256, 12_800))
    assert few > many + 0.2


def test_words_can_be_cut_otherwise() -> None:
    assert distinct(["ab ba"], words=list) == 3 / 5  # letters, and a space
    assert repetition(["The the"], n=1, words=str.split) == 0.0


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), max_size=4), st.integers(1, 3))
def test_both_are_their_definitions(texts: list[list[str]], n: int) -> None:
    every = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    pooled = [ngram for ngrams in every for ngram in ngrams]
    given_texts = [" ".join(text) for text in texts]
    if not pooled:
        assert math.isnan(distinct(given_texts, n)) and math.isnan(repetition(given_texts, n))
        return
    assert distinct(given_texts, n) == len(set(pooled)) / len(pooled)
    before = [sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams)) / len(ngrams) for ngrams in every if ngrams]
    assert repetition(given_texts, n) == pytest.approx(sum(before) / len(before))


@pytest.mark.parametrize("measure", [distinct, repetition])
def test_fewer_than_one_word_is_one_sentence(measure: Callable[[list[str], int], float]) -> None:
    with pytest.raises(ValueError, match=r"^An n-gram has 1 word at least, got n=0\.$"):
        measure(TEXTS, 0)
