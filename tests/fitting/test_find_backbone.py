"""The backbone is found, wherever it is built, and what stands outside it is left to be trained."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from tiny_models import tiny
from torch import nn
from tuning import (
    BUILT,
    QUIET,
    Classifier,
    ConfiguredClassifier,
    Language,
    SetupClassifier,
    base_weights,
    classifier,
    fit,
    moved,
    one_sentence,
    points,
    same,
    trainer,
    weights,
)

from lightning_peft import adapters
from lightning_peft.callbacks import PEFT, LoRA
from lightning_peft.stack.stack import find_stacks

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


def lora_layers(module: nn.Module) -> int:
    from peft.tuners.lora import LoraLayer

    return sum(isinstance(m, LoraLayer) for m in module.modules())


@pytest.mark.parametrize("built", BUILT)
def test_the_backbone_is_injected_and_frozen_and_the_head_is_trained(built: str) -> None:
    module, callback = classifier(built), LoRA(r=2, backbone="net")
    fit(module, callback)
    untrained = base_weights(classifier("__init__"))
    after = weights(module)
    assert list(find_stacks(module)) == ["net"]
    assert moved(untrained, base_weights(module)) == {"head.weight", "head.bias"}
    trained = [value for name, value in after.items() if "lora_B" in name]
    assert len(trained) == 4 and all(value.any() for value in trained)
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        name for name in after if "lora_" in name or name.startswith("head.")
    }


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("built", BUILT)
def test_it_is_there_in_every_stage(built: str, stage: str) -> None:
    module = classifier(built)
    getattr(trainer(LoRA(r=2, backbone="net")), stage)(module, points())
    assert adapters(module)["lora"].config.r == 2


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_an_untrained_adapter_changes_no_result(stage: str) -> None:
    adapted = getattr(trainer(LoRA(r=2, backbone="net")), stage)(classifier(), points())
    plain = getattr(trainer(), stage)(classifier(), points())
    if stage == "predict":
        assert all(torch.equal(a, b) for a, b in zip(adapted, plain, strict=True))
    else:
        assert adapted == plain


@pytest.mark.parametrize("built", BUILT)
def test_a_second_fit_trains_the_same_adapter_on(built: str) -> None:
    module = classifier(built)
    fit(module, LoRA(r=2, backbone="net"))
    part, layers, before = adapters(module)["lora"], lora_layers(module), weights(module)
    assert layers == 4
    fit(module, LoRA(r=2, backbone="net"), max_steps=1)
    after = weights(module)
    assert adapters(module)["lora"] is part and lora_layers(module) == layers
    assert moved(before, after) == {name for name in before if "lora_" in name or name.startswith("head.")}
    # one step of AdamW from where it was: at most the learning rate and the decay away
    assert max((after[name] - before[name]).abs().max() for name in before) < 0.02


def test_a_second_fit_with_other_settings_says_what_differs() -> None:
    module = classifier()
    fit(module, LoRA(r=2, backbone="net"))
    with pytest.raises(ValueError, match="already has an adapter 'lora' with other settings: r: 2 != 4") as error:
        fit(module, LoRA(r=4, backbone="net"))
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("built", ["setup", "configure_model"])
def test_a_backbone_that_is_built_anew_gets_its_adapter_anew(built: str) -> None:
    module = classifier(built, again=True)
    fit(module, LoRA(r=2, backbone="net"))
    first = module.net
    fit(module, LoRA(r=2, backbone="net"))
    assert module.net is not first
    assert adapters(module).backbone is module.net
    assert moved(base_weights(classifier()), base_weights(module)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("built", BUILT)
def test_two_adapters_are_both_trained_wherever_the_backbone_is_built(built: str) -> None:
    from peft import IA3Config

    module = classifier(built)
    ia3 = PEFT(IA3Config(target_modules=["linear"], feedforward_modules=[]), backbone="net", name="ia3")
    fit(module, ia3, LoRA(r=2, backbone="net"))
    assert [part.name for part in adapters(module).parts] == ["ia3", "lora"]
    after = weights(module)
    assert all((value != 1).any() for name, value in after.items() if "ia3_l" in name)
    assert all(value.any() for name, value in after.items() if "lora_B" in name)


def test_an_earlier_adapter_is_frozen_where_its_callback_is_not_given() -> None:
    module = classifier()
    fit(module, LoRA(r=2, backbone="net", name="first"))
    before = weights(module)
    fit(module, LoRA(r=2, backbone="net", name="second"))
    assert moved({name: value for name, value in before.items() if ".first" in name}, weights(module)) == set()
    assert all(value.any() for name, value in weights(module).items() if "lora_B.second" in name)
    fit(module, LoRA(r=2, backbone="net", name="first"))
    assert any(".first" in name for name in moved(before, weights(module)))


def test_biases_are_trained_with_the_adapter_that_asks_for_them() -> None:
    module = classifier()
    first, second = (LoRA(r=2, bias=b, backbone="net", name=b) for b in ("lora_only", "none"))
    bias = "net.input.base_layer.bias"
    for callbacks, expected in (([first, second], True), ([second], False), ([first], True)):
        before = weights(module)
        fit(module, *callbacks)
        assert torch.equal(before.get(bias, before.get("net.input.bias")), weights(module)[bias]) is not expected


def test_an_adapter_that_was_merged_or_switched_off_acts_when_it_is_trained_on() -> None:
    module = classifier()
    fit(module, LoRA(r=2, backbone="net"))
    stack, before = adapters(module), weights(module)
    stack.merge()
    stack.enable(False)
    fit(module, LoRA(r=2, backbone="net"))
    assert stack["lora"].enabled
    assert {name for name in before if "lora_" in name} < moved(before, weights(module))


@pytest.mark.parametrize("built", ["setup", "configure_model"])
def test_a_head_made_first_is_not_mistaken_for_the_backbone(built: str) -> None:
    with pytest.raises(ValueError, match="cannot be told among 'head', 'net'") as error:
        fit(classifier(built), LoRA(r=2))
    assert one_sentence(str(error.value))


def test_a_transformers_model_made_after_the_head_is_found() -> None:
    class Late(Language):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.head = nn.Linear(4, 4)

        def configure_model(self) -> None:
            self.model = tiny("llama")

    module = Late()
    fit(module, LoRA(r=2))
    assert list(find_stacks(module)) == ["model"]
    assert module.head.weight.requires_grad


def test_the_one_transformers_model_is_the_backbone_however_deep() -> None:
    class Nested(Language):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.inner = nn.ModuleDict({"encoder": tiny("gpt2")})
            self.head = nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.inner["encoder"](input_ids=batch[0], labels=batch[0]).loss

    module = Nested()
    fit(module, LoRA(r=2))
    assert list(find_stacks(module)) == ["inner.encoder"]


def test_two_transformers_models_are_not_guessed_between() -> None:
    module = Language()
    module.teacher = tiny("llama")
    with pytest.raises(ValueError, match="cannot be told among 'model', 'teacher'"):
        fit(module, LoRA())


def test_an_only_child_is_the_backbone() -> None:
    module = Classifier()
    del module.head
    module.head = nn.Identity()  # type: ignore[assignment]
    fit(module, LoRA(r=2))
    assert list(find_stacks(module)) == ["net"]


def test_an_unknown_name_lists_the_children() -> None:
    with pytest.raises(
        ValueError, match=r"Classifier has no submodule 'encoder' with parameters; it has 'head', 'net'\."
    ) as error:
        fit(Classifier(), LoRA(backbone="encoder"))
    assert one_sentence(str(error.value))


def test_a_module_without_parameters_has_no_backbone() -> None:
    module = Classifier()
    del module.head, module.net
    with pytest.raises(ValueError, match="Classifier has no backbone to adapt") as error:
        fit(module, LoRA())
    assert one_sentence(str(error.value))


def test_a_backbone_may_be_a_part_of_a_child() -> None:
    module = Classifier()
    fit(module, LoRA(r=2, backbone="net.blocks"))
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {"net.conv.weight", "net.input.weight"} < trained
    assert "net.blocks.0.norm.weight" not in trained
    assert list(find_stacks(module)) == ["net.blocks"]


def test_a_failed_run_leaves_no_callback_behind() -> None:
    class Fails(ConfiguredClassifier):
        broken = True

        def setup(self, stage: str) -> None:
            if self.broken:
                raise RuntimeError("no data today")

    module = Fails("configure_model")
    with pytest.raises(RuntimeError, match="no data today"):
        fit(module, LoRA(r=2, backbone="net"))
    module.broken = False
    assert not {"setup", "configure_model"} & set(module.__dict__)
    fit(module, LoRA(r=4, backbone="net"))
    assert adapters(module)["lora"].config.r == 4


def test_the_hooks_are_the_modules_own_again_after_the_run() -> None:
    module = SetupClassifier("setup")
    fit(module, LoRA(r=2, backbone="net"))
    assert "setup" not in module.__dict__


@pytest.mark.parametrize("built", ["setup", "configure_model"])
def test_apply_by_hand_needs_the_backbone(built: str) -> None:
    module = classifier(built)
    with pytest.raises(ValueError, match="may not have built its backbone yet: build it, then apply"):
        LoRA(r=2).apply(module)
    assert not {"setup", "configure_model"} & set(module.__dict__)
    module._build(built)
    parts = LoRA(r=2, backbone="net").apply(module)
    assert len(parts) == 1 and adapters(module).parts == parts


def test_a_backbone_compiled_in_configure_model_is_not_injected_twice() -> None:
    class Compiled(Classifier):
        def configure_model(self) -> None:
            self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    module = Compiled()
    fit(module, LoRA(r=2, backbone="net"))
    assert lora_layers(module) == 4
    assert same(
        {k: v for k, v in base_weights(Classifier()).items() if k.startswith("net.")},
        {k.replace("_orig_mod.", ""): v for k, v in base_weights(module).items() if k.startswith("net.")},
    )
