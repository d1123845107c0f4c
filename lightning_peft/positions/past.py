"""The number of tokens that lie behind a call: those in its cache, or those that its state has read.

A cache of keys and values has an entry for each token and says how many. The state of a recurrent model has one size
however much it has read, and most do not count; so what a call leaves is noted with the number of tokens it stands
for, and known again when the next call continues it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# the arguments by which models of transformers take what earlier calls left, and the fields in which they return it
_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclass(frozen=True)
class Past:
    """What lies behind a call: `columns` of a cache, padding included, or `read [B]` tokens of a state, or neither."""

    columns: int = 0
    read: Tensor | None = None
    known: bool = True

    @property
    def empty(self) -> bool:
        """True where the call is known to continue nothing."""
        return self.known and self.read is None and self.columns == 0


class StateLengths:
    """The number of tokens that each row of a state has read, kept as long as the state; copies and pickles are empty.

    Example:
        >>> lengths, state = StateLengths(), [torch.zeros(2, 4)]
        >>> lengths.note({"state": state}, torch.tensor([5, 3]))
        >>> lengths.past({"state": state}, batch=2)
        Past(columns=0, read=tensor([5, 3]), known=True)
        >>> lengths.past({"state": [torch.zeros(2, 4)]}, batch=2).known
        False
    """

    def __init__(self) -> None:
        self._read = WeakIdKeyDictionary()

    def past(self, arguments: Mapping[str, Any], batch: int) -> Past:
        """Return what lies behind a call of `batch` rows with these arguments."""
        for name in _NAMES:
            state = arguments.get(name)
            if state is None:
                continue
            if _counts(state):
                return Past(columns=int(state.get_seq_length()))
            if _is_fresh(state):
                return Past()
            # compiled code cannot look a state up
            read = None if torch.compiler.is_compiling() else self._read.get(_identity(state))
            return Past(read=read) if read is not None and len(read) == batch else Past(known=False)
        return Past()

    def note(self, output: Any, read: Tensor | None) -> None:
        """Note that the state in a model's output, if it has one that does not count, stands for `read [B]` tokens.

        Where it is None, nothing is known.
        """
        for state in _states(output):
            if _counts(state) or (identity := _identity(state)) is None:
                continue
            if read is None:
                self._read.pop(identity, None)
            else:
                self._read[identity] = read

    def __reduce__(self) -> tuple[type[StateLengths], tuple[()]]:
        return type(self), ()


def used_columns(arguments: Mapping[str, Any], length: int) -> int | None:
    """Return how many columns of a cache of a fixed size, which masks may be as wide as, are in use after a call.

    Args:
        arguments: of the call.
        length: of the call, in tokens.

    Returns:
        None where there is no such cache.
    """
    cache: Any = arguments.get("past_key_values")
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    # whether all layers are is asked only where the first cannot tell: most caches have layers of one kind
    fixed = layers[0].is_compileable if hasattr(layers[0], "get_seq_length") else cache.is_compileable
    if not fixed or not _counts(cache):
        return None
    return int(cache.get_seq_length()) + length


def leaves_state(output: Any) -> bool:
    """Return whether a model's output holds a state that does not count the tokens it has read."""
    if (cache := getattr(output, "past_key_values", None)) is not None:
        return not _counts(cache)
    return any(not _counts(state) for state in _states(output))


def _states(output: Any) -> Iterator[Any]:
    """Yield what a model's output leaves for later calls."""
    if isinstance(output, Mapping):
        for name in _NAMES:
            if (state := output.get(name)) is not None:
                yield state
    elif isinstance(output, tuple):  # without names: everything that may be one
        yield from (item for item in output if item is not None and not isinstance(item, Tensor))


def _counts(state: Any) -> bool:
    """Return whether a cache says how many tokens it holds, which layers without attention do not."""
    if not callable(getattr(state, "get_seq_length", None)):
        return False
    layers = getattr(state, "layers", None)
    return (
        not layers or hasattr(layers[0], "get_seq_length") or any(hasattr(layer, "get_seq_length") for layer in layers)
    )


def _is_fresh(state: Any) -> bool:
    """Return whether a cache says that nothing has been read into it."""
    says = getattr(state, "has_previous_state", None)
    return callable(says) and not says()


def _identity(state: Any) -> object | None:
    """Return what a state is known by: itself, or the first tensor in it, since lists cannot be referred to weakly."""
    if isinstance(state, list | tuple):
        return next((known for item in state if (known := _identity(item)) is not None), None)
    try:
        weakref.ref(state)
    except TypeError:
        return None
    return state
