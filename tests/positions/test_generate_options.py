"""Ways in which `generate` reads and writes: in chunks, ahead of itself, into a cache of fixed size, from sound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hooked import VECTOR, add_edit, hooked, left_padded, rough, written
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

PROMPTS = [[11, 12, 13, 14, 11, 12], [21, 22, 23]]
SIZES = {"hidden_size": 32, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
BLOCKS = {"llama": "model.layers.0", "bloom": "transformer.h.0"}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "bloom":
        return rough(BloomForCausalLM(BloomConfig(**SIZES, n_layer=2, n_head=4)))
    config = LlamaConfig(**SIZES, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return rough(LlamaForCausalLM(config))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("positions", ["answer", "generated[0:2]", "prompt[-2:]"])
def test_however_generate_reads_it_equals_a_hook(kind: str, positions: str) -> None:
    plain = model(kind)
    right = torch.stack([hooked(plain, BLOCKS[kind], positions, torch.tensor([prompt]), 4) for prompt in PROMPTS])
    assert not torch.allclose(written(plain, 4, **left_padded(PROMPTS)), right, atol=1e-2)
    add_edit(plain, BLOCKS[kind], positions)
    for options in ({"prefill_chunk_size": 2}, {"cache_implementation": "static"}):
        moved = written(plain, 4, **left_padded(PROMPTS), **options)
        torch.testing.assert_close(moved, right, atol=1e-4, rtol=1e-4)
    alone = left_padded(PROMPTS[:1])
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model(kind)}):
        torch.testing.assert_close(written(plain, 4, **alone, **options), right[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["answer", "generated[0:2]"])
def test_a_model_that_drafts_its_own_tokens_writes_what_it_writes_without(positions: str) -> None:
    edited = model("llama")
    add_edit(edited, BLOCKS["llama"], positions)
    alone = left_padded(PROMPTS[:1])
    right = written(edited, 4, **alone)
    torch.testing.assert_close(written(edited, 4, **alone, assistant_early_exit=1), right, atol=1e-4, rtol=1e-4)


def test_a_second_turn_with_the_first_ones_cache_is_edited_from_its_own_prompt_on() -> None:
    edited, prompt = model("llama"), torch.tensor(PROMPTS[:1])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = edited.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    second = torch.cat([first.sequences, torch.tensor([[31, 32]])], 1)
    right = hooked(edited, BLOCKS["llama"], "answer", second, 3)
    add_edit(edited, BLOCKS["llama"], "answer")
    given = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    moved = written(edited, 3, **given, past_key_values=first.past_key_values)
    torch.testing.assert_close(moved[0], right, atol=1e-4, rtol=1e-4)


def test_a_decoder_of_sound_is_edited_from_its_first_token_on() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": 64, "num_mel_bins": 8}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1, "bos_token_id": 1}
    config = WhisperConfig(**sizes, pad_token_id=0, eos_token_id=2, begin_suppress_tokens=None)
    whisper: Any = WhisperForConditionalGeneration(config)
    plain, block = rough(whisper), "model.decoder.layers.0"
    options = {"input_features": torch.randn(2, 8, 40), "use_cache": False}

    def move(module: Any, args: Any, output: Any) -> Any:
        moved = (output if isinstance(output, Tensor) else output[0]).clone()
        moved[:, 1:3] += VECTOR
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    hook = plain.get_submodule(block).register_forward_hook(move)
    right = plain.generate(**options, max_new_tokens=5, do_sample=False)
    hook.remove()
    base = plain.generate(**options, max_new_tokens=5, do_sample=False)
    add_edit(plain, block, "generated[0:2]")
    for use_cache in (True, False):
        given = options | {"use_cache": use_cache}
        for beams in (1, 2):
            moved = plain.generate(**given, max_new_tokens=5, do_sample=False, num_beams=beams)
            assert beams > 1 or torch.equal(moved, right)
    assert not torch.equal(base, right)
