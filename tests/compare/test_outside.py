"""What was trained outside of adapters is found by values, without taking a module's state."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from peft import LoraConfig
from tiny_models import tiny
from torch import nn

from lightning_peft.compare.outside import changed_outside
from lightning_peft.stack.stack import stack_of


class ChangesWhenAsked(nn.Linear):
    """A layer that, as bitsandbytes' on a CPU, is another one after its state was taken."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._save_to_state_dict(*args, **kwargs)
        self.weight.data.zero_()


class WithHead(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = tiny("llama")
        self.backbone.model.layers[0].mlp.down_proj = ChangesWhenAsked(48, 32, bias=False)
        self.head, self.other = nn.Linear(3, 2), ChangesWhenAsked(2, 2)


def test_changes_are_found_and_no_layer_is_asked_for_its_state() -> None:
    module = WithHead()
    stack_of(module.backbone).add(LoraConfig(target_modules=["q_proj"]), "lora")
    with torch.no_grad():
        module.head.bias.add_(1)
    changed = changed_outside(module, WithHead)
    assert list(changed) == ["head.bias"] and torch.equal(changed["head.bias"], module.head.bias)
    assert module.backbone.model.layers[0].mlp.down_proj.weight.any() and module.other.weight.any()
