"""Blocks of several classes, and blocks whose parts are more than an attention and a feed-forward part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_peft.backbone.structure import blocks
from lightning_peft.editing import head_sites, layer_sites
from lightning_peft.testing.shrunk import shrunk_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LATENT = {"v_head_dim": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8}

# settings, layers with attention, heads, and where the feed-forward part of the first and the last block is read
MODELS: dict[str, tuple[dict[str, Any], list[int], set[tuple[int, ...]], str, str]] = {
    "Jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
        [1, 3], {(4, 8)}, "0.feed_forward", "3.feed_forward",
    ),
    "Zamba2": (
        {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8,
         "mamba_ngroups": 1, "num_mem_blocks": 1, "attention_head_dim": 16, "num_key_value_heads": 4},
        [1, 3], {(4, 16)}, "1.shared_transformer.feed_forward.down_proj", "3.shared_transformer.feed_forward.down_proj",
    ),
    "Qwen3Next": ({**EXPERTS, **DELTA}, [1, 3], {(4, 8)}, "0.mlp", "3.mlp"),
    "Qwen3_5MoeText": ({**EXPERTS, **DELTA}, [1, 3], {(4, 8)}, "0.mlp", "3.mlp"),
    "Qwen3_5Text": (DELTA, [1, 3], {(4, 8)}, "0.mlp", "3.mlp"),
    "RecurrentGemma": (
        {"head_dim": 8, "lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
        [1, 3], {(4, 8)}, "0.mlp_block", "3.mlp_block",
    ),
    "Lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, [1, 3], {(4, 8)}, "0.feed_forward", "3.feed_forward"),
    "Bamba": ({"attn_layer_indices": [1, 3], **MAMBA}, [1, 3], {(4, 8)}, "0.feed_forward", "3.feed_forward"),
    "FalconH1": (
        {"head_dim": 8, "mamba_d_ssm": 32, **MAMBA, "mamba_n_heads": 4},
        [0, 1, 2, 3], {(4, 8)}, "0.feed_forward", "3.feed_forward",
    ),
    "NemotronH": (
        {"head_dim": 8, "layers_block_type": ["mamba", "attention", "moe", "attention"], "mamba_num_heads": 4,
         "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
        [1, 3], {(4, 8)}, "2.mixer", "2.mixer",
    ),
    "GraniteMoeHybrid": (
        {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16, "mamba_expand": 2, **MAMBA,
         "layer_types": ["mamba", "attention"] * 2},
        [1, 3], {(4, 8)}, "0.shared_mlp.output_linear", "3.shared_mlp.output_linear",
    ),
    "Gemma3nText": (
        {"head_dim": 8, "sliding_window": 16, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
         "altup_num_inputs": 2, "laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
        [0, 1, 2, 3], {(4, 8)}, "0.mlp", "3.mlp",
    ),
    "Gemma4Text": (
        {"head_dim": 8, "global_head_dim": 16, "sliding_window": 16, "vocab_size_per_layer_input": 64,
         "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        [0, 1, 2, 3], {(4, 8), (4, 16)}, "0.mlp", "3.mlp",
    ),
    "DeepseekV3": (
        {**LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 2,
         "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        [0, 1, 2, 3], {(4, 12)}, "0.mlp", "3.mlp",
    ),
    "MiniMax": (
        {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
         "layer_types": ["linear_attention", "full_attention"] * 2},
        [0, 1, 2, 3], {(4, 8)}, "0.mlp", "3.mlp",
    ),
    "DiffLlama": ({"head_dim": 8}, [0, 1, 2, 3], {(4, 8)}, "0.mlp", "3.mlp"),
}  # fmt: skip


def build(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name][0]})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", MODELS)
def test_every_block_has_its_parts(name: str) -> None:
    model, (_, attending, heads, first, last) = build(name), MODELS[name]
    members = blocks(model)
    stack = members[0].stack
    assert [block.name for block in members] == [f"{stack}.{i}" for i in range(4)]
    assert [site.name for site in layer_sites(model)] == [block.name for block in members]
    assert {site.width for site in layer_sites(model)} == {32}
    projections = [site.name for site in head_sites(model)]
    assert [int(name.removeprefix(f"{stack}.").partition(".")[0]) for name in projections] == attending
    assert all(name.rpartition(".")[2] in ("o_proj", "out_proj") for name in projections)
    assert {site.shape for site in head_sites(model)} == heads
    sites = layer_sites(model, "mlp")
    assert (sites[0].name, sites[-1].name) == (f"{stack}.{first}", f"{stack}.{last}")
    assert {site.width for site in sites} == {32}
    mixing = {block.number for block in members if block.mixers}
    assert mixing <= {0, 1, 2, 3} - set(attending) or name in ("FalconH1", "Zamba2")
    assert all(span.last.rpartition(".")[2] in ("out_proj", "linear_out") for b in members for span in b.mixers)


def test_blocks_that_only_mix_are_read_as_feed_forward_parts() -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=8)
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(config)
    assert [site.name for site in layer_sites(model, "mlp")] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    assert all(block.mlp and block.mlp.last.endswith("mixer.out_proj") and not block.mixers for block in blocks(model))


def test_two_attentions_of_a_kind_are_no_cross_attention() -> None:
    config = transformers.LongcatFlashConfig(
        hidden_size=32, num_layers=2, num_attention_heads=4, vocab_size=64, ffn_hidden_size=48, **LATENT, head_dim=8,
        moe_topk=2, n_routed_experts=4, zero_expert_num=1, expert_ffn_hidden_size=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LongcatFlashForCausalLM(config)
    assert [(site.part, site.shape) for site in head_sites(model)] == [("self", (4, 12))] * 4


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList([nn.Linear(4, 4)]), nn.LayerNorm(4)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduction = nn.Linear(4, 4)


def test_a_list_of_stages_and_what_stands_between_them_is_no_list_of_blocks() -> None:
    assert blocks(nn.Sequential(Stage(), Pooling(), Stage(), Pooling())) == []
    assert blocks(nn.ModuleList([Stage(), nn.LayerNorm(4)])) == []


@pytest.mark.parametrize(
    ("name", "model_type", "output"),
    [
        ("MistralLarge4ForConditionalGeneration", "mistral_large4", "o_proj"),  # registered before queries and indexer
        ("ProphetNetForCausalLM", "prophetnet", "out_proj"),  # and before a matrix of relative positions
    ],
)
def test_the_output_of_an_attention_is_found_wherever_it_is_registered(name: str, model_type: str, output: str) -> None:
    model = shrunk_model(getattr(transformers, name), model_type)
    assert {site.name.rpartition(".")[2] for site in head_sites(model)} == {output}
