"""LoRA as a callback: where it goes, how many parameters it has, and that every variant trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import nn
from tuning import QUIET, Classifier, Language, base_weights, classifier, fit, moved, one_sentence, points, weights

from lightning_peft import adapters
from lightning_peft.backbone.modules import base_modules, is_linear
from lightning_peft.callbacks import LoRA

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def trained(module: nn.Module) -> set[str]:
    """Names of the modules that LoRA is on, as the backbone calls them."""
    return {name.split(".lora_")[0] for name in weights(adapters(module).backbone) if ".lora_A." in name}


def applied(module: Any, **options: Any) -> Any:
    LoRA(**({"r": 2} | options)).apply(module)
    return module


# -- how many and where ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_number_of_parameters_is_r_times_inputs_plus_outputs(kind: str, r: int) -> None:
    targets = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[kind]
    module = applied(Language(kind), r=r, target_modules=targets)
    linear = [m for name, m in tiny(kind).named_modules() if is_linear(m) and name.rsplit(".", 1)[-1] in targets]
    assert len(linear) == 9
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == r * sum(
        sum(m.weight.shape) for m in linear
    )


def test_dora_has_a_magnitude_for_every_output_as_well() -> None:
    count = sum(
        p.numel() for p in applied(Classifier(), backbone="net", variant="dora").net.parameters() if p.requires_grad
    )
    assert count == 2 * (16 + 8) + 8 + 3 * (2 * (8 + 8) + 8)


def test_by_default_pefts_own_choice_or_every_linear_layer() -> None:
    blocks = range(3)
    assert trained(applied(Language("llama"))) == {
        f"model.layers.{i}.self_attn.{name}" for i in blocks for name in ("q_proj", "v_proj")
    }
    assert trained(applied(Classifier(), backbone="net")) == {"input", *(f"blocks.{i}.linear" for i in blocks)}


def test_unknown_architectures_are_adapted_in_every_linear_layer_but_the_output() -> None:
    module = Language("llama")
    module.model.config.model_type = "new"
    found = trained(applied(module))
    assert len(found) == 3 * 7 and "lm_head" not in found


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (lambda: Language("llama"), {}),
        (lambda: Language("gpt2"), {"target_modules": ["c_attn", "mlp.c_fc"]}),
        (lambda: Classifier(), {"backbone": "net"}),
        (lambda: Classifier(), {"backbone": "net.blocks"}),
        (lambda: Classifier(), {"backbone": "net", "target_modules": ["linear"]}),
    ],
    ids=["llama", "gpt2", "all linear layers", "blocks at the top", "by name"],
)
def test_layers_restricts_it_to_those_blocks(module: Any, options: dict[str, Any]) -> None:
    everywhere = trained(applied(module(), **options))
    some = trained(applied(module(), layers=[0, 2], **options))
    assert some == {name for name in everywhere if {"0", "2"} & set(name.split("."))}
    assert some and some < everywhere


def test_layers_that_do_not_exist_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^There is no block 7 to adapt: the blocks .* are 0, 1, 2\.$") as error:
        applied(Language(), layers=[1, 7])
    assert one_sentence(str(error.value))


def test_layers_of_a_model_without_numbered_blocks_are_one_sentence() -> None:
    module = Classifier()
    module.net = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"There is no block 0 to adapt: .* in no numbered list") as error:
        applied(module, backbone="net", layers=[0])
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("layers", [None, [1]])
def test_an_unknown_target_names_the_nearest(layers: list[int] | None) -> None:
    with pytest.raises(
        ValueError, match=r"^No module of the backbone is called 'q_prj'; the nearest names are q_proj"
    ) as error:
        applied(Language(), target_modules=["q_prj", "v_proj"], layers=layers)
    assert one_sentence(str(error.value))


def test_a_regular_expression_chooses_targets() -> None:
    module = applied(Language(), target_modules=r"model\.layers\.[01]\.self_attn\.q_proj")
    assert trained(module) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def test_the_names_of_modules_are_the_same_with_and_without_an_adapter() -> None:
    module = applied(Language())
    assert [name for name, _ in base_modules(module.model)] == [name for name, _ in tiny("llama").named_modules()]


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "net"])
def test_every_variant_trains_and_leaves_the_base_alone(kind: str, variant: str) -> None:
    module = Classifier() if kind == "net" else Language(kind)
    before = base_weights(module)
    fit(module, LoRA(r=2, variant=variant, backbone="net" if kind == "net" else None))
    assert {name for name in moved(before, base_weights(module)) if not name.startswith("head.")} == set()
    trained_tensors = [value for name, value in weights(module).items() if "lora_B" in name]
    assert trained_tensors and all(value.any() for value in trained_tensors)


@pytest.mark.parametrize(("variant", "scaling"), [("lora", 16 / 4), ("rslora", 16 / 2)])
def test_the_scaling_is_the_papers(variant: str, scaling: float) -> None:
    module = applied(classifier(), r=4, alpha=16, variant=variant, backbone="net")
    assert set(adapters(module)["lora"].scaling.values()) == {scaling}


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_acts_in_training_only(variant: str) -> None:
    module = classifier()
    fit(module, LoRA(r=2, dropout=0.5, variant=variant, backbone="net"))
    x = next(iter(points()))[0]
    assert not torch.equal(module.net(x), module.net(x))
    module.eval()
    assert torch.equal(module.net(x), module.net(x))


def test_biases_are_trained_where_asked() -> None:
    module = classifier()
    before = base_weights(module)
    fit(module, LoRA(r=2, bias="lora_only", backbone="net"))
    changed = {name for name in moved(before, base_weights(module)) if name.startswith("net.")}
    assert changed == {"net.input.bias", *(f"net.blocks.{i}.linear.bias" for i in range(3))}


def test_the_initialisation_is_passed_on() -> None:
    module = applied(classifier(), init="gaussian", backbone="net")
    assert adapters(module)["lora"].config.init_lora_weights == "gaussian"


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"^The rank r must be at least 1, got 0\.$"),
        ({"dropout": 1.0}, r"^dropout must be in \[0, 1\), got 1\.0\.$"),
        ({"variant": "qlora"}, r'^variant must be "lora", "rslora", "dora" or "alora", got \'qlora\'\.$'),
        ({"variant": "alora"}, r'^variant="alora" goes with invocation_tokens, and they with it\.$'),
        ({"invocation_tokens": [5]}, r'^variant="alora" goes with invocation_tokens, and they with it\.$'),
        ({"init": "corda"}, r"^init must be one of True, False, 'gaussian', .*, got 'corda'\.$"),
        ({"init": "eva", "init_batches": 0}, r"^init_batches must be at least 1, got 0\.$"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        LoRA(**options)
    assert one_sentence(str(error.value))


def test_a_backbone_without_linear_layers_is_one_sentence() -> None:
    module = classifier()
    module.net = nn.Sequential(nn.Embedding(3, 3))
    with pytest.raises(ValueError, match=r"^Sequential has no linear layer to adapt; name the target_modules\.$"):
        applied(module, backbone="net")
