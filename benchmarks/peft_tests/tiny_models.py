"""Tiny models with random weights, under the names that peft's tests load from the Hugging Face hub.

A folder of that name in the working directory is what `from_pretrained` takes before it asks the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
)

# hidden size 32 in four heads of 8, two layers, everywhere
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "initializer_range": 0.2,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_OPT = OPTConfig(
    hidden_size=32,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=200,
    max_position_embeddings=128,
    word_embed_proj_dim=32,
    init_std=0.2,
    **_TOKENS,
)
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 200, "n_positions": 128, "initializer_range": 0.2}

DECODERS: dict[str, PreTrainedConfig] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _OPT,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": GPT2Config(**_GPT2, **_TOKENS),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": GPTJConfig(**_GPT2, rotary_dim=4, **_TOKENS),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**_LLAMA_LIKE, **_TOKENS),
    "peft-internal-testing/tiny-dummy-qwen2": Qwen2Config(**_LLAMA_LIKE, **_TOKENS),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Gemma3TextConfig(**_LLAMA_LIKE, head_dim=8, **_TOKENS),
}
ENCODER_DECODERS: dict[str, PreTrainedConfig] = {
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=200, decoder_start_token_id=0
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=200,
        max_position_embeddings=128,
        init_std=0.2,
        **_TOKENS,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
}
# test_config.py reads a saved LoRA adapter
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"


def write(folder: Path) -> None:
    """Write all of them into a folder."""
    for name, config in DECODERS.items():
        torch.manual_seed(0)
        _save(AutoModelForCausalLM.from_config(config), folder / name)
    for name, config in ENCODER_DECODERS.items():
        torch.manual_seed(0)
        _save(AutoModelForSeq2SeqLM.from_config(config), folder / name)
    adapted = get_peft_model(AutoModelForCausalLM.from_config(_OPT), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(str(folder / ADAPTER))


def _save(model: PreTrainedModel, folder: Path) -> None:
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # so that texts are as long as was asked
    model.save_pretrained(folder)
