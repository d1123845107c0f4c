"""LoRTA as a callback: what it trains, that a training goes on where it stopped, and what its checkpoints become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close, logits
from tiny_models import tiny
from tuning import QUIET, Language, fit, texts

from lightning_peft import adapters, export_checkpoint, load_adapter
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks import LoRTA
from lightning_peft.stack.adapter_files.as_lora import as_lora

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_count_is_r_times_the_sum_of_the_sides(kind: str) -> None:
    module = Language(kind)
    callback = LoRTA(r=5)
    callback.apply(module)
    config = module.model.config
    layers = {"llama": 3, "gpt2": 3, "t5": 9}[kind]  # of T5 the attentions: 3 in the encoder, 6 in the decoder
    heads = config.num_attention_heads
    expected = 5 * (config.hidden_size + config.hidden_size // heads + layers + heads + 4)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == expected
    assert callback.trainable_parameters(tiny(kind)) == expected


def test_layers_and_targets_are_chosen_as_everywhere() -> None:
    module = Language()
    LoRTA(r=2, layers=Layers(last=2), target_modules=["q_proj", "v_proj"]).apply(module)
    config: Any = adapters(module)["lorta"].config
    assert {name: config.place(name).layer for name in config.places} == {
        f"model.layers.{block}.self_attn.{m}_proj": block - 1 for block in (1, 2) for m in "qv"
    }


def test_a_training_resumes_and_its_checkpoint_is_a_plain_lora(tmp_path: Path) -> None:
    whole, first, second = Language(), Language(), Language()
    options: dict[str, Any] = {"r": 3, "alpha": 6.0}
    fit(whole, LoRTA(**options), max_steps=-1, max_epochs=2)
    fit(first, LoRTA(**options), max_steps=-1, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, LoRTA(**options), max_steps=-1, max_epochs=2, ckpt_path=tmp_path / "one.ckpt").save_checkpoint(
        tmp_path / "two.ckpt"
    )
    ids = next(iter(texts()))[0]
    expected = logits(whole.model.eval(), ids)
    assert torch.equal(logits(second.model.eval(), ids), expected)
    assert not close(expected, logits(tiny("llama"), ids), 1e-3)
    folder = export_checkpoint(tmp_path / "two.ckpt", tmp_path / "folder")
    plain = tiny("llama")
    load_adapter(plain, as_lora(folder, tmp_path / "lora"))
    assert close(logits(plain.eval(), ids), expected)
