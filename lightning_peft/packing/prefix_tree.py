"""Several texts as one row of tokens, in which shared beginnings stand once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Texts packed into one row of T tokens.

    Args:
        texts: which texts, by number.
        tokens: `[T]`.
        places: `[T]`, each token's number in its texts.
        sees: bool `[T, T]`, whether a token (row) sees another: itself and what comes before it in its own texts.
        nodes: for each text, where in the row its tokens stand, from the first token that is not skipped.
    """

    texts: list[int]
    tokens: Tensor
    places: Tensor
    sees: Tensor
    nodes: list[list[int]]


def pack(sequences: Sequence[Sequence[int]], skip: int, budget: int) -> Iterator[Packed]:
    """Pack texts that begin alike together.

    Args:
        sequences: token ids, one list a text.
        skip: tokens at the beginning that all texts share and that are left out of the rows.
        budget: tokens a row, if there is more than one text in it.

    Example:
        >>> row = next(pack([[7, 8, 9], [7, 8, 4], [7, 8, 9]], skip=1, budget=64))
        >>> row.tokens.tolist(), row.nodes
        ([8, 4, 9], [[0, 1], [0, 2], [0, 2]])
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    chosen: list[int] = []
    count = 0
    for i in order:
        # in lexicographic order a text shares most with the one before it
        shared = _shared(sequences[chosen[-1]], sequences[i]) if chosen else skip
        added = len(sequences[i]) - shared
        if chosen and count + added > budget:
            yield _row(sequences, chosen, skip)
            chosen, count, added = [], 0, len(sequences[i]) - skip
        chosen.append(i)
        count += added
    if chosen:
        yield _row(sequences, chosen, skip)


def packed_length(sequences: Sequence[Sequence[int]], skip: int) -> int:
    """Return the number of tokens in a row of all these texts.

    Example:
        >>> packed_length([[7, 8, 9], [7, 8, 4], [7, 8, 9]], skip=1)
        3
    """
    ordered = sorted(map(tuple, sequences))
    shared = [skip, *(max(_shared(text, following), skip) for text, following in pairwise(ordered))]
    return sum(len(text) - begin for text, begin in zip(ordered, shared, strict=True))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens at the beginning that all texts share."""
    ordered = sorted(map(tuple, sequences))
    return _shared(ordered[0], ordered[-1]) if ordered else 0  # the extremes differ the earliest


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    shortest = min(len(first), len(second))
    return next((i for i in range(shortest) if first[i] != second[i]), shortest)


def _row(sequences: Sequence[Sequence[int]], chosen: list[int], skip: int) -> Packed:
    tokens: list[int] = []
    places: list[int] = []
    parents: list[int] = []
    nodes: list[list[int]] = []
    for number, i in enumerate(chosen):
        text = sequences[i]
        shared = max(_shared(sequences[chosen[number - 1]], text), skip) if number else skip
        path = nodes[-1][: shared - skip] if number else []
        for place in range(shared, len(text)):
            parents.append(path[-1] if path else -1)
            path = [*path, len(tokens)]
            tokens.append(text[place])
            places.append(place)
        nodes.append(path)
    sees = np.eye(len(tokens), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return Packed(chosen, torch.tensor(tokens), torch.tensor(places), torch.from_numpy(sees), nodes)
