"""A cache of responses (`--use_cache`) that is of one model only: the harness keeps requests, not who answered them."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

_WHOSE = "lightning-peft"  # the harness's own keys are hashes


def check_cache(responses: MutableMapping[str, Any], described: Mapping[str, Any]) -> None:
    """Note in a cache whose responses it holds.

    Args:
        responses: by the hashes of requests.
        described: the model and what acts on it.

    Raises:
        ValueError: it holds those of another.

    Example:
        >>> responses = {}
        >>> check_cache(responses, {"scale": 1.0})
        >>> check_cache(responses, {"scale": 0.5})
        Traceback (most recent call last):
        ValueError: The cache holds responses of another model or strength, {"scale": 1.0}: name another file.
    """
    own = json.dumps(described, sort_keys=True)
    whose = responses.get(_WHOSE)
    if whose is None and len(responses):
        whose = "one of another type"
    if whose is not None and whose != own:
        raise ValueError(f"The cache holds responses of another model or strength, {whose}: name another file.")
    responses[_WHOSE] = own
