"""Names most like a mistyped one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return the known names (or their last parts) most like a mistyped one, for an error message."""
    last_parts = sorted({k.rsplit(".", 1)[-1] for k in known if not k.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], last_parts, n=5, cutoff=0.3) or last_parts[:5]
    return ", ".join(near)
