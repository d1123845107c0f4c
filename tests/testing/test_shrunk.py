"""Any model type of transformers in small keeps what is particular to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma2ForCausalLM

from lightning_peft.testing.shrunk import HEADS, LAYERS, VOCABULARY, WORDS, shrunk_config, shrunk_model


def config(kind: str) -> Any:
    return shrunk_config(kind)


def test_sizes_are_small_and_grouped_queries_stay_grouped() -> None:
    small = config("llama4_text")  # which numbers the layers of experts, all of them
    assert small.moe_layers == list(range(LAYERS))
    assert (small.num_hidden_layers, small.num_attention_heads, small.vocab_size) == (LAYERS, HEADS, VOCABULARY)
    assert config("mistral").num_key_value_heads == HEADS // 2
    assert config("phi").num_key_value_heads == HEADS  # of as many as there are heads
    assert config("gpt_bigcode").multi_query


@pytest.mark.parametrize("kind", ["gemma2", "gemma4_text", "qwen3_next", "lfm2", "zamba2", "nemotron_h"])
def test_every_kind_of_layer_is_kept(kind: str) -> None:
    whole: Any = AutoConfig.for_model(kind)
    assert set(config(kind).layer_types) == set(whole.layer_types)
    assert len(config(kind).layer_types) == config(kind).num_hidden_layers < whole.num_hidden_layers + 1


def test_heads_wider_than_the_stream_stay_wider() -> None:
    gemma, llama = config("gemma"), config("llama")
    assert gemma.head_dim * gemma.num_attention_heads == 2 * gemma.hidden_size
    assert llama.head_dim * llama.num_attention_heads == llama.hidden_size


def test_widths_that_were_equal_are_equal_and_a_tower_is_narrower() -> None:
    small = config("qwen2_5_vl")
    assert small.vision_config.out_hidden_size == small.text_config.hidden_size > small.vision_config.hidden_size


def test_tokens_with_a_meaning_are_in_the_vocabulary_and_no_words() -> None:
    small = config("qwen3_vl")
    meant = [small.image_token_id, small.video_token_id, small.vision_start_token_id, small.vision_end_token_id]
    assert len(set(meant)) == 4
    assert all(token not in WORDS and token < small.text_config.vocab_size for token in meant)


def test_a_shrunk_model_is_the_same_from_the_same_seed_and_its_layers_show_in_its_logits() -> None:
    ids = torch.arange(3, 23)[None]
    one, same, other = (shrunk_model(Gemma2ForCausalLM, "gemma2", seed) for seed in (0, 0, 1))
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (one, same, other)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    whole: Any = one
    whole.model.layers[2].mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        assert float((whole(input_ids=ids).logits - logits[0]).abs().max()) > 0.01


def test_an_unknown_type_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        shrunk_config("no_such_model")
