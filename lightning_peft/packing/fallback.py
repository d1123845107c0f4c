"""Try a faster way to compute once against the plain way, on a little, before it is relied on."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_NATS = 1e-3  # by which log-probabilities of texts may differ
_OWN = __name__.split(".")[0]
_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # the ways that each model was said to go without


def objection(
    model: nn.Module, faster: str, difference: Callable[[], float], allowed: float, unit: str, instead: str = ""
) -> str:
    """Try a faster way against the plain one and return what speaks against it; empty where nothing does.

    Args:
        model: what is computed with.
        faster: how it is called that way.
        difference: goes both ways and returns how far apart they come out; NaN is too far.
        allowed: the largest difference that is rounding.
        unit: what a difference is measured in.
        instead: what the model does otherwise, of which `give_up` warns; empty: no warning.

    Raises:
        Exception: whatever `difference` raises and the model is not the cause of.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> objection(linear, "packed", lambda: 1e-6, 1e-3, "nats")
        ''
        >>> objection(linear, "packed", lambda: 0.5, 1e-3, "nats")
        'packed, it differs by 5.0e-01 nats'
        >>> objection(linear, "packed", lambda: linear(position_ids=None), 1e-3, "nats")
        "packed, it raises TypeError: Linear.forward() got an unexpected keyword argument 'position_ids'"
        >>> objection(linear, "packed", lambda: [][0], 1e-3, "nats")
        Traceback (most recent call last):
        IndexError: list index out of range
    """
    try:
        distance = difference()
    except Exception as error:
        if not _refuses(model, error):
            raise
        message = str(error).strip().split("\n")[0].rstrip(".")
        reason = f"{faster}, it raises {type(error).__name__}" + (f": {message}" if message else "")
    else:
        reason = "" if distance <= allowed else f"{faster}, it differs by {distance:.1e} {unit}"
    if reason and instead:
        give_up(model, instead, reason)
    return reason


def rounding(scores: Tensor, dtype: torch.dtype) -> float:
    """Return how far log-probabilities computed in two ways may be apart by rounding, in nats.

    Example:
        >>> rounding(torch.tensor([-20.0]), torch.bfloat16)
        0.15725
    """
    return _NATS + (0.0 if dtype == torch.float32 else float(torch.finfo(dtype).eps * scores.abs().max()))


def give_up(model: nn.Module, instead: str, reason: str) -> None:
    """Warn, once per model and way, that the plain way is taken, and why."""
    if instead not in (warned := _WARNED.setdefault(model, set())):
        warned.add(instead)
        warnings.warn(f"{type(model).__name__} {instead}: {reason}.", stacklevel=3)


def _refuses(model: nn.Module, error: Exception) -> bool:
    """Return whether an error comes from a model that cannot be called like this, not from our own code.

    It does where it was raised while a module of the model ran, or transformers did for it (a cache that cannot be
    cropped, say). What we ourselves raise in there, from a hook or an adapter's layer, must say so by its type.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = {id(module) for module in model.modules()}
    ours = _room(frames[-1]) == _OWN
    at_model = any(id(frame.f_locals.get("self")) in modules or _room(frame) == "transformers" for frame in frames)
    return at_model and (not ours or isinstance(error, RuntimeError | ValueError))


def _room(frame: object) -> str:
    """Return the package whose code a frame runs."""
    return str(getattr(frame, "f_globals", {}).get("__name__", "")).split(".")[0]
