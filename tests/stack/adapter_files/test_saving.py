"""Saving takes a LightningModule or its backbone, and so does loading."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_models import tiny
from torch import nn
from tuning import Classifier, weights

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import LoRA


class Module(L.LightningModule):
    """A transformers model under any name, beside a head."""

    def __init__(self) -> None:
        super().__init__()
        self.language = tiny("llama")
        self.head = nn.Linear(4, 4)


def saved(module: L.LightningModule, folder: Path, backbone: str | None = None) -> Path:
    """Save an adapter that is not zero, by the module as a whole."""
    LoRA(r=2, backbone=backbone).apply(module)
    with torch.no_grad():
        stack = adapters(module)
        for parameter in stack.parameters(stack.parts[0]).values():
            parameter.fill_(0.5)
    return save_adapter(module, folder)


def test_what_was_saved_of_a_lightning_module_is_loaded_onto_one(tmp_path: Path) -> None:
    folder, module = saved(Module(), tmp_path), Module()
    (part,) = load_adapter(module, folder)
    assert adapters(module).backbone is module.language and adapters(module).parts == [part]
    assert all((value == 0.5).all() for name, value in weights(module).items() if "lora_" in name)


def test_it_goes_onto_the_backbone_that_carries_adapters_already(tmp_path: Path) -> None:
    folder, module = saved(Classifier(), tmp_path, "net"), Classifier()
    LoRA(r=1, backbone="net", name="first").apply(module)
    load_adapter(module, folder, "second")
    assert [part.name for part in adapters(module).parts] == ["first", "second"]
    assert adapters(module).backbone is module.net


def test_two_candidates_are_not_guessed_between_and_a_backbone_serves_as_before(tmp_path: Path) -> None:
    folder, module = saved(Classifier(), tmp_path, "net"), Classifier()
    with pytest.raises(ValueError, match="cannot be told among 'head', 'net': name it with the argument backbone"):
        load_adapter(module, folder)
    assert module.net is not None
    load_adapter(backbone=module.net, folder=folder)
    assert adapters(module).backbone is module.net
