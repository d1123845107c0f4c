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


def test_heads_of_different_sizes_have_a_size_for_each_layer() -> None:
    sites = [HeadSite("a", 0, 4, 8), HeadSite("b", 1, 4, 16), HeadSite("c", 2, 4, 8)]
    config = head_offsets_config(sites, [(1, 0), (0, 3)])
    assert config.head_dim == {"a": 8, "b": 16} and (config.head_size("b"), config.head_size("c")) == (16, 0)
    assert head_offsets_config(sites[::2]).head_dim == 8  # as folders have always had it


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
OTHERS = {  # model class, configuration class, its arguments, the name of the last site, width of a head
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, "model.layers.1.self_attn.o_proj", 8),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 16}, "model.layers.1.self_attn.o_proj", 16),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 16}, "model.layers.1.self_attn.o_proj", 16),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | {"head_dim": 16},
        "model.layers.1.self_attn.o_proj",
        16,
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", SMALL, "model.layers.1.self_attn.dense", 8),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, "model.layers.1.self_attn.o_proj", 8),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | {"num_local_experts": 2},
        "model.layers.1.self_attn.o_proj",
        8,
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        "transformer.h.1.self_attention.dense",
        8,
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "transformer.h.1.self_attention.dense",
        8,
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 64},
        "transformer.h.1.attn.out_proj",
        8,
    ),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        SMALL
        | {
            "v_head_dim": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "first_k_dense_replace": 2,
        },
        "model.layers.1.self_attn.o_proj",
        12,
    ),
    "roberta": (
        "RobertaForMaskedLM",
        "RobertaConfig",
        SMALL,
        "roberta.encoder.layer.1.attention.output.dense",
        8,
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64},
        "distilbert.transformer.layer.1.attention.out_lin",
        8,
    ),
}


def make(kind: str) -> nn.Module:
    import transformers

    model, config, arguments, *_ = OTHERS[kind]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_found_and_read_as_by_a_plain_hook(kind: str) -> None:
    model = make(kind)
    *_, last, width = OTHERS[kind]
    sites = head_sites(model)
    assert [(site.layer, site.num_heads, site.head_dim, site.part) for site in sites] == [
        (0, 4, width, "self"),
        (1, 4, width, "self"),
    ]
    assert sites[-1].name == last
    tokens, seen = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0)), []
    handle = model.get_submodule(last).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    with HeadCapture(model, sites) as capture:
        read = capture(tokens)
    torch.testing.assert_close(read[:, 1].flatten(1), seen[0].reshape(2, 7, -1)[:, -1], atol=1e-5, rtol=1e-5)


def test_the_site_is_where_zeroing_the_heads_takes_the_attention_away() -> None:
    """What the projection gives is all that the attention adds: with its input at zero nothing of it is left."""
    for kind in ("gemma2", "phi3", "falcon"):
        model = make(kind)
        for site in head_sites(model):
            model.get_submodule(site.name).register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
        tokens = torch.randint(3, 64, (1, 6), generator=torch.Generator().manual_seed(1))
        other = tokens.clone()
        other[0, :5] = other[0, :5].flip(0)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens).logits[0, 5], model(input_ids=other).logits[0, 5])


def test_bert_and_vit_have_a_site_a_layer() -> None:
    assert head_sites(tiny("bert"))[2] == HeadSite("bert.encoder.layer.2.attention.output.dense", 2, 4, 8)
    assert head_sites(tiny("vit"))[2] == HeadSite("vit.layers.2.attention.o_proj", 2, 4, 8)


def test_an_encoder_decoder_has_three_parts() -> None:
    model = tiny("t5")
    sites = head_sites(model)
    assert [site.part for site in sites] == ["encoder"] * 3 + ["self", "cross"] * 3
    assert [site.layer for site in sites] == list(range(9))
    cross = head_sites(model, part="cross")
    assert [(s.name, s.layer) for s in cross] == [(f"decoder.block.{i}.layer.1.EncDecAttention.o", i) for i in range(3)]
    assert head_sites(model, part="encoder")[1] == HeadSite(
        "encoder.block.1.layer.0.SelfAttention.o", 1, 4, 8, "encoder"
    )


def test_an_attention_knows_its_number_of_heads_better_than_the_configuration() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 64}
    config = BartConfig(d_model=32, encoder_attention_heads=4, decoder_attention_heads=2, **sizes)
    sites = head_sites(BartForConditionalGeneration(config))
    assert [(s.part, s.num_heads, s.head_dim) for s in sites] == [("encoder", 4, 8), ("self", 2, 16), ("cross", 2, 16)]


def test_within_names_one_tower_of_several() -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {**SMALL, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=dict(SMALL), vision_config=vision))
    assert [s.num_heads for s in head_sites(model)] == [4, 4, 2, 2]
    assert [(s.layer, s.num_heads) for s in head_sites(model, within="vision_model")] == [(0, 2), (1, 2)]


def test_a_pattern_that_ends_at_something_else_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn is a LlamaAttention, not a projection: give"):
        head_sites(tiny("llama"), pattern="self_attn")
