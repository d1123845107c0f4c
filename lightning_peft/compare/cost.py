"""What training costs: seconds of a step, and the memory beyond that of the loaded model."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class StepTimer(Callback):
    """Time the training steps of a fit, without what stands between them: loading, validation, checkpoints."""

    def __init__(self) -> None:
        self._begin, self._total, self._steps = 0.0, 0.0, 0

    def mean(self) -> float | None:
        """Return the mean seconds of a step, None where there was none."""
        return self._total / self._steps if self._steps else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin = _now(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self._total, self._steps = self._total + _now(trainer) - self._begin, self._steps + 1


class PeakMemory:
    """Measure by how many bytes memory grows at most while code runs, on a GPU the GPU's, else the process's.

    The process's is read on Linux alone, whose kernel can forget an earlier peak; elsewhere nothing is measured. Memory
    that was freed before is first given back to the system, so that what ran earlier does not hide what grows.

    Attributes:
        bytes: the most of all times it was entered; None where it could not be measured.

    Example:
        >>> memory = PeakMemory()
        >>> with memory:
        ...     total = float(torch.ones(1_000_000).sum())
        >>> memory.bytes is None or memory.bytes >= 0
        True
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Self:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            _give_back()
            self._before = _process("VmRSS") if _forget_peak() else None
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _process("VmHWM")
        if peak is not None and self._before is not None:
            self.bytes = max(self.bytes or 0, peak - self._before, 0)


def _now(trainer: L.Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _give_back() -> None:
    """Return what glibc keeps of freed memory to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _STATUS.exists() else None
    if trim is not None:
        trim(0)


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _process(name: str) -> int | None:
    """Return a size in bytes that the kernel tells of this process, such as its peak `VmHWM`."""
    try:
        line = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(line[1]) * 1024 if line else None
