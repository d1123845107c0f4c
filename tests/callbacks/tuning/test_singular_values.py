"""Singular-value tuning through a Trainer: what it trains, and that a check of validation may come before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tuning import QUIET, Classifier, Language, fit, one_sentence, texts

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.callbacks import LoRA, SingularValues
from lightning_peft.stack.adapter_files.compression import compress_adapter

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.mark.parametrize("options", [{}, {"top": 5}, {"nonnegative": True, "within": "attention"}])
def test_training_moves_the_singular_values_of_each_weight_alone(options: dict[str, Any]) -> None:
    module = Language()
    fit(module, SingularValues(**options), max_steps=2, num_sanity_val_steps=1)
    stack = adapters(module)
    layers = list(stack.parts[0].injection.layers())
    sizes = [min(layer.in_features, layer.out_features, options.get("top", 10**6)) for layer in layers]
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(sizes) and len(trained) == len(layers)
    assert all(parameter.any() for parameter in trained.values())


def test_a_resumed_run_and_a_saved_folder_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole, again = Language(), Language()
    fit(whole, SingularValues(), keep, max_steps=4, enable_checkpointing=True)
    fit(again, SingularValues(), max_steps=4, ckpt_path=tmp_path / "step=2.ckpt")
    expected, tensors = (adapters(m).tensors(adapters(m).parts[0]) for m in (whole, again))
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    save_adapter(whole, tmp_path / "adapter")
    loaded, ids = Language(), next(iter(texts()))[0]
    load_adapter(loaded.model, tmp_path / "adapter")
    whole.eval(), loaded.eval()
    assert torch.equal(loaded.model(ids).logits, whole.model(ids).logits)


def test_a_compressed_folder_finds_its_singular_vectors(tmp_path: Path) -> None:
    module, again = Language(), Language()
    fit(module, SingularValues(), max_steps=2)
    save_adapter(module, tmp_path / "adapter")
    compress_adapter(tmp_path / "adapter", tmp_path / "small", density=0.5)
    load_adapter(again.model, tmp_path / "small")
    again.model(next(iter(texts()))[0])
    sketches = [key for key in adapters(again).tensors(adapters(again).parts[0]) if key.endswith("sketches")]
    before, after = (adapters(m).tensors(adapters(m).parts[0]) for m in (module, again))
    assert sketches and all(torch.equal(before[key], after[key]) for key in sketches)


def test_it_goes_with_lora_in_either_order_and_is_merged_as_it_computes() -> None:
    ids = next(iter(texts()))[0]
    for callbacks in ((LoRA(r=2), SingularValues()), (SingularValues(), LoRA(r=2))):
        module = Language()
        with torch.no_grad():
            base = module.eval().model(ids).logits
            for callback in callbacks:
                callback.apply(module)
            assert torch.equal(module.eval().model(ids).logits, base)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            expected = module.model(ids).logits
            adapters(module).merge()
            torch.testing.assert_close(module.model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"^top must be at least 1, or None for all singular values, got 0\.$"
    ) as error:
        SingularValues(top=0)
    assert one_sentence(str(error.value))
    with pytest.raises(ValueError, match=r"conv is a Conv1d, but SingularValues changes linear layers"):
        SingularValues(target_modules=["conv"], backbone="net").apply(Classifier())
