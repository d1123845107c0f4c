"""What earlier releases wrote is still read: checkpoints, folders and fingerprints, made by their own code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import released
import torch
from released import EDITED, FIRST, TRAININGS, TUNED, Classifier, Module, backbone, base, data, outputs, unpack
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor
from torch.utils.data import DataLoader
from tuning import QUIET, Language, fit, trainer
from vision import libraries

from lightning_peft import export_checkpoint, export_control_vector, load_adapter
from lightning_peft.backbone.fingerprint import fingerprint, mismatch
from lightning_peft.callbacks import HeadOffsets, LoRA
from lightning_peft.fitting.checkpoints import load_from_checkpoint
from lightning_peft.stack.adapter_files.compression import decompress_adapter

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


EXPECTED = load_file(FIRST / "outputs.safetensors")  # what the release computed, by `make.py` beside it


def names(kind: str) -> list[str]:
    """The fixtures of a kind: adapters, checkpoints, or resumed trainings."""
    return sorted(name.split("/")[1] for name in EXPECTED if name.startswith(f"{kind}/"))


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the release's files: `adapters/NAME` and `checkpoints/NAME.ckpt`."""
    folder = tmp_path_factory.mktemp(FIRST.name)
    for name in ("adapters", "checkpoints"):
        unpack(name, folder)
    return folder


def kind_of_base(name: str) -> str:
    """The kind of model a folder is for."""
    return (TUNED | EDITED).get(name, ("llama",))[0]


def class_of(checkpoint: str) -> type[L.LightningModule]:
    """The class of the module that a checkpoint holds."""
    if checkpoint == "sharded":
        return Classifier
    return type(TRAININGS[checkpoint].make_module()) if checkpoint in TRAININGS else Module


def check(actual: Tensor, name: str, kind: str) -> None:
    """Assert that a model computes what the release computed with it.

    Every bit, where this machine computes every bit of the base without adapters. Else to 1e-5 of the largest, since
    other processors sum matrix products in another order; to 1e-3 after further training, where Adam makes whole steps
    of small gradients.
    """
    expected, tolerance = EXPECTED[name], 1e-3 if name.startswith("resumed/") else 1e-5
    if torch.equal(outputs(base(kind)), EXPECTED[f"base/{kind}"]):
        assert torch.equal(actual, expected), float((actual - expected).abs().max())
    else:
        assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def kind_of_module(module: L.LightningModule) -> str:
    return "net" if isinstance(module, Classifier) else str(module.hparams["kind"])


@pytest.mark.parametrize("name", names("adapters"))
def test_its_folders_compute_what_they_computed(name: str, release: Path) -> None:
    model = base(kind_of_base(name))
    unadapted = outputs(model)
    load_adapter(model, release / "adapters" / name)
    check(outputs(model), f"adapters/{name}", kind_of_base(name))
    assert not torch.equal(outputs(model), unadapted)


@pytest.mark.parametrize("name", [name for name in names("adapters") if name.endswith("_compressed")])
def test_its_compressed_folders_are_decompressed(name: str, release: Path, tmp_path: Path) -> None:
    decompress_adapter(release / "adapters" / name, tmp_path / "plain")
    model = base(kind_of_base(name))
    load_adapter(model, tmp_path / "plain")
    check(outputs(model), f"adapters/{name}", kind_of_base(name))


@pytest.mark.parametrize("name", names("checkpoints"))
def test_its_checkpoints_compute_what_they_computed(name: str, release: Path) -> None:
    module = load_from_checkpoint(class_of(name), release / "checkpoints" / f"{name}.ckpt")
    check(outputs(module), f"checkpoints/{name}", kind_of_module(module))


@pytest.mark.parametrize("name", names("checkpoints"))
def test_its_checkpoints_are_exported(name: str, release: Path, tmp_path: Path) -> None:
    path = release / "checkpoints" / f"{name}.ckpt"
    export_checkpoint(path, tmp_path / "adapter")
    module = class_of(name)()
    if isinstance(module, Classifier):  # no folder of an adapter holds the head
        module.head = load_from_checkpoint(Classifier, path).head
    load_adapter(backbone(module), tmp_path / "adapter")
    check(outputs(module), f"checkpoints/{name}", kind_of_module(module))


@pytest.mark.parametrize("name", names("resumed"))
def test_its_interrupted_trainings_end_where_they_ended(name: str, release: Path) -> None:
    training = TRAININGS[name]
    module = training.make_module()
    path = release / "checkpoints" / f"{name}.ckpt"
    assert fit(module, *training.make_callbacks(), max_steps=training.end, ckpt_path=path).global_step == training.end
    check(outputs(module), f"resumed/{name}", kind_of_module(module))


@pytest.mark.parametrize("name", [name for name in names("checkpoints") if name in EDITED])
def test_its_edits_are_tested_from_their_checkpoints(name: str, release: Path) -> None:
    kind, make = EDITED[name]
    module = Module(kind)
    path = release / "checkpoints" / f"{name}.ckpt"
    trainer(make()).test(module, data(module), ckpt_path=path, weights_only=True, verbose=False)
    check(outputs(module), f"checkpoints/{name}", kind)


def test_its_edits_are_where_training_begins(release: Path) -> None:
    module = released.Language()
    HeadOffsets(init_from=str(release / "adapters" / "iti"), positions="answer").apply(module)
    check(outputs(module), "adapters/iti", "llama")


def test_its_control_vector_is_what_its_edit_gives(release: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    export_control_vector(base("llama"), release / "adapters" / "caa", tmp_path / "caa.gguf")
    written, expected = (
        {tensor.name: tensor.data.tolist() for tensor in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "caa.gguf", release / "adapters" / "caa.gguf")
    )
    assert written == expected


def logits(model: Any) -> Tensor:
    torch.manual_seed(3)
    ids = torch.randint(3, 40, (2, 9))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_its_adapters_compute_what_they_computed() -> None:
    expected = torch.load(FIRST / "llama.logits.pt", weights_only=True)
    torch.testing.assert_close(logits(load_from_checkpoint(Language, FIRST / "llama.ckpt").model), expected)
    model = tiny("llama")
    load_adapter(model, FIRST / "llama")
    torch.testing.assert_close(logits(model), expected)


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
