"""The hooks by which a module's checkpoints hold its adapters, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import adapters
from lightning_peft.callbacks import AdapterEMA, LoRA
from lightning_peft.stack.stack import find_stacks

pytestmark = pytest.mark.filterwarnings("ignore:.*")
LOADER = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 3), 4)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.other = nn.Sequential(nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.backbone(batch[0]) + self.other(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


def trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        callbacks=list(callbacks),
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def lora(backbone: str = "backbone") -> LoRA:
    return LoRA(r=2, backbone=backbone, name=backbone)


@pytest.mark.parametrize("more", [[], [AdapterEMA()]], ids=["alone", "with an average"])
def test_hooks_set_on_the_module_are_called_and_come_back(more: list[Any], tmp_path: Path) -> None:
    module, called = Net(), []
    module.on_save_checkpoint = save = lambda checkpoint: called.append("save")  # type: ignore[method-assign, assignment, func-returns-value]
    module.on_load_checkpoint = load = lambda checkpoint: called.append("load")  # type: ignore[method-assign, assignment, func-returns-value]
    fit = trainer(lora(), *copy.deepcopy(more))
    fit.fit(module, LOADER)
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    assert called.count("save") == 1
    trainer(lora()).validate(module, LOADER, ckpt_path=tmp_path / "saved.ckpt")
    assert called.count("load") == 1
    adapters(module).remove("backbone")
    assert vars(module)["on_save_checkpoint"] is save and vars(module)["on_load_checkpoint"] is load


def test_the_module_is_as_before_when_its_last_adapter_is_gone() -> None:
    module = Net()
    before = dict(vars(module))
    lora("backbone").apply(module)
    lora("other").apply(module)
    assert not module.strict_loading
    for name in ("backbone", "other"):
        assert "on_save_checkpoint" in vars(module)
        find_stacks(module)[name].remove(name)
    assert vars(module) == before and module.strict_loading


def test_without_adapters_a_checkpoint_is_whole_again() -> None:
    module = Net()
    lora().apply(module)
    twin = copy.deepcopy(module)
    adapters(twin).remove("backbone")
    checkpoint = {"state_dict": twin.state_dict()}
    twin.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == Net().state_dict().keys()
    assert "on_save_checkpoint" not in vars(twin) and "on_save_checkpoint" in vars(module)


def test_a_copy_of_the_backbone_takes_nothing_of_the_module_along() -> None:
    module = Net()
    lora().apply(module)
    twin = copy.deepcopy(module.backbone)
    twin_stack = adapters(twin)
    twin_stack.remove("backbone")
    assert "on_save_checkpoint" in vars(module)
