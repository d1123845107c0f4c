"""State of a call on a model that several threads call: kept apart for each, or the threads take turns."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value that each thread has of its own, None at first; copies and pickles begin empty.

    Compiled code may read and set it; it would take a subclass of `threading.local` for one value.

    Example:
        >>> noted: PerThread[int] = PerThread()
        >>> noted.set(1)
        >>> reader = threading.Thread(target=lambda: print(noted.get()))
        >>> reader.start(); reader.join()
        None
        >>> noted.get()
        1
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def get(self) -> T | None:
        """Return this thread's value."""
        return getattr(self._here, "value", None)

    def set(self, value: T | None) -> None:
        """Give this thread another value."""
        self._here.value = value

    def __reduce__(self) -> tuple[type[PerThread[T]], tuple[()]]:
        return type(self), ()


class Turn:
    """A context in which one thread is at a time, and may be several times over; copies and pickles begin free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return type(self), ()
