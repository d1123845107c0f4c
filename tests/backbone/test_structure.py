"""Blocks, attention and feed-forward parts are found by structure, with or without adapters."""

from __future__ import annotations

import pytest
from edits import add_lora
from tiny_models import tiny
from torch import nn
from tuning import Net

from lightning_peft.backbone.structure import blocks, matrix_shape, width

KINDS = {  # blocks, width, attention matrices and feed-forward matrices of the last block
    "llama": (3, 32, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"], 3),
    "wide_llama": (3, 32, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"], 3),
    "gpt2": (3, 32, ["attn.c_attn", "attn.c_proj"], 2),
    "gpt_neox": (3, 32, ["attention.query_key_value", "attention.dense"], 2),
    "opt": (3, 32, ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"], 2),
    "bert": (
        3,
        32,
        ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
        2,
    ),
    "vit": (3, 32, ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"], 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_has_its_attention_and_its_feed_forward_part(kind: str) -> None:
    count, size, attention, mlp = KINDS[kind]
    model = tiny(kind)
    found = blocks(model)
    assert len(found) == count and [block.number for block in found] == list(range(count))
    assert width(model) == size
    (span,) = found[-1].attention
    assert [name.removeprefix(found[-1].name + ".") for name in span.matrices] == attention
    assert found[-1].mlp is not None and len(found[-1].mlp.matrices) == mlp
    assert matrix_shape(model.get_submodule(found[-1].mlp.last)) == (128 if kind == "gpt2" else 48, size)
    assert matrix_shape(model.get_submodule(found[-1].mlp.first)) == (size, 128 if kind == "gpt2" else 48)


def test_a_decoder_has_cross_attention_too() -> None:
    found = blocks(tiny("t5"))
    assert [(b.stack, b.number) for b in found] == [("encoder.block", i) for i in range(3)] + [
        ("decoder.block", i) for i in range(3)
    ]
    assert [len(block.attention) for block in found] == [1, 1, 1, 2, 2, 2]
    assert found[3].attention[1].last == "decoder.block.0.layer.1.EncDecAttention.o"
    assert found[3].mlp is not None and found[3].mlp.last == "decoder.block.0.layer.2.DenseReluDense.wo"


def test_adapters_do_not_show() -> None:
    plain, model = tiny("llama"), tiny("llama")
    add_lora(model, ["q_proj", "down_proj"])
    assert [(b.name, b.spans()) for b in blocks(model)] == [(b.name, b.spans()) for b in blocks(plain)]


def test_a_hand_written_network_has_blocks_without_attention() -> None:
    found = blocks(Net())
    assert [block.name for block in found] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(not block.attention and block.mlp and block.mlp.matrices == (f"{block.name}.linear",) for block in found)


def test_a_row_of_linear_layers_has_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert blocks(model) == []
    with pytest.raises(ValueError, match=r"^Sequential has no repeated blocks\.$"):
        width(model)


def test_the_output_projection_is_the_last_wherever_it_is_registered() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": 0}
    model = Phi3ForCausalLM(Phi3Config(num_attention_heads=4, num_key_value_heads=2, **sizes))
    (span,) = blocks(model)[0].attention
    assert [name.rpartition(".")[2] for name in span.matrices] == ["qkv_proj", "o_proj"] and width(model) == 32
