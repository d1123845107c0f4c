"""Names most like a mistyped one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return the known names (or their last parts) most like a mistyped one, for an error message."""
    parts = {k.rsplit(".", 1)[-1] for k in known}
    last_parts = sorted({part for part in parts if not part.isdigit()} or parts)  # of a Sequential all are numbers
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], last_parts, n=5, cutoff=0.3) or last_parts[:5]
    return ", ".join(near)


def nearest_clause(name: str, known: Iterable[str]) -> str:
    """Return what an error message says behind a mistyped name; nothing where no names are known.

    Example:
        >>> nearest_clause("q_prj", ["layers.0.q_proj"]), nearest_clause("q_prj", [])
        ('; the nearest names are q_proj', '')
    """
    near = nearest_names(name, known)
    return f"; the nearest names are {near}" if near else ""
