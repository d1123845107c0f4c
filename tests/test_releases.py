"""What earlier releases wrote is still read: checkpoints, folders and fingerprints, made by their own code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import tiny
from torch import Tensor
from torch.utils.data import DataLoader
from tuning import QUIET, Language, trainer
from vision import libraries

from lightning_peft import load_adapter
from lightning_peft.backbone.fingerprint import fingerprint, mismatch
from lightning_peft.callbacks import LoRA
from lightning_peft.fitting.checkpoints import load_from_checkpoint

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

FIRST = Path(__file__).parent / "data" / "release-68ae323"


def logits(model: Any) -> Tensor:
    torch.manual_seed(3)
    ids = torch.randint(3, 40, (2, 9))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_its_adapters_compute_what_they_computed() -> None:
    expected = torch.load(FIRST / "llama.logits.pt", weights_only=True)
    assert torch.equal(logits(load_from_checkpoint(Language, FIRST / "llama.ckpt").model), expected)
    model = tiny("llama")
    load_adapter(model, FIRST / "llama")
    assert torch.equal(logits(model), expected)


def test_its_training_goes_on() -> None:
    module = Language()
    data = DataLoader(torch.utils.data.TensorDataset(torch.randint(3, 40, (8, 9))), 4)
    fitting = trainer(LoRA(r=2), max_steps=5)
    fitting.fit(module, data, ckpt_path=FIRST / "llama.ckpt", weights_only=True)
    assert fitting.global_step == 5


def test_its_fingerprints_of_four_matrices_know_the_base() -> None:
    made = json.loads((FIRST / "llama" / "lightning_peft.json").read_text())["fingerprint"]
    assert len(made["samples"]) == 4 and mismatch(made, fingerprint(tiny("llama"))) is None
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    assert mismatch(made, fingerprint(other)) is not None


class Images(L.LightningModule):
    """A vision transformer of timm's, whose head is drawn anew each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
        self.net = libraries()[0].models.vision_transformer.VisionTransformer(**sizes)
        torch.manual_seed(torch.seed())
        self.net.head.reset_parameters()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("how", ["load_from_checkpoint", "predict", "fit"])
def test_its_checkpoints_without_the_head_load_with_one_warning(how: str) -> None:
    path, data = FIRST / "vision_transformer.ckpt", DataLoader(torch.randn(4, 3, 8, 8), batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "load_from_checkpoint":
            module = load_from_checkpoint(Images, path)
        elif how == "predict":
            trainer(LoRA(r=2)).predict(module := Images(), data, ckpt_path=path, weights_only=True)
        else:
            fitting = trainer(LoRA(r=2), max_steps=3)
            fitting.fit(module := Images(), data, ckpt_path=path, weights_only=True)
    about = [str(warning.message) for warning in caught if "head" in str(warning.message)]
    assert len(about) == 1 and "knows nothing of the head head, which stays as it was built" in about[0]
    saved = torch.load(path, weights_only=True)["state_dict"]
    name = "net.blocks.0.attn.qkv.lora_B.lora.weight"
    assert torch.equal(module.state_dict()[name], saved[name]) or how == "fit"
