"""The frozen trunk cache: blocks below the first trained one are computed once for each example."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_peft.fitting.find_backbone import find_backbone
from lightning_peft.fitting.trunk.conditions import below_first_trained
from lightning_peft.fitting.trunk.rows import RowStore
from lightning_peft.fitting.trunk.trunk import Trunk
from lightning_peft.stack.stack import find_stacks


class TrunkCache(Callback):
    """Compute the blocks below the first trained one once for each distinct example, and read their result afterwards.

    For adapters (or any training) in the last blocks only, beside a callback such as `LoRA(layers=[28, 29])`. What the
    trunk gives for a row is kept under a hash of the row without its padding, so the data need not be changed, and
    shuffling, another padding, several workers and validation are fine. In the first epoch, and for rows it has not
    seen, the model runs as without it. Losses are the uncached run's: bit for bit in batches of the same rows and
    padding, else to rounding. What the model computes *at* padding is not kept: there the trunk gives zeros, so
    padding must not count in the loss or in a mean.

    It works while `fit` runs, each process with a cache of its own, and leaves the model as it was. Nothing is kept
    from one `fit` to the next.

    Args:
        max_bytes: how many bytes may be kept, in each process. What is needed is estimated from the first batch,
            announced, and refused where it is more; where the number of batches is unknown and the room runs out,
            further rows are computed each time.
        folder: where to put a file that is mapped into memory; default: in RAM. It disappears with the process.
        dtype: the name of a torch dtype to keep states in, e.g. `"bfloat16"`; default: as they are, without any loss.
        backbone: see `AdapterOptions`; default: the backbone that has adapters.

    Raises:
        ValueError: when training starts or at its first step, in one sentence: a parameter below the first trained
            block is trained, dropout or another chance acts there, an edit or a past (prefix tuning) does, something
            above reads more than the trunk's last states, there are no numbered blocks, the model is compiled, or the
            states would take more than `max_bytes`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoRA, TrunkCache
        >>> trainer = L.Trainer(callbacks=[LoRA(layers=[28, 29]), TrunkCache()], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    def __init__(
        self,
        max_bytes: int = 4 * 2**30,
        folder: str | None = None,
        dtype: str | None = None,
        backbone: str | None = None,
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}.")
        if dtype is not None and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
            raise ValueError(f"dtype must name a floating-point torch dtype such as bfloat16, got {dtype!r}.")
        self.max_bytes, self.folder, self.dtype, self.backbone = max_bytes, folder, dtype, backbone
        self.trunk: Trunk | None = None
        self._epochs = 0

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        self._epochs = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        backbone = _backbone(pl_module, self.backbone)
        if self.trunk is not None and below_first_trained(backbone)[1] != self.trunk.first_trained:
            self._stop()  # blocks were frozen or unfrozen since: the cut lies elsewhere
        if self.trunk is None:
            self.trunk = self._start(trainer, pl_module, backbone)
        self.trunk.hits = self.trunk.misses = 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.trunk is not None
        self._epochs += 1
        if self._epochs == 2 and not self.trunk.hits:
            rank_zero_warn(
                "TrunkCache has read nothing in the second epoch: either no row was seen before (data that are "
                "augmented, or padded on the left without position_ids), or the backbone is not called itself."
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    # -- what they do ------------------------------------------------------------------------------------------------

    def _start(self, trainer: L.Trainer, module: L.LightningModule, backbone: nn.Module) -> Trunk:
        store = RowStore(self.max_bytes, self.folder, getattr(torch, self.dtype) if self.dtype else None)

        def announce(rows: int, size: int) -> None:
            self._announce(trainer, rows, size)

        try:
            return Trunk(module, backbone, store, announce, self._warn_full)
        except Exception:
            store.close()
            raise

    def _stop(self) -> None:
        if self.trunk is not None:
            self.trunk.remove()
            self.trunk.store.close()
            self.trunk = None

    def _announce(self, trainer: L.Trainer, rows: int, size: int) -> None:
        """Say how much will be kept, judged by the first batch, and refuse more than there may be."""
        assert self.trunk is not None
        batches = float(trainer.num_training_batches) + sum(map(float, trainer.num_val_batches))
        where = f"in {self.folder}" if self.folder else "in RAM"
        trunk = f"{len(self.trunk.blocks)} blocks below {self.trunk.first_trained}"
        if batches == float("inf"):
            rank_zero_info(
                f"TrunkCache: {trunk}; {_bytes(size / rows)} a row, how many rows is unknown, at most "
                f"{_bytes(self.max_bytes)} {where}."
            )
            return
        needed = batches * size
        free = shutil.disk_usage(Path(self.folder)).free + size if self.folder else self.max_bytes
        if needed > min(self.max_bytes, free):
            room = f"max_bytes={self.max_bytes:,}" if needed > self.max_bytes else f"the {_bytes(free)} free {where}"
            raise ValueError(
                f"TrunkCache would keep about {_bytes(needed)} ({batches:,.0f} batches of {rows} rows, "
                f"{_bytes(size / rows)} a row), which is more than {room}: allow more, keep it in a file by naming a "
                'folder with room, or halve it with dtype="bfloat16".'
            )
        rank_zero_info(
            f"TrunkCache: {trunk}; about {batches * rows:,.0f} rows of {_bytes(size / rows)}, {_bytes(needed)} {where}."
        )

    def _warn_full(self) -> None:
        rank_zero_warn(
            f"TrunkCache is full: max_bytes={self.max_bytes:,} are kept, and batches with further rows are computed "
            "each time."
        )


def _backbone(module: L.LightningModule, name: str | None) -> nn.Module:
    """Return the backbone that has adapters, or else the one that a callback would adapt."""
    stacks = [stack.backbone for stack in find_stacks(module).values()]
    if name is None and len(stacks) == 1:
        return stacks[0]
    full_name = find_backbone(module, name)
    assert full_name is not None  # everything is built by now
    return module.get_submodule(full_name)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
