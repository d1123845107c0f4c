"""Two sides measured in turn on the same batches in one process, and what their times say with an interval."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch


class Turns(L.Callback):
    """Batches for a Trainer, between whose steps the other side takes its own on the same batch.

    It is given to `fit` as the data and to the Trainer as a callback.

    Args:
        batches: what each step is given.
        other: one step of the other side; where it returns seconds, those are its time.
        warm_up: steps that are not counted.

    After training, `ours` and `theirs` hold seconds, one number for each counted step. Ours is the time from the
    moment the Trainer gets a batch to the moment it asks for the next, or ends the epoch, all of its loop included.
    Who comes first changes with every batch.
    """

    def __init__(self, batches: list[Any], other: Callable[[Any], float | None], warm_up: int = 0) -> None:
        self.batches, self.other, self.warm_up = batches, other, warm_up
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._seen = 0
        self._running: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self._running = self._run()
        return self._running

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        next(self._running, None)  # the Trainer knows how many there are, and does not ask beyond the last

    def _run(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            theirs = self._theirs(batch) if number % 2 else 0.0
            start = time.perf_counter()
            yield batch
            ours = time.perf_counter() - start
            theirs = theirs or self._theirs(batch)
            self._seen += 1
            if self._seen > self.warm_up:
                self.ours.append(ours)
                self.theirs.append(theirs)

    def _theirs(self, batch: Any) -> float:
        start = time.perf_counter()
        seconds = self.other(batch)
        return time.perf_counter() - start if seconds is None else seconds


class InAThread:
    """Runs a loop of somebody else's, which cannot be called step by step, one step at a time.

    Args:
        loop: runs the whole loop; it calls the function it is given at the end of each step.
    """

    def __init__(self, loop: Callable[[Callable[[], None]], None]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._start, self.seconds = 0.0, 0.0
        self._error: BaseException | None = None
        self._over = False
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)
        self._thread.start()

    def __call__(self, _: Any = None) -> float:
        """Let it take one step; its seconds, from the end of its last step to the end of this one."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self.seconds

    def finish(self) -> None:
        """Let it run to its end."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _run(self, loop: Callable[[Callable[[], None]], None]) -> None:
        try:
            self._go.acquire()
            self._start = time.perf_counter()
            loop(self._step_ends)
        except BaseException as error:
            self._error = error
            self._done.release()

    def _step_ends(self) -> None:
        if self._over:
            return
        self.seconds = time.perf_counter() - self._start
        self._done.release()
        self._go.acquire()
        self._start = time.perf_counter()


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios and its 95% interval, by bootstrap over the pairs."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} (95% interval {self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"


def ratio(above: list[float], below: list[float], draws: int = 10_000) -> Ratio:
    """`above / below`, pair by pair."""
    ratios = np.array(above) / np.array(below)
    drawn = np.random.default_rng(0).choice(ratios, (draws, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def alternately(one: Callable[[], Any], other: Callable[[], Any], times: int) -> tuple[list[float], list[float]]:
    """Seconds that two functions take, called in turn, who comes first changing each time."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(times):
        for side in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            (one, other)[side]()
            seconds[side].append(time.perf_counter() - start)
    return seconds


def milliseconds(times: list[float]) -> str:
    return f"{1000 * statistics.median(times):.1f} ms"


def machine() -> str:
    """What it ran on, in one line."""
    import peft
    import transformers

    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, L, transformers, peft))
    return f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads; {versions}"


def quiet() -> None:
    """Leave out what libraries say while they work."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def verdict(claim: str, holds: bool) -> None:
    print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}", flush=True)
