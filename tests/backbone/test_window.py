"""The context window found by structure is the longest text that a model can read, measured."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers as t
from tiny_models import VOCABULARY
from torch import nn

from lightning_peft.backbone.window import (
    ContextWindowError,
    ContextWindowWarning,
    Window,
    check_lengths,
    context_window,
)
from lightning_peft.stack.stack import stack_of

SIZE = 24  # positions of each model's configuration
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": SIZE,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SEQ2SEQ |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": SIZE}

# name of the configuration, of the head, what is set beside, and the window: tokens and whether there are no more
MODELS: list[tuple[str, str, dict[str, Any], Window | None]] = [
    ("GPT2", "GPT2LMHeadModel", GPT2, Window(24, True)),
    ("OPT", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}, Window(24, True)),
    (
        "GPTNeo",
        "GPTNeoForCausalLM",
        {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
        Window(24, True),
    ),
    ("GPTBigCode", "GPTBigCodeForCausalLM", GPT2, Window(24, True)),
    ("GPTJ", "GPTJForCausalLM", {**GPT2, "rotary_dim": 8}, Window(24, True)),
    ("CodeGen", "CodeGenForCausalLM", {**GPT2, "num_attention_heads": 4, "rotary_dim": 8}, Window(24, True)),
    ("CTRL", "CTRLLMHeadModel", {**GPT2, "dff": 48}, Window(24, True)),
    ("OpenAIGPT", "OpenAIGPTLMHeadModel", GPT2, Window(24, True)),
    ("BioGpt", "BioGptForCausalLM", {}, Window(24, True)),
    ("XGLM", "XGLMForCausalLM", {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 2}, None),
    ("Bert", "BertForMaskedLM", {}, Window(24, True)),
    (
        "DistilBert",
        "DistilBertForMaskedLM",
        {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48},
        Window(24, True),
    ),
    ("Roberta", "RobertaForMaskedLM", {}, Window(22, True)),
    ("MPNet", "MPNetForMaskedLM", {}, Window(22, True)),
    ("Electra", "ElectraForMaskedLM", {"embedding_size": 32}, Window(24, True)),
    ("XLM", "XLMWithLMHeadModel", {"emb_dim": 32, "n_layers": 1, "n_heads": 2, "n_langs": 1}, Window(24, True)),
    (
        "DebertaV2",
        "DebertaV2ForMaskedLM",
        {"relative_attention": True, "position_biased_input": False, "position_buckets": 12},
        None,
    ),
    ("RoFormer", "RoFormerForMaskedLM", {"embedding_size": 32}, Window(24, True)),
    (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
        Window(24, False),
    ),
    ("Llama", "LlamaForCausalLM", {}, Window(24, False)),
    ("Mistral", "MistralForCausalLM", {"sliding_window": 8, "num_key_value_heads": 2}, Window(24, False)),
    ("Gemma", "GemmaForCausalLM", {"num_key_value_heads": 2, "head_dim": 16}, Window(24, False)),
    ("Gemma2", "Gemma2ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}, Window(24, False)),
    ("Qwen2", "Qwen2ForCausalLM", {"num_key_value_heads": 2}, Window(24, False)),
    ("GPTNeoX", "GPTNeoXForCausalLM", {}, Window(24, False)),
    ("Falcon", "FalconForCausalLM", {}, Window(24, False)),
    ("Falcon", "FalconForCausalLM", {"alibi": True}, None),
    ("Bloom", "BloomForCausalLM", {"n_layer": 1, "n_head": 2}, None),
    ("Mpt", "MptForCausalLM", {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": SIZE}, Window(24, True)),
    ("Cohere2", "Cohere2ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 8}, Window(24, False)),
    ("Jamba", "JambaForCausalLM", {"num_key_value_heads": 2, "use_mamba_kernels": False, "num_hidden_layers": 8}, None),
    ("M2M100", "M2M100ForConditionalGeneration", SEQ2SEQ, None),
    ("Albert", "AlbertForMaskedLM", {"embedding_size": 32}, Window(24, True)),
    ("Longformer", "LongformerForMaskedLM", {"attention_window": 4}, Window(22, True)),
    ("Esm", "EsmForMaskedLM", {"mask_token_id": 4}, Window(22, True)),
    ("Esm", "EsmForMaskedLM", {"mask_token_id": 4, "position_embedding_type": "rotary"}, Window(24, False)),
    ("XLNet", "XLNetLMHeadModel", {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}, None),
    ("Mamba", "MambaForCausalLM", {"state_size": 4}, None),
    (
        "T5",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 2},
        None,
    ),
    ("Bart", "BartForConditionalGeneration", SEQ2SEQ, Window(24, True)),
    ("Pegasus", "PegasusForConditionalGeneration", SEQ2SEQ, Window(24, True)),
    (
        "LED",
        "LEDForConditionalGeneration",
        {
            **SEQ2SEQ,
            "max_encoder_position_embeddings": SIZE,
            "max_decoder_position_embeddings": 8,
            "attention_window": 4,
        },
        Window(24, True),
    ),
]


def made(config: str, head: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(t, f"{config}Config")
    names = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    known = names | set(getattr(kind, "__dataclass_fields__", ()))
    common = {name: value for name, value in SMALL.items() if name in known and name not in options}
    if options is GPT2 or "n_positions" in options:
        common.pop("max_position_embeddings", None)
    return getattr(t, head)(kind(**common, **options)).eval()


def runs(model: nn.Module, length: int) -> bool:
    ids = torch.full((1, length), 7)
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :2]
    try:
        with torch.no_grad():
            model(**inputs)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(
    ("config", "head", "options", "window"), MODELS, ids=[f"{m[1]}-{i}" for i, m in enumerate(MODELS)]
)
def test_the_window_is_the_longest_text_that_runs(
    config: str, head: str, options: dict[str, Any], window: Window | None
) -> None:
    model = made(config, head, options)
    assert context_window(model) == window
    tokens = SIZE if window is None else window.tokens
    assert runs(model, tokens)
    assert runs(model, tokens + 1) == runs(model, tokens + 12) == (window is None or not window.fixed)


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 64),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "rope_theta": 1e4}, 64),
    ],
)  # fmt: skip
def test_a_scaled_rotation_reads_more(rope: dict[str, Any], tokens: int) -> None:
    options = {"rope_parameters": rope, "max_position_embeddings": 64}
    assert context_window(made("Llama", "LlamaForCausalLM", options)) == Window(tokens, False)


def test_the_window_of_a_multimodal_model_is_its_language_models() -> None:
    text = {**SMALL, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "max_position_embeddings": 5}
    config = t.LlavaConfig(text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**vision))
    assert context_window(t.LlavaForConditionalGeneration(config)) == Window(SIZE, False)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_prompt_takes_its_places_of_the_window(config: str) -> None:
    model = made("GPT2", "GPT2LMHeadModel", GPT2)
    assert context_window(model) == Window(24, True)
    stack = stack_of(model)
    stack.add(getattr(peft, config)(num_virtual_tokens=5, task_type="CAUSAL_LM"), "prompt")
    assert context_window(model) == Window(19, True)
    assert runs(model, 19) and not runs(model, 20)
    stack.remove("prompt")
    assert context_window(model) == Window(24, True)


def test_a_model_without_weights_has_its_window() -> None:
    with torch.device("meta"):
        assert context_window(made("GPT2", "GPT2LMHeadModel", GPT2)) == Window(SIZE, True)
        assert context_window(made("Llama", "LlamaForCausalLM", {})) == Window(SIZE, False)


def test_too_long_for_a_table_is_refused_and_for_a_rotation_said_once() -> None:
    gpt2, llama = made("GPT2", "GPT2LMHeadModel", GPT2), made("Llama", "LlamaForCausalLM", {})
    check_lengths(gpt2, [24, 1], "texts")
    said = r"^2 of 3 texts are longer than the 24 tokens that GPT2LMHeadModel can read; the longest has 1,025: shorten"
    with pytest.raises(ContextWindowError, match=said):
        check_lengths(gpt2, [25, 1025, 24], "texts")
    with pytest.warns(
        ContextWindowWarning, match=r"^1 of 2 texts are .* LlamaForCausalLM was trained for; the longest"
    ):
        check_lengths(llama, [25, 24], "texts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_lengths(llama, [25, 24], "texts")
        check_lengths(llama, [26], "a part of them")
        check_lengths(made("Bloom", "BloomForCausalLM", {"n_layer": 1, "n_head": 2}), [10**6], "texts")
    with pytest.warns(ContextWindowWarning, match="2 of 2 others"):
        check_lengths(llama, [25, 26], "others", whole=True)
