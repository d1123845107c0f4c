"""A control vector is what llama.cpp reads, and does what the edit does where a shift after the block can."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import add_lora, add_offsets, close, fill, logits
from tiny_models import tiny
from torch import Tensor, nn

from lightning_peft import export_control_vector, save_adapter
from lightning_peft.backbone.structure import blocks
from lightning_peft.editing import head_offsets_config, head_sites
from lightning_peft.stack.adapter_files.control_vectors import adding
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.layer_offsets import LayerOffsetsConfig

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def heads(model: nn.Module, pairs: list[tuple[int, int]], positions: str = "all") -> None:
    stack = stack_of(model)
    stack.add(head_offsets_config(head_sites(model), pairs, 2.0, positions), "edit", computed=True)
    fill(stack, "edit")


def block_outputs(model: nn.Module) -> None:
    names = [block.name for block in blocks(model)][1:]
    stack_of(model).add(LayerOffsetsConfig(target_modules=names, width=32, positions="all"), "edit", computed=True)
    fill(stack_of(model), "edit")


def read(file: Path) -> dict[int, Tensor]:
    """The vectors of a GGUF file, as llama.cpp's loader takes them: float32, one dimension, block 1 and after."""
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(file)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert all(t.tensor_type == GGMLQuantizationType.F32 and len(t.shape) == 1 for t in reader.tensors)
    vectors = {int(t.name.removeprefix("direction.")): torch.tensor(t.data.copy()) for t in reader.tensors}
    assert min(vectors) >= 1
    return vectors


def exported(kind: str, edit: Any, folder: Path, **options: Any) -> tuple[Any, nn.Module]:
    """What was exported, and the model with the edit on."""
    edited = rough(kind)
    edit(edited)
    made = export_control_vector(rough(kind), save_adapter(edited, folder / "a"), folder / "v.gguf", **options)
    return made, edited


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_the_file_does_exactly_what_offsets_of_blocks_do(kind: str, tmp_path: Path, tokens: Tensor) -> None:
    made, edited = exported(kind, block_outputs, tmp_path)
    model = rough(kind)
    with adding(model, read(tmp_path / "v.gguf")):
        assert close(logits(model, tokens), logits(edited, tokens))
    assert made.exact and not made.first_moved and sorted(made.vectors) == [1, 2]
    assert not close(logits(model, tokens), logits(edited, tokens), 1e-2)


def test_it_is_exact_for_heads_whose_attention_stands_beside_the_feed_forward_part(
    tmp_path: Path, tokens: Tensor
) -> None:
    made, edited = exported("gpt_neox", lambda model: heads(model, [(1, 0), (2, 3)]), tmp_path)
    model = rough("gpt_neox")
    assert model.config.use_parallel_residual and made.exact
    with adding(model, read(tmp_path / "v.gguf")):
        assert close(logits(model, tokens), logits(edited, tokens))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_approximate_for_heads_whose_feed_forward_part_reads_them(
    kind: str, tmp_path: Path, tokens: Tensor
) -> None:
    made, edited = exported(kind, lambda model: heads(model, [(1, 0), (2, 3)]), tmp_path)
    model = rough(kind)
    base = logits(model, tokens)
    with adding(model, read(tmp_path / "v.gguf")):
        left = (logits(model, tokens) - logits(edited, tokens)).norm()
    assert not made.exact and 1e-4 < made.error < 1
    assert left < (base - logits(edited, tokens)).norm(), "nearer to the edit than nothing is"
    sites = {site.layer: site.name for site in head_sites(edited)}
    projection = edited.get_submodule(sites[1])
    shift = projection.base_layer(projection.displacement("edit")) - projection.base_layer(torch.zeros(32))
    torch.testing.assert_close(read(tmp_path / "v.gguf")[1], shift.detach(), atol=1e-5, rtol=1e-5)


def test_what_the_first_block_gets_is_added_after_the_second(tmp_path: Path) -> None:
    made, _ = exported("gpt_neox", lambda model: heads(model, [(0, 1)]), tmp_path)
    assert made.first_moved and not made.exact and sorted(read(tmp_path / "v.gguf")) == [1]


def test_what_it_changes_is_measured(tmp_path: Path, tokens: Tensor) -> None:
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "prompt_end": torch.tensor([2] * 3)}
    made, _ = exported("gpt_neox", lambda m: heads(m, [(2, 3)], "answer"), tmp_path, batches=[batch])
    assert made.exact and made.positions == ("answer",), "at every position, that is"
    # heads of the last block: what they did to the prompt reaches no answer token
    assert made.divergence.tokens == 18 and made.divergence.max < 1e-6
    made, _ = exported("gpt_neox", lambda m: heads(m, [(1, 3)], "answer"), tmp_path, batches=[batch])
    assert made.divergence.max > 1e-5 and math.isfinite(made.divergence.max)


def test_the_model_is_the_same_afterwards(tmp_path: Path, tokens: Tensor) -> None:
    edited, model = rough("llama"), rough("llama")
    add_offsets(edited)
    export_control_vector(model, save_adapter(edited, tmp_path / "a"), tmp_path / "v.gguf")
    assert torch.equal(logits(model, tokens), logits(rough("llama"), tokens))


def lora(folder: Path) -> None:
    model = tiny("llama")
    add_lora(model, ["q_proj"])
    export_control_vector(tiny("llama"), save_adapter(model, folder / "a"), folder / "v.gguf")


def zero(folder: Path) -> None:
    model = tiny("llama")
    stack_of(model).add(head_offsets_config(head_sites(model)), "edit", computed=True)
    export_control_vector(tiny("llama"), save_adapter(model, folder / "a"), folder / "v.gguf")


def encoder_decoder(folder: Path) -> None:
    model = tiny("t5")
    heads(model, [(0, 1)])
    export_control_vector(tiny("t5"), save_adapter(model, folder / "a"), folder / "v.gguf")


CANNOT = {
    "a LoRA": (lora, "changes model.layers.0.self_attn.q_proj.weight, which is no shift"),
    "nothing": (zero, "shifts nothing"),
    "encoder-decoder": (encoder_decoder, "is not one stack of blocks"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_is_no_control_vector_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    attempt, said = CANNOT[case]
    with pytest.raises(ValueError, match=said) as caught:
        attempt(tmp_path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not (tmp_path / "v.gguf").exists()


def test_without_gguf_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install lightning-peft\[gguf\]"):
        exported("llama", block_outputs, tmp_path)
