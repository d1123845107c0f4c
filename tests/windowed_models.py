"""Small random models of transformers whose layers see no further back than a window, or count what they see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 64
WINDOW = 9  # less than the prompts of the tests have
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T: Any = transformers


def _model(kind: str, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(T, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that what a token sees matters to the last digit that is compared
            if name.endswith("sinks"):
                parameter.zero_()
    return model


def _sliding(kind: str, layers: int = 3, **more: Any) -> nn.Module:
    return _model(kind, getattr(T, f"{kind}Config")(**SIZES, num_hidden_layers=layers, sliding_window=WINDOW, **more))


def _llama4(**more: Any) -> nn.Module:
    sizes = SIZES | {"num_hidden_layers": 4, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = T.Llama4TextConfig(**sizes, attention_chunk_size=WINDOW, no_rope_layer_interval=2, **more)
    return _model("Llama4", config)


def _rotated(factors: str) -> nn.Module:
    rope = {"rope_type": factors, "factor": 4.0, "rope_theta": 1e4}
    if factors == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 21}
    sizes = SIZES | {"max_position_embeddings": 84 if factors == "longrope" else 21}
    return _model("Llama", T.LlamaConfig(**sizes, num_hidden_layers=3, rope_parameters=rope))


def _gpt_neo(window: int) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "window_size": window}
    config = T.GPTNeoConfig(**sizes, max_position_embeddings=256, attention_types=[[["global", "local"], 1]])
    return _model("GPTNeo", config)


# models whose windows are shorter than the tests' texts, and that are packed all the same
PACKED: dict[str, Callable[[], nn.Module]] = {
    "gemma2": lambda: _sliding("Gemma2", query_pre_attn_scalar=8),
    "gemma3": lambda: _model(
        "Gemma3",
        T.Gemma3TextConfig(
            **SIZES,
            num_hidden_layers=3,
            sliding_window=WINDOW,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "mistral": lambda: _sliding("Mistral"),
    "gpt_oss": lambda: _sliding("GptOss", layers=4, num_local_experts=2, num_experts_per_tok=1),
    "cohere2": lambda: _sliding("Cohere2", layers=4),
    "qwen2": lambda: _sliding("Qwen2", layers=4, use_sliding_window=True, max_window_layers=2),
    "phi3": lambda: _sliding("Phi3"),
    "llama4": lambda: _llama4(),
}
# models that count the tokens of a call, or rotate longer texts otherwise, and the warning with which they are not
PLAIN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama4 with a short scale": (
        lambda: _llama4(floor_scale=25, attn_scale=0.5),
        r"Llama4ForCausalLM scores what takes more than 24 tokens packed row by row",
    ),
    "gpt_neo": (lambda: _gpt_neo(21), r"GPTNeoForCausalLM scores what takes more than 21 tokens packed row by row"),
    "longrope": (lambda: _rotated("longrope"), r"LlamaForCausalLM scores texts of more than 21 tokens row by row"),
    "dynamic": (lambda: _rotated("dynamic"), r"LlamaForCausalLM scores texts of more than 21 tokens row by row"),
}


def without_windows(kind: str) -> nn.Module:
    """Return one of `PACKED` with the same weights, whose layers see everything."""
    model: Any = PACKED[kind]()
    changed = _model(type(model).__name__.removesuffix("ForCausalLM"), _unlimited(model.config))
    changed.load_state_dict(model.state_dict())
    return changed


def _unlimited(config: Any) -> Any:
    values = {"sliding_window": 10_000, "attention_chunk_size": 10_000}
    for name in values:
        if getattr(config, name, None) is not None:
            setattr(config, name, values[name])
    return config
