"""Small random models of several architectures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64


def tiny(kind: str) -> nn.Module:
    """Return a small random model of an architecture.

    Args:
        kind: `llama` (grouped queries, tied), `wide_llama` (explicit head_dim), `gpt2`, `gpt_neox`, `opt`, `qwen3_moe`
            (a mixture of fused experts), `bert` (an encoder with a masked-language head), `t5`, `vit` (an image
            classifier), `hand_written` (a causal language model without transformers), `convolutional` (features of an
            image).
    """
    import transformers

    t: Any = transformers  # whose configurations take more than they declare
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
    elif kind == "qwen3_moe":
        config = t.Qwen3MoeConfig(
            hidden_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            **common,
        )
        model = t.Qwen3MoeForCausalLM(config)
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
            decoder_start_token_id=0,
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
            num_labels=5,
        )
        model = t.ViTForImageClassification(config)
    elif kind in ("hand_written", "convolutional"):
        return HandWritten().eval() if kind == "hand_written" else Convolutional().eval()
    else:
        raise ValueError(kind)
    # freshly made projections are so small that an edit hardly shows; wider weights make every law bite
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and kind != "t5":  # whose are wide as they are
                parameter.mul_(4)
    return model.eval()


def rough(kind: str) -> nn.Module:
    """Return a tiny model with random biases and norms: in a freshly made one a lost bias would not show."""
    model = tiny(kind)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


LANGUAGE_MODELS = ("llama", "wide_llama", "gpt2", "gpt_neox", "opt")


class HandWritten(nn.Module):
    """A causal language model that knows nothing of transformers: three blocks of attention, `[B, T] -> [B, T, V]`."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}) for _ in range(3)
        )
        self.out = nn.Linear(width, VOCABULARY)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        batch, length = input_ids.shape
        positions = torch.arange(length) if position_ids is None else position_ids
        x = self.embed(input_ids) + self.place(positions)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            # a pad may look at itself, so that no row of the softmax is empty
            allowed = allowed & (attention_mask[:, None, None].bool() | torch.eye(length, dtype=torch.bool))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            q, k, v = block["qkv"](x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            z = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            x = x + block["proj"](z.transpose(1, 2).reshape(batch, length, -1))
        return self.out(x)


class Convolutional(nn.Module):
    """A hand-written network: a convolution, then blocks of a linear layer, BatchNorm and dropout, `[B, 8]`."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(torch.relu(self.norm(self.linear(x))))

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.input = nn.Conv2d(1, 2, 3), nn.Linear(32, 8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.input(torch.relu(self.conv(pixel_values)).flatten(1))
        for block in self.blocks:
            x = block(x)
        return x
