"""On a base in half precision an adapter is in float32: it learns small steps, and comes back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, Language, fit, one_sentence, texts

from lightning_peft import adapters, load_adapter, save_adapter, steering
from lightning_peft.callbacks import PEFT, LoRA
from lightning_peft.testing.methods import METHODS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:Adapter name", "ignore:.*SVD")]
HALF = [torch.float16, torch.bfloat16]
IDS = texts().dataset.tensors[0][:2]
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
PEFTS = {
    "OFT": OFTConfig(oft_block_size=4, **TARGETS),
    "LoHa": LoHaConfig(r=2, **TARGETS),
    "VeRA": VeraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "LoRA of frozen A": LoraConfig(r=2, init_lora_weights="orthogonal", **TARGETS),
}


class Half(Language):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = self.model.to(dtype)
        del self.model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.backbone(input_ids=batch[0]).logits[:, -batch[0].shape[1] :].float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def tensors(module: nn.Module) -> dict[str, Tensor]:
    stack = adapters(module)
    return {f"{part.name}/{key}": value for part in stack.parts for key, value in stack.tensors(part).items()}


def check(callback: PEFT, dtype: torch.dtype, folder: Path) -> None:
    module = Half(dtype)
    base, names = logits(module.backbone), {n for n, _ in module.named_parameters()}
    fit(module, callback)
    trained = tensors(module)
    floats = [value for value in trained.values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in floats)
    own = [p for n, p in module.named_parameters() if p.requires_grad]
    assert own and len(own) <= len(trained) and all(p.dtype == torch.float32 for p in own)
    assert all(p.dtype == dtype for n, p in module.named_parameters() if n in names and not p.requires_grad)
    acting = logits(module.backbone)
    assert acting.dtype == dtype and acting.isfinite().all()
    with adapters(module).disabled():
        assert torch.equal(logits(module.backbone), base)
    save_adapter(module, folder)
    other = Half(dtype).backbone
    load_adapter(other, folder)
    assert torch.equal(logits(other), acting)
    assert all(v.dtype == torch.float32 for v in tensors(other).values() if v.is_floating_point())


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (name, dtype)
        for number, (name, method) in enumerate(METHODS.items())
        for dtype in (HALF if number % 3 == 0 else HALF[:1])
        if not method.example.four_bits
    ],
)
def test_every_method_trains_in_float32_and_comes_back(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check(METHODS[method].make(), dtype, tmp_path)


@pytest.mark.parametrize("method", PEFTS)
def test_so_do_methods_of_peft(method: str, tmp_path: Path) -> None:
    check(PEFT(PEFTS[method], backbone="backbone"), torch.float16, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LNTuningConfig(target_modules=["input_layernorm"]),
        AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_copies_of_float16_weights_are_not_trained(config: Any) -> None:
    with pytest.raises(ValueError, match=r"is float16, in which small steps are lost: load the base in") as error:
        fit(Half(torch.float16), PEFT(config, backbone="backbone"))
    assert one_sentence(str(error.value))
    fit(Half(torch.bfloat16), PEFT(config, backbone="backbone"))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_folder_of_half_precision_tensors_is_loaded_into_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Half(dtype)
    fit(module, LoRA(r=2, backbone="backbone"))
    path = save_adapter(module, tmp_path) / "adapter_model.safetensors"
    halves = {key: value.to(dtype) for key, value in load_file(path).items()}
    save_file(halves, path)
    other = Half(dtype).backbone
    parts = load_adapter(other, tmp_path)
    found = adapters(other).tensors(parts[0])
    assert all(torch.equal(found[key], value.float()) for key, value in halves.items())
    assert all(value.dtype == torch.float32 for value in found.values())


def test_it_computes_what_plain_peft_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, **TARGETS)
    plain: Any = get_peft_model(tiny("llama").half(), config)  # type: ignore[arg-type]
    plain.save_pretrained(tmp_path)
    ours = tiny("llama").half()
    with steering(ours, tmp_path) as parts:
        assert torch.equal(logits(ours), logits(plain))
        assert {v.dtype for v in adapters(ours).tensors(parts[0]).values()} == {torch.float32}
    as_they_are: Any = PeftModel.from_pretrained(tiny("llama").half(), str(tmp_path), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in as_they_are.named_parameters() if "lora_" in n} == {torch.float16}
