"""The error for a data file that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """A data file cannot be used; the message says which file, where, and why."""
