"""The head sites of a model are its attention output projections, through whatever wraps them."""

from __future__ import annotations

import pytest
import torch
from edits import PROJECTIONS, add_lora, add_offsets
from peft import LoraConfig, get_peft_model
from tiny_models import LANGUAGE_MODELS, tiny
from torch import Tensor, nn

from lightning_peft.editing import HeadCapture, HeadSite, head_offsets_config, head_sites

PREFIX = {
    "llama": "model.layers",
    "wide_llama": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8)


class HandWritten(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(width) for _ in range(2))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_every_layer_has_one_site_of_the_right_name_count_and_width(kind: str) -> None:
    width = 16 if kind == "wide_llama" else 8  # wide_llama sets head_dim, so hidden_size / heads would be wrong
    expected = [HeadSite(f"{PREFIX[kind]}.{layer}.{PROJECTIONS[kind]}", layer, 4, width) for layer in range(3)]
    assert head_sites(tiny(kind)) == expected


def test_layer_10_comes_after_layer_9() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    sites = head_sites(LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, **sizes)))
    assert [site.layer for site in sites] == list(range(12))
    assert [site.name for site in sites] == [f"model.layers.{i}.self_attn.o_proj" for i in range(12)]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_sites_are_found_through_adapters_on_the_projections(kind: str) -> None:
    model = tiny(kind)
    bare = head_sites(model)
    add_lora(model, [PROJECTIONS[kind]])
    assert head_sites(model) == bare
    add_offsets(model)
    assert head_sites(model) == bare


def test_sites_of_a_peft_model_are_named_from_that_model(tokens: Tensor) -> None:
    model = tiny("llama")
    bare = head_sites(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["o_proj", "q_proj"]))
    sites = head_sites(wrapped)
    assert [site.name for site in sites] == [f"base_model.model.{site.name}" for site in bare]
    assert all(site.num_heads == 4 and site.head_dim == 8 for site in sites)
    with HeadCapture(wrapped, sites) as capture:
        assert capture(tokens).shape == (3, 3, 4, 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_sites_are_found_and_read_where_projections_are_quantised(bits: int, tokens: Tensor) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("llama")
    bare = head_sites(model)
    with HeadCapture(model, bare) as capture:
        plain = capture(tokens)
    for layer in model.model.layers:
        linear = layer.self_attn.o_proj
        if bits == 4:
            quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False)
        else:
            quantised = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        quantised.load_state_dict(linear.state_dict())
        layer.self_attn.o_proj = quantised.to("cpu")
    assert head_sites(model) == bare
    with HeadCapture(model, bare) as capture:
        read = capture(tokens)
    assert torch.equal(read[:, 0], plain[:, 0])  # nothing before the first projection is quantised
    assert not torch.equal(read[:, 1], plain[:, 1])


def test_unknown_architecture_says_how_to_name_the_projections() -> None:
    with pytest.raises(ValueError, match=r"^No attention output projection was found in HandWritten: give the end of"):
        head_sites(HandWritten())


def test_a_hand_written_module_needs_a_pattern_and_the_number_of_heads() -> None:
    model = HandWritten()
    assert head_sites(model, pattern=r"blocks\.\d+\.proj", num_heads=3) == [
        HeadSite("blocks.0.proj", 0, 3, 4),
        HeadSite("blocks.1.proj", 1, 3, 4),
    ]
    with pytest.raises(
        ValueError, match=r"^HandWritten has no configuration that says how many heads it has: give num"
    ):
        head_sites(model, pattern="proj")


def test_a_width_that_the_heads_cannot_share_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^blocks\.0\.proj takes 12 features, which 5 heads cannot share equally\.$"):
        head_sites(HandWritten(), pattern="proj", num_heads=5)


def test_a_width_other_than_the_configuration_says_is_an_error() -> None:
    model = tiny("wide_llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"o_proj takes 32 features, but the configuration says 4 heads of 16\.$"):
        head_sites(model)


def test_the_config_of_chosen_heads_names_their_projections() -> None:
    sites = head_sites(tiny("gpt2"))
    config = head_offsets_config(sites, [(2, 3), (0, 1), (2, 0)], alpha=5.0, positions="all")
    assert config.heads == {sites[0].name: [1], sites[2].name: [0, 3]}
    assert (config.head_dim, config.alpha, config.positions) == (8, 5.0, "all")
    assert head_offsets_config(sites).target_modules == [site.name for site in sites]


def test_heads_of_different_sizes_cannot_share_an_adapter() -> None:
    sites = [HeadSite("a", 0, 4, 8), HeadSite("b", 1, 4, 16)]
    with pytest.raises(ValueError, match=r"^Heads of different sizes \(\[8, 16\]\) cannot share one adapter\.$"):
        head_offsets_config(sites)
