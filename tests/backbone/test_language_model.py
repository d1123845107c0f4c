"""Of a model that sees or hears too, layers and heads are by default those of its language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny
from torch import nn

from lightning_peft.backbone.language_model import language_stacks, part_blocks
from lightning_peft.backbone.targets import Layers, choose_targets
from lightning_peft.callbacks import CAA, Ablation, RepE
from lightning_peft.editing import head_sites, layer_sites
from lightning_peft.tuners.weight_deltas.choice import choose_parameters, choose_top

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
}
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(projection_dim=16, **SIGHT),
        image_token_index=90,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    sight = {"embed_dim": 32, "hidden_size": 32, "depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=sight)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_audio() -> nn.Module:
    config = transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(
            d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8
        ),
        text_config=transformers.Qwen2Config(**TEXT),
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(head_dim=8, **TEXT),
        vision_config=transformers.SiglipVisionConfig(**SIGHT),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def git() -> nn.Module:
    """Its tower of pictures lies within the module that embeds tokens."""
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return transformers.GitForCausalLM(transformers.GitConfig(vision_config=SIGHT, **text))


def shapes(make: Any) -> nn.Module:
    with torch.device("meta"):
        return make()


STACKS = {
    llava: (["model.language_model.layers"], "vision", "model.vision_tower.encoder.layers"),
    gemma3: (["model.language_model.layers"], "vision", "model.vision_tower.encoder.layers"),
    qwen2_vl: (["model.language_model.layers"], "vision", "model.visual.blocks"),
    qwen2_audio: (["model.language_model.layers"], "audio", "model.audio_tower.layers"),
    git: (["git.encoder.layer"], "vision", "git.image_encoder.vision_model.encoder.layers"),
}


@pytest.mark.parametrize("make", STACKS)
def test_the_language_models_blocks_are_meant_and_others_are_named(make: Any) -> None:
    model, (language, other, others) = shapes(make), STACKS[make]
    assert language_stacks(model) == language
    assert {block.stack for block in part_blocks(model)} == set(language)
    assert {block.stack for block in part_blocks(model, other)} == {others}
    assert {block.stack for block in part_blocks(model, others.rpartition(".")[0])} == {others}
    assert {block.stack for block in part_blocks(model, "all")} == {*language, others}
    for sites in (layer_sites(model), layer_sites(model, "mlp"), head_sites(model)):
        assert len(sites) == 4 and all(site.name.startswith(language[0]) for site in sites)
    assert len(layer_sites(model, within=other)) == 3 and len(head_sites(model, within=other)) == 3
    assert CAA().find_sites(model)[0].name == f"{language[0]}.2"
    assert [site.name for site in RepE(layers=[1]).find_sites(model)] == [f"{language[0]}.1"]
    assert CAA(within=other).find_sites(model)[0].name == f"{others}.1"
    ablation = Ablation()
    ablation.find_sites(model)
    assert not any(site.name.startswith(others.rpartition(".")[0]) for site in ablation.targets)


@pytest.mark.parametrize("make", [llava, qwen2_audio])
def test_numbers_of_layers_are_the_language_models_in_tuning_too(make: Any) -> None:
    model, (language, other, others) = shapes(make), STACKS[make]
    targets = choose_targets(model, ["q_proj"], [1])
    assert targets == [f"{language[0]}.1.self_attn.q_proj"]
    assert choose_targets(model, ["q_proj"], Layers(last=1), other) == [f"{others}.2.self_attn.q_proj"]
    both = choose_targets(model, None, Layers(first=1), [other, "mlp"])
    assert both == [f"{others}.0.mlp.fc1", f"{others}.0.mlp.fc2"] or both == [f"{others}.0.fc1", f"{others}.0.fc2"]
    assert all(name.startswith(f"{language[0]}.") for name in choose_targets(model, None, None, "attention"))
    assert all(name.startswith(f"{language[0]}.3.") for name in choose_parameters(model, [3]))
    assert not any(name.startswith(others) for name in choose_top(model, 1))
    with pytest.raises(ValueError, match=r"^None of the target modules is in the language model, .*within=\"vision\""):
        choose_targets(model, [f"{others}.0.self_attn.q_proj"], [0])


def test_a_model_of_text_alone_has_no_other_part() -> None:
    for kind in ("llama", "bert", "t5"):
        model = tiny(kind)
        assert language_stacks(model) is None and part_blocks(model) == part_blocks(model, "all")
        with pytest.raises(ValueError, match=r"^within='vision' is neither a submodule of \w+ nor a part of it: its "):
            part_blocks(model, "vision")


def test_an_encoder_that_a_decoder_looks_at_goes_with_it() -> None:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = shapes(lambda: transformers.WhisperForConditionalGeneration(config))
    assert {site.part for site in head_sites(model)} == {"encoder", "self", "cross"}


def test_a_decoder_alone_has_no_cross_attention_that_runs() -> None:
    config = transformers.BartConfig(
        d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=24, vocab_size=96, pad_token_id=0
    )
    model = shapes(lambda: transformers.BartForCausalLM(config))
    assert [site.part for site in head_sites(model)] == ["self", "self"]


def test_a_part_that_is_not_there_is_refused_with_those_that_are() -> None:
    model = shapes(llava)
    with pytest.raises(ValueError, match=r"^within='visual' is neither a submodule .*: its lists of blocks are"):
        layer_sites(model, within="visual")
    with pytest.raises(ValueError, match=r"^There is no block within 'lm_head' of LlavaForConditionalGeneration"):
        layer_sites(model, within="lm_head")
    with pytest.raises(ValueError, match=r'^within takes "attention" or "mlp", and the name of one part'):
        choose_targets(model, None, None, ["vision", "language"])
