"""Bottleneck methods as callbacks: where they go on each architecture, what they read, how large they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, ROOT, Classifier, Language, base_weights, fit, moved, one_sentence, weights
from vision import libraries

from lightning_peft import adapters
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.parts import part_ends
from lightning_peft.backbone.structure import blocks
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks import (
    MAM,
    AdapterPlus,
    Compacter,
    CompacterPlusPlus,
    Houlsby,
    ParallelAdapter,
    Pfeiffer,
    ScaledParallelAdapter,
)
from lightning_peft.testing.models import rough
from lightning_peft.tuners.bottleneck import BottleneckLayer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
KINDS = ("llama", "wide_llama", "gpt2", "gpt_neox", "opt", "bert", "t5", "vit", "hand_written", "convolutional")
METHODS = (Houlsby, Pfeiffer, ParallelAdapter, ScaledParallelAdapter, AdapterPlus, Compacter, CompacterPlusPlus)


class Around(L.LightningModule):
    """A LightningModule with a backbone and nothing else."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.model = backbone


def applied(callback: Any, kind: str) -> Any:
    """A tiny backbone with the callback's adapters."""
    callback.backbone, callback.train_head = "model", False
    module: Any = Around(rough(kind))
    callback.apply(module)
    return module.model


def adapted(backbone: nn.Module) -> dict[str, BottleneckLayer]:
    return {name: module for name, module in backbone.named_modules() if isinstance(module, BottleneckLayer)}


def trainable(backbone: nn.Module) -> int:
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


# -- where ----------------------------------------------------------------------------------------------------------

ATTENTIONS = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
    "bert": "bert.encoder.layer.{}.attention.output.dense",
}
MLPS = {
    "llama": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    "bert": ("bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"),
}


@pytest.mark.parametrize("kind", MLPS)
def test_houlsby_stands_after_attention_and_mlp_and_the_others_at_the_mlp(kind: str) -> None:
    attention = {ATTENTIONS[kind].format(i) for i in range(3)}
    mlp = {MLPS[kind][1].format(i): MLPS[kind][0].format(i) for i in range(3)}
    for method in (Houlsby, Compacter):
        assert set(adapted(applied(method(size=4), kind))) == attention | set(mlp)
    for method in (Pfeiffer, AdapterPlus, CompacterPlusPlus, ParallelAdapter, ScaledParallelAdapter):
        assert set(adapted(applied(method(size=4), kind))) == set(mlp)
    config: Any = ParallelAdapter(size=4, reads="input").make_config(rough(kind))
    assert config.inputs == mlp and (config.placement, config.reads) == ("parallel", "input")


def test_an_encoder_decoder_has_adapters_at_cross_attention_too() -> None:
    names = set(adapted(applied(Houlsby(size=4), "t5")))
    assert {f"decoder.block.{i}.layer.1.EncDecAttention.o" for i in range(3)} <= names
    assert len(names) == 3 * 2 + 3 * 3


@pytest.mark.parametrize("layers", [[1], Layers(last=2)])
@pytest.mark.parametrize("method", METHODS)
def test_layers_restricts_it_to_those_blocks(method: Any, layers: Any) -> None:
    names = adapted(applied(method(size=4, layers=layers), "gpt2"))
    assert {name.split(".")[2] for name in names} == ({"1"} if layers == [1] else {"1", "2"})


def test_targets_may_be_named() -> None:
    names = set(adapted(applied(Pfeiffer(size=4, target_modules=["o_proj"], layers=[0, 2]), "llama")))
    assert names == {f"model.layers.{i}.self_attn.o_proj" for i in (0, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_parallel_adapter_may_read_what_its_part_is_given(kind: str, tokens: Tensor) -> None:
    backbone = applied(ScaledParallelAdapter(size=4, init="bert", reads="input"), kind)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    named = dict(base_modules(backbone))

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[module] = (args[0], output)

    ends = part_ends(backbone, attention=False)
    for end in ends:
        layer = backbone.get_submodule(end.last)
        for module in (named[end.first], named[end.last], layer, layer.bottleneck["scaled_parallel"]):
            module.register_forward_hook(note)
    with torch.no_grad():
        if kind == "vit":
            backbone(torch.randn(2, 3, 8, 8))
        elif kind == "convolutional":
            backbone(torch.randn(2, 1, 6, 6))
        else:
            backbone(tokens, **({"decoder_input_ids": tokens} if kind == "t5" else {}))
    assert len(ends) == (6 if kind == "t5" else 3)
    for end in ends:
        layer = backbone.get_submodule(end.last)
        read, added = seen[layer.bottleneck["scaled_parallel"]]
        assert torch.equal(read, seen[named[end.first]][0])
        torch.testing.assert_close(seen[layer][1], seen[named[end.last]][1] + 4.0 * added)
        assert added.any()


# -- the residual stream --------------------------------------------------------------------------------------------

# the block, what its feed-forward part's input is normalised by (or without that its first matrix), the norm behind it
Place = tuple[str, str, str | None]
STREAMS: dict[str, Place] = {
    "llama": ("model.layers.1", "post_attention_layernorm", None),
    "mistral": ("model.layers.1", "post_attention_layernorm", None),
    "gpt2": ("transformer.h.1", "ln_2", None),
    "gpt_neox": ("gpt_neox.layers.1", "post_attention_layernorm", None),  # beside the attention
    "gptj": ("transformer.h.1", "ln_1", None),  # one norm for attention and part
    "opt": ("model.decoder.layers.1", "final_layer_norm", None),
    "opt_350m": ("model.decoder.layers.1", "fc1", "final_layer_norm"),
    "gemma2": ("model.layers.1", "pre_feedforward_layernorm", None),  # norms behind its parts, before the sum
    "granite": ("model.layers.1", "post_attention_layernorm", None),  # scales its parts' outputs
    "olmo2": ("model.layers.1", "mlp.gate_proj", None),  # norms behind its parts only
    "bert": ("bert.encoder.layer.1", "intermediate.dense", "output.LayerNorm"),
    "bart": ("model.decoder.layers.1", "fc1", "final_layer_norm"),
    "t5": ("decoder.block.1", "layer.2.layer_norm", None),
    "vit": ("vit.layers.1", "layernorm_after", None),
    "timm": ("blocks.1", "norm2", None),
    "torch": ("layers.1", "linear1", "norm2"),
    "convolutional": ("blocks.1", "linear", None),
}


def model_of(kind: str) -> nn.Module:
    """A small model of a kind of `STREAMS`."""
    import transformers

    t: Any = transformers
    names = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, **names}
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads", "ffn_dim")}
    torch.manual_seed(0)
    made = {
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**sizes)),
        "gptj": lambda: t.GPTJForCausalLM(
            t.GPTJConfig(n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4, **names)
        ),
        "opt_350m": lambda: t.OPTForCausalLM(
            t.OPTConfig(ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False, **sizes)
        ),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(head_dim=8, **sizes)),
        "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(residual_multiplier=0.2, **sizes)),
        "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**sizes)),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(d_model=16, max_position_embeddings=64, **sides, **names)
        ),
        "timm": lambda: libraries()[0].models.vision_transformer.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, init_values=0.1
        ),
        "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2),
    }
    return made[kind]().eval() if kind in made else rough(kind)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", STREAMS)
def test_the_stream_is_found_where_the_architecture_has_it(kind: str, device: str) -> None:
    block, before, norm = STREAMS[kind]
    model = model_of(kind).to(device)
    last = next(b.mlp.last for b in blocks(model) if b.name == block and b.mlp)
    pfeiffer, plus, beside = (m(size=2).make_config(model) for m in (Pfeiffer, AdapterPlus, ParallelAdapter))
    assert (pfeiffer.norms or {}).get(last) == (None if norm is None else f"{block}.{norm}")
    assert (pfeiffer.outputs or {}).get(last) == (block if norm is None else None)
    assert plus.outputs[last] == block and plus.norms is None
    assert (beside.inputs or {}).get(last, last) == f"{block}.{before}"
    assert beside.reads == ("stream" if "norm" in before or "ln" in before else "input")


@pytest.mark.parametrize("method", [Pfeiffer, AdapterPlus, ParallelAdapter])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_on_the_stream_a_whole_model_computes_the_papers_formula(method: Any, kind: str, tokens: Tensor) -> None:
    backbone = applied(method(size=4, init="bert", activation="relu", name="a"), kind).eval()
    branches: list[Any] = [layer.bottleneck["a"] for layer in adapted(backbone).values()]
    with torch.no_grad():
        for branch in branches:
            branch.up.weight.mul_(30)
        adapted_logits, base = backbone(tokens).logits, rough(kind)
        plain = {"llama": plain_llama, "bert": plain_bert}[kind](base, tokens, method.__name__, branches)
    torch.testing.assert_close(adapted_logits, plain, rtol=1e-5, atol=1e-5)
    assert (adapted_logits - base(tokens).logits).abs().max() > 0.1


def plain_llama(model: Any, tokens: Tensor, method: str, branches: list[Any]) -> Tensor:
    h = model.model.embed_tokens(tokens)
    place = model.model.rotary_emb(h, torch.arange(tokens.shape[1])[None])
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for layer, b in zip(model.model.layers, branches, strict=True):
        h = h + layer.self_attn(layer.input_layernorm(h), position_embeddings=place, attention_mask=mask)[0]
        y = layer.mlp(layer.post_attention_layernorm(h))
        h = h + y + 4.0 * b(h) if method == "ParallelAdapter" else h + y + b(h + y)
    return model.lm_head(model.model.norm(h))


def plain_bert(model: Any, tokens: Tensor, method: str, branches: list[Any]) -> Tensor:
    h = model.bert.embeddings(tokens)
    for layer, b in zip(model.bert.encoder.layer, branches, strict=True):
        x, norm = layer.attention(h)[0], layer.output.LayerNorm
        y = layer.output.dense(layer.intermediate(x))
        if method == "Pfeiffer":
            h = norm(y + x + b(norm(y + x)))
        else:
            h = norm(y + x) + b(norm(y + x)) if method == "AdapterPlus" else norm(y + x + 4.0 * b(x))
    return model.cls(h)


def test_other_adapters_that_act_do_not_hide_the_stream(tokens: Tensor) -> None:
    backbone = applied(AdapterPlus(size=4, init="bert", name="plus"), "bert")
    config: Any = Pfeiffer(size=4).make_config(backbone)
    assert len(config.norms) == 3 and config.outputs is None
    assert all(not layer.disable_adapters for layer in adapted(backbone).values())


@pytest.mark.parametrize(("method", "former"), [(Pfeiffer, "output"), (AdapterPlus, "output"), (MAM, "input")])
def test_a_backbone_that_shows_no_stream_is_one_sentence_that_names_the_other_place(method: Any, former: str) -> None:
    with pytest.raises(ValueError, match=rf'blocks\.0 could not be run by itself: give reads="{former}"\.$') as error:
        method(size=4, backbone="model").apply(Around(rough("hand_written")))
    assert one_sentence(str(error.value))


def test_named_targets_are_added_to_at_their_own_outputs() -> None:
    config: Any = Pfeiffer(size=4, target_modules=["o_proj"]).make_config(rough("llama"))
    assert (config.placement, config.reads, config.outputs) == ("sequential", "output", None)
    with pytest.raises(ValueError, match="target_modules names matrices") as error:
        Pfeiffer(size=4, target_modules=["o_proj"], reads="stream")
    assert one_sentence(str(error.value))


# -- how many -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_parameters_is_the_closed_formula(kind: str) -> None:
    d = 8 if kind == "convolutional" else 32
    every = blocks(rough(kind))
    mlps = len(every)
    parts = mlps + sum(len(block.attention) for block in every)
    m, plain = 4, 2 * d * 4 + 4 + d
    # its blocks are never called, and show no stream
    behind, beside = ({"reads": "output"}, {"reads": "input"}) if kind == "hand_written" else ({}, {})
    assert trainable(applied(Houlsby(size=m), kind)) == parts * plain
    assert trainable(applied(Pfeiffer(size=m, **behind), kind)) == mlps * plain
    assert trainable(applied(Pfeiffer(reduction=d // m, scaling="learned", **behind), kind)) == mlps * (plain + 1)
    assert trainable(applied(ParallelAdapter(reduction=d // m, **beside), kind)) == mlps * plain
    assert trainable(applied(ScaledParallelAdapter(size=m, **beside), kind)) == mlps * plain
    assert trainable(applied(AdapterPlus(size=m, **behind), kind)) == mlps * (plain + d)
    for n in (2, 4):
        assert trainable(applied(Compacter(n=n, size=m), kind)) == n**3 + parts * 3 * (d + m)
        assert trainable(applied(CompacterPlusPlus(n=n, reduction=d // m), kind)) == n**3 + mlps * 3 * (d + m)


def test_the_defaults_are_the_papers() -> None:
    configs = {method: method().make_config(tiny("llama")) for method in METHODS}
    assert {m.__name__: (c.size, c.reduction, c.activation, c.alpha, c.scaling) for m, c in configs.items()} == {
        "Houlsby": (None, 16, "swish", 1.0, "fixed"),
        "Pfeiffer": (None, 16, "relu", 1.0, "fixed"),
        "ParallelAdapter": (None, 2, "relu", 4.0, "fixed"),
        "ScaledParallelAdapter": (512, None, "relu", 4.0, "fixed"),
        "AdapterPlus": (None, 96, "gelu", 1.0, "channel"),
        "Compacter": (None, 32, "gelu", 1.0, "fixed"),
        "CompacterPlusPlus": (None, 32, "gelu", 1.0, "fixed"),
    }
    assert {m.__name__: (c.placement, c.reads) for m, c in configs.items()} == {
        "Houlsby": ("sequential", "output"),
        "Pfeiffer": ("stream", "stream"),
        "ParallelAdapter": ("parallel", "stream"),
        "ScaledParallelAdapter": ("parallel", "stream"),
        "AdapterPlus": ("stream", "stream"),
        "Compacter": ("sequential", "output"),
        "CompacterPlusPlus": ("sequential", "output"),
    }
    assert configs[AdapterPlus].drop_path == 0.1 and configs[Compacter].kronecker == 4


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "net"])
def test_training_moves_every_part_of_the_adapter_and_nothing_else(method: Any, kind: str) -> None:
    module = Classifier() if kind == "net" else Language(kind)
    before = base_weights(module)
    fit(module, method(size=4, backbone="net" if kind == "net" else None))
    after = {name: value for name, value in base_weights(module).items() if ".bottleneck" not in name}
    assert {name for name in moved(before, after) if not name.startswith("head.")} == set()
    assert after.keys() == before.keys()
    ups = [value for name, value in weights(module).items() if ".up." in name and not name.endswith("left")]
    assert ups and all(value.any() for value in ups)


def test_a_start_that_is_not_the_base_model_says_so() -> None:
    for init in ("lora", "mam"):
        assert set(Houlsby(init=init).exempt) == {"merge"}  # type: ignore[arg-type]
    for init in ("bert", "houlsby", "glorot"):
        assert set(Houlsby(init=init).exempt) == {"merge", "identity"}  # type: ignore[arg-type]
    assert "resume" in AdapterPlus().exempt and "resume" in Pfeiffer(dropout=0.1).exempt


# -- YAML -----------------------------------------------------------------------------------------------------------

RECIPES = {
    "houlsby": ("Houlsby", {"reduction": 16}),
    "pfeiffer": ("Pfeiffer", {"reduction": 16}),
    "parallel_adapter": ("ParallelAdapter", {"reduction": 16, "placement": "parallel"}),
    "scaled_parallel_adapter": ("ScaledParallelAdapter", {"size": 64, "alpha": 4.0}),
    "adapter_plus": ("AdapterPlus", {"reduction": 96, "scaling": "channel"}),
    "compacter": ("Compacter", {"kronecker": 4}),
    "compacter_plus_plus": ("CompacterPlusPlus", {"kronecker": 4}),
}


def from_yaml(value: Any) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    return parser.instantiate_classes(parser.parse_object({"callback": value})).callback


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_builds_the_callback(name: str) -> None:
    recipe = yaml.safe_load(Path(ROOT, "configs", f"{name}.yaml").read_text())
    callback = from_yaml(recipe["trainer"]["callbacks"][0])
    cls, options = RECIPES[name]
    assert type(callback).__name__ == cls and options.items() <= callback.options.items()


@pytest.mark.parametrize(("scaling", "expected"), [(2, (2.0, "fixed")), ("learned", (1.0, "learned"))])
def test_a_scaling_in_yaml_is_a_number_or_a_name(scaling: Any, expected: tuple[float, str]) -> None:
    given = {"class_path": "lightning_peft.callbacks.Pfeiffer", "init_args": {"size": 4, "scaling": scaling}}
    config: Any = from_yaml(given).make_config(tiny("llama"))
    assert (config.alpha, config.scaling) == expected


# -- wrong use ------------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    """A block whose experts are no matrices: only its router is one."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.Parameter(torch.zeros(3, 8, 8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(8, 8)),
            r"^Sequential has no block with (a|an attention or) feed-forward part: name the target_modules",
        ),
        (
            lambda: nn.ModuleDict({"blocks": nn.ModuleList([Expert(), Expert()])}),
            r"^blocks\.0\.router takes 8 features, but blocks\.0\.router gives 3, so they are not the ends of one part",
        ),
    ],
    ids=["no blocks", "experts"],
)
def test_a_backbone_without_such_parts_is_one_sentence(method: Any, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        method(size=4, backbone="model").apply(Around(model()))  # type: ignore[arg-type]
    assert one_sentence(str(error.value))


def test_the_adapter_stays_on_after_fit() -> None:
    module = Language("gpt2")
    fit(module, ParallelAdapter(size=4))
    assert adapters(module)["parallel"].enabled and not module.model.transformer.h[0].mlp.c_proj._noted.get()


def test_no_product_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^The number n of Kronecker products must be at least 1, got 0\.$"):
        Compacter(n=0)
