"""How varied the words of generated texts are, and how much a text repeats itself: gibberish shows in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from lightning_peft.effects.slices import WORD

Words = Callable[[str], Sequence[str]]


def words_of(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in lower case.

    Example:
        >>> words_of("No, no!")
        ['no', ',', 'no', '!']
    """
    return WORD.findall(text.lower())


def distinct(texts: Iterable[str], n: int = 1, words: Words = words_of) -> float:
    """Return distinct-n: the share of different n-grams among all n-grams of some texts.

    Li et al. 2016 (arXiv:1510.03055) count distinct unigrams and bigrams over all replies of a model, and divide by the
    number of words; here it is by the number of n-grams, so that 1 means that none comes twice. **It falls with the
    number of words**: the more has been written, the fewer words are new. Compare only texts of about as many words,
    and never short answers with long ones.

    Args:
        texts: what a model wrote, all of it together.
        n: words of an n-gram.
        words: cuts a text into its words; give one of your own for languages written without spaces.

    Returns:
        From 0 to 1; NaN where no text has `n` words.

    Raises:
        ValueError: `n` is less than 1.

    Example:
        >>> distinct(["the cat saw the dog", "the cat ran"]), distinct(["the cat saw the dog", "the cat ran"], n=2)
        (0.625, 0.8333333333333334)
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(words(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repetition(texts: Iterable[str], n: int = 4, words: Words = words_of) -> float:
    """Return how much texts repeat themselves: the share of n-grams that stood before in the same text.

    It is seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319), one minus the share of different n-grams, of
    each text by itself, and the mean over texts. Prose has next to none for `n=4`; a model that goes round in circles
    nears 1. Long texts have more than short ones.

    Args:
        texts: what a model wrote. Those of fewer than `n` words do not count.
        n: words of an n-gram.
        words: as of `distinct`.

    Returns:
        From 0 to 1; NaN where no text has `n` words.

    Raises:
        ValueError: `n` is less than 1.

    Example:
        >>> repetition(["so it is and so it is and so it is"]), repetition(["A dog ran to the river and slept there."])
        (0.5, 0.0)
    """
    shares = [1 - len(set(ngrams)) / len(ngrams) for text in texts if (ngrams := _ngrams(words(text), n))]
    return sum(shares) / len(shares) if shares else math.nan


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"An n-gram has 1 word at least, got n={n}.")
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
