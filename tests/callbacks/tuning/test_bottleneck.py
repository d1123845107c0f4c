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

from lightning_peft import adapters
from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.parts import part_ends
from lightning_peft.backbone.structure import blocks
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks import (
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
    config: Any = ParallelAdapter(size=4).make_config(rough(kind))
    assert config.inputs == mlp and config.placement == "parallel"


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
def test_a_parallel_adapter_reads_what_its_part_is_given(kind: str, tokens: Tensor) -> None:
    backbone = applied(ScaledParallelAdapter(size=4, init="bert"), kind)
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


# -- how many -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_parameters_is_the_closed_formula(kind: str) -> None:
    d = 8 if kind == "convolutional" else 32
    every = blocks(rough(kind))
    mlps = len(every)
    parts = mlps + sum(len(block.attention) for block in every)
    m, plain = 4, 2 * d * 4 + 4 + d
    assert trainable(applied(Houlsby(size=m), kind)) == parts * plain
    assert trainable(applied(Pfeiffer(size=m), kind)) == mlps * plain
    assert trainable(applied(Pfeiffer(reduction=d // m, scaling="learned"), kind)) == mlps * (plain + 1)
    assert trainable(applied(ParallelAdapter(reduction=d // m), kind)) == mlps * plain
    assert trainable(applied(ScaledParallelAdapter(size=m), kind)) == mlps * plain
    assert trainable(applied(AdapterPlus(size=m), kind)) == mlps * (plain + d)
    for n in (2, 4):
        assert trainable(applied(Compacter(n=n, size=m), kind)) == n**3 + parts * 3 * (d + m)
        assert trainable(applied(CompacterPlusPlus(n=n, reduction=d // m), kind)) == n**3 + mlps * 3 * (d + m)


def test_the_defaults_are_the_papers() -> None:
    configs = {method: method().make_config(tiny("llama")) for method in METHODS}
    assert {m.__name__: (c.size, c.reduction, c.activation, c.alpha, c.scaling) for m, c in configs.items()} == {
        "Houlsby": (None, 16, "swish", 1.0, "fixed"),
        "Pfeiffer": (None, 16, "relu", 1.0, "fixed"),
        "ParallelAdapter": (None, 2, "relu", 1.0, "fixed"),
        "ScaledParallelAdapter": (512, None, "relu", 4.0, "fixed"),
        "AdapterPlus": (None, 96, "gelu", 1.0, "channel"),
        "Compacter": (None, 32, "gelu", 1.0, "fixed"),
        "CompacterPlusPlus": (None, 32, "gelu", 1.0, "fixed"),
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
