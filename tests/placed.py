"""What the fixtures in `data/placements-68ae323` were made from: bottlenecks that stood elsewhere in that release.

The same lines run on the release, whose defaults they take, and on this one, which is to go on with what was saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from released import LAST

from lightning_peft import callbacks as c

FOLDER = Path(__file__).parent / "data" / "placements-68ae323"
KINDS = ("llama", "bert")  # before the norm, and behind it
SAVED, END = 2, 4  # optimizer steps: where a checkpoint interrupts, and where the training ends

METHODS: dict[str, Callable[[], c.PEFT]] = {
    "pfeiffer": lambda: c.Pfeiffer(size=2, **LAST),
    "adapter_plus": lambda: c.AdapterPlus(size=2, drop_path=0.0, **LAST),
    "compacter_plus_plus": lambda: c.CompacterPlusPlus(n=2, size=2, **LAST),
    "parallel": lambda: c.ParallelAdapter(size=2, **LAST),
    "scaled_parallel": lambda: c.ScaledParallelAdapter(size=2, **LAST),
    "mam": lambda: c.MAM(prefix_length=2, size=2, **LAST),
    "unipelt": lambda: c.UniPELT(r=2, prefix_length=2, size=2, **LAST),
}
NAMES = [f"{method}-{kind}" for method in METHODS for kind in KINDS]
