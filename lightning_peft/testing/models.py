"""Small random models of several architectures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 64


def tiny(kind: str) -> nn.Module:
    """A small random model of an architecture: `llama` (grouped queries, tied), `wide_llama` (explicit head_dim),
    `gpt2`, `gpt_neox`, `opt`, `bert` (an encoder with a masked-language head), `t5`, `vit` (an image classifier)."""
    import transformers as t

    torch.manual_seed(0)
    config: Any
    model: Any
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind in ("llama", "wide_llama"):
        config = t.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16 if kind == "wide_llama" else None,
            tie_word_embeddings=True,
            max_position_embeddings=128,
            **common,
        )
        model = t.LlamaForCausalLM(config)
    elif kind == "gpt2":
        config = t.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, n_positions=128, resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1, **common
        )
        model = t.GPT2LMHeadModel(config)
    elif kind == "gpt_neox":
        config = t.GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            **common,
        )
        model = t.GPTNeoXForCausalLM(config)
    elif kind == "opt":
        config = t.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            **common,
        )
        model = t.OPTForCausalLM(config)
    elif kind == "bert":
        config = t.BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            **common,
        )
        model = t.BertForMaskedLM(config)
    elif kind == "t5":
        config = t.T5Config(
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,  # type: ignore[call-arg]
            **common,
        )
        model = t.T5ForConditionalGeneration(config)
    elif kind == "vit":
        config = t.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
            num_labels=5,  # type: ignore[call-arg]
        )
        model = t.ViTForImageClassification(config)
    else:
        raise ValueError(kind)
    # freshly made projections are so small that an edit hardly shows; wider weights make every law bite
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and kind != "t5":  # whose are wide as they are
                parameter.mul_(4)
    return model.eval()


LANGUAGE_MODELS = ("llama", "wide_llama", "gpt2", "gpt_neox", "opt")
