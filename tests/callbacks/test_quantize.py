"""Adapters on a quantised base: wherever it is built, trained, saved, loaded on any base, and off to the bit."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from peft import IA3Config, LoraConfig
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from tiny_models import tiny
from torch import Tensor, nn
from tuning import (
    BUILT,
    QUIET,
    Classifier,
    Language,
    classifier,
    fit,
    moved,
    one_sentence,
    points,
    same,
    texts,
    trainer,
    weights,
)

from lightning_peft import adapters, load_adapter, load_from_checkpoint, save_adapter
from lightning_peft.backbone.quantization import dequantize, is_quantized, quantize, quantized_layers
from lightning_peft.callbacks import PEFT, SSB, BitFit, HeadOffsets, LoRA, LoRTA, Pfeiffer, QLoRA, Quantize
from lightning_peft.callbacks.quantize import check_strategy
from lightning_peft.fitting.checkpoints import AdapterCheckpointMixin
from lightning_peft.testing import LAWS, check_adaptation
from lightning_peft.testing.architectures import ARCHITECTURES

pytestmark = [
    pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:.*inspect_source", "ignore:.*is_gradient_check")
]

NET = ["input", *(f"blocks.{i}.linear" for i in range(3))]


def ia3() -> PEFT:
    return PEFT(IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), name="ia3")


METHODS: dict[str, Any] = {
    "LoRA": lambda: LoRA(r=2),
    "DoRA": lambda: LoRA(r=2, variant="dora"),
    "IA3": ia3,
    "HeadOffsets": lambda: HeadOffsets(),
    "SSB": lambda: SSB(),
    "LoRTA": lambda: LoRTA(r=2),
    "Pfeiffer": lambda: Pfeiffer(),
    "BitFit": lambda: BitFit(add_missing=True),
}


def logits(module: L.LightningModule) -> Tensor:
    with torch.no_grad():
        if isinstance(module, Language):
            return module.eval().model(input_ids=next(iter(texts()))[0]).logits
        return module.eval()(next(iter(points()))[0])


def quantized(kind: str = "llama", **options: Any) -> Language:
    module = Language(kind)
    Quantize(**options).apply(module)
    return module


def noisy(module: L.LightningModule) -> L.LightningModule:
    """Its adapters moved away from where they began."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return module


# -- before the adapter, once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("built", BUILT)
def test_it_is_quantised_before_the_adapter_wherever_it_is_built(built: str, quant_type: str) -> None:
    module, first = classifier(built), Quantize(quant_type, backbone="net")
    fit(module, first, LoRA(r=2, backbone="net"))
    assert first.quantized == NET
    wrapper = {"nf4": Linear4bit, "int8": Linear8bitLt}[quant_type]
    for name in NET:
        layer = module.net.get_submodule(name)
        assert isinstance(layer, wrapper) and is_quantized(layer.base_layer)
        assert type(layer.lora_A["lora"]) is nn.Linear
    assert type(module.head) is nn.Linear


def test_training_moves_nothing_of_the_quantised_base() -> None:
    module = classifier()
    Quantize(backbone="net").apply(module)
    before = weights(module)
    fit(module, Quantize(backbone="net"), LoRA(r=2, backbone="net"))
    adapters(module).remove("lora")
    assert moved(before, weights(module)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("built", BUILT)
def test_fit_twice_validate_and_test_quantise_once(built: str) -> None:
    module, callbacks = classifier(built), [Quantize(backbone="net"), LoRA(r=2, backbone="net")]
    fit(module, *callbacks)
    layers, before = [layer for _, layer in quantized_layers(module.net)], weights(module)
    made = trainer(*callbacks)
    made.validate(module, points(), verbose=False)
    made.test(module, points(), verbose=False)
    assert [layer for _, layer in quantized_layers(module.net)] == layers and same(before, weights(module))
    fit(module, *callbacks)
    assert [layer for _, layer in quantized_layers(module.net)] == layers
    assert not [name for name in moved(before, weights(module)) if "base_layer" in name]


def test_a_backbone_that_is_built_anew_is_quantised_anew() -> None:
    module = classifier("setup", again=True)
    for _ in range(2):
        fit(module, Quantize(backbone="net"), LoRA(r=2, backbone="net"))
        assert all(is_quantized(module.net.get_submodule(name).base_layer) for name in NET)


def test_the_adapted_backbone_may_be_around_the_quantised_one() -> None:
    module = classifier()
    fit(module, Quantize(backbone="net.blocks"), LoRA(r=2, backbone="net"))
    assert isinstance(module.net.blocks[0].linear, Linear4bit)
    assert not isinstance(module.net.input, Linear4bit)


# -- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_off_it_is_the_quantised_base_bit_for_bit(method: str, quant_type: str) -> None:
    module = quantized(quant_type=quant_type)
    expected = logits(module)
    fit(module, Quantize(quant_type), METHODS[method]())
    assert not torch.equal(logits(module), expected)
    with adapters(module).disabled():
        assert torch.equal(logits(module), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_is_loaded_on_the_quantised_and_on_the_full_base(method: str, tmp_path: Any) -> None:
    module = quantized()
    METHODS[method]().apply(module)
    noisy(module)
    save_adapter(module, tmp_path)
    for other in (quantized(), Language("llama")):
        load_adapter(other.model, tmp_path)
        loaded, made = adapters(other).tensors, adapters(module).tensors
        assert same(loaded(adapters(other).parts[0]), made(adapters(module).parts[0]))
        assert torch.equal(logits(other), logits(module)) == bool(list(quantized_layers(other.model)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_checkpoint_made_on_a_quantised_base_loads_on_any(kind: str, tmp_path: Any) -> None:
    module, path = Language(kind), tmp_path / "half.ckpt"
    fit(module, Quantize(), LoRA(r=2)).save_checkpoint(path)
    on_quantized, on_full = Language(kind), Language(kind)
    fit(on_quantized, Quantize(), LoRA(r=2), ckpt_path=path)
    fit(on_full, LoRA(r=2), ckpt_path=path)
    made = adapters(module).tensors(adapters(module).parts[0])
    for other in (on_quantized, on_full):
        assert same(adapters(other).tensors(adapters(other).parts[0]), made)
    assert torch.equal(logits(on_quantized), logits(module))
    again = load_from_checkpoint(Language, path)
    assert not list(quantized_layers(again.model))
    assert same(adapters(again).tensors(adapters(again).parts[0]), made)


def test_another_base_is_refused_quantised_or_not(tmp_path: Any) -> None:
    fit(Language("llama"), Quantize(), LoRA(r=2)).save_checkpoint(tmp_path / "half.ckpt")
    for callbacks in ([Quantize(), LoRA(r=2)], [LoRA(r=2)]):
        with pytest.raises(ValueError, match=r"another base model"):
            fit(Language("wide_llama"), *callbacks, ckpt_path=tmp_path / "half.ckpt")


def test_the_checkpoint_holds_nothing_of_the_base(tmp_path: Any) -> None:
    fit(Language("llama"), Quantize(), LoRA(r=2)).save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert state and all(".lora_" in name for name in state)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3", "SSB", "LoRTA"])
def test_it_is_merged_into_what_the_base_computes_with(method: str, tmp_path: Any) -> None:
    module = quantized()
    METHODS[method]().apply(module)
    noisy(module)
    expected, before = logits(module), weights(module)
    with pytest.raises(ValueError, match=r"cannot be merged into quantised weights.* and merge there\.$") as error:
        adapters(module).merge()
    assert one_sentence(str(error.value))
    assert torch.equal(logits(module), expected) and same(before, weights(module))
    save_adapter(module, tmp_path)
    full = quantized()
    dequantize(full.model)
    load_adapter(full.model, tmp_path)
    torch.testing.assert_close(logits(full), expected, rtol=1e-4, atol=1e-4)
    adapters(full).merge()
    torch.testing.assert_close(logits(full), expected, rtol=1e-4, atol=1e-4)


def test_what_becomes_a_bias_is_merged_into_a_quantised_base_and_taken_out_to_the_bit() -> None:
    module = quantized()
    HeadOffsets(positions="all").apply(module)
    noisy(module)
    expected = logits(module)
    adapters(module).merge()
    torch.testing.assert_close(logits(module), expected, rtol=1e-4, atol=1e-4)
    adapters(module).unmerge()
    assert torch.equal(logits(module), expected)


@pytest.mark.parametrize(("kind", "quant_type"), [("gpt2", "nf4"), ("llama", "int8"), ("convolutional", "nf4")])
def test_the_laws_hold_on_a_quantised_base(kind: str, quant_type: Any) -> None:
    made = ARCHITECTURES[kind]

    def make_module() -> L.LightningModule:
        module = made.make_module()
        Quantize(quant_type, backbone="backbone").apply(module)
        return module

    laws = [law for law in LAWS if law not in ("merge", "padding", "cache")]
    outcomes = check_adaptation(
        make_module, QLoRA(r=2, dropout=0, quant_type=quant_type, backbone="backbone"), made.batches, laws=laws
    )
    assert {o.law for o in outcomes if o.holds} >= {"identity", "frozen", "off", "round trip", "resume"}


# -- beside what else there is --------------------------------------------------------------------------------------


def test_an_average_of_the_weights_keeps_the_base_as_it_is(tmp_path: Any) -> None:
    module, path = Language("llama"), tmp_path / "half.ckpt"
    fit(module, Quantize(), LoRA(r=2), EMAWeightAveraging(decay=0.5)).save_checkpoint(path)
    pristine = quantized()
    adapters(module).remove("lora")
    assert same(weights(module), weights(pristine))
    fit(Language("llama"), Quantize(), LoRA(r=2), EMAWeightAveraging(decay=0.5), max_steps=4, ckpt_path=path)


class QuantizedInInit(AdapterCheckpointMixin, Language):
    def __init__(self, kind: str = "llama", quant_type: Any = "nf4") -> None:
        super().__init__(kind)
        Quantize(quant_type).apply(self)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_module_that_quantises_itself_is_loaded_by_lightnings_own_function(quant_type: str, tmp_path: Any) -> None:
    module, path = QuantizedInInit(quant_type=quant_type), tmp_path / "half.ckpt"
    fit(module, LoRA(r=2)).save_checkpoint(path)
    again = QuantizedInInit.load_from_checkpoint(path, kind="llama", quant_type=quant_type)
    assert torch.equal(logits(again), logits(module))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_half_precision_the_adapter_is_trained(precision: Any) -> None:
    module = Language("llama")
    fit(module, Quantize(), LoRA(r=2), precision=precision)
    trained = [value for name, value in weights(module).items() if ".lora_B." in name]
    assert trained and all(value.any() and value.isfinite().all() for value in trained)


def test_a_deep_copy_is_a_quantised_module_of_its_own() -> None:
    module = quantized()
    LoRA(r=2).apply(module)
    other = copy.deepcopy(module)
    noisy(module)
    assert torch.equal(logits(other), logits(quantized())) and not torch.equal(logits(other), logits(module))


# -- quantised by transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(path)
    return path


class Loaded(Language):
    def __init__(self, folder: Any, **options: Any) -> None:
        from transformers import BitsAndBytesConfig, LlamaForCausalLM

        L.LightningModule.__init__(self)
        self.model = LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(("options", "callback"), [(NF4, Quantize()), ({"load_in_8bit": True}, Quantize("int8"))])
def test_a_model_that_transformers_quantised_is_recognised(folder: Any, options: Any, callback: Quantize) -> None:
    module = Loaded(folder, **options)
    fit(module, callback, LoRA(r=2))
    assert len(callback.quantized) == 21
    with adapters(module).disabled():
        off = logits(module)
    ours = quantized(quant_type=callback.how.quant_type)
    torch.testing.assert_close(off, logits(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [NF4 | {"bnb_4bit_use_double_quant": False}, NF4 | {"bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}],
)
def test_a_model_that_transformers_quantised_in_another_way_is_refused(folder: Any, options: Any) -> None:
    with pytest.raises(ValueError, match=r"is quantised already with .*, but .* is asked for\.$") as error:
        fit(Loaded(folder, **options), Quantize(), LoRA(r=2))
    assert one_sentence(str(error.value))


# -- wrong use ------------------------------------------------------------------------------------------------------


def test_after_the_adapter_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^LoRA comes before Quantize and .*: put Quantize first") as error:
        fit(Language(), LoRA(r=2), Quantize())
    assert one_sentence(str(error.value))


def test_on_a_backbone_that_has_an_adapter_it_is_refused() -> None:
    module = Language()
    fit(module, LoRA(r=2))
    with pytest.raises(ValueError, match=r"already has adapters on its full weights: quantise it before") as error:
        fit(module, Quantize(), LoRA(r=2))
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharding_is_refused(strategy: Any) -> None:
    made = trainer()
    made.strategy.__class__ = strategy
    with pytest.raises(ValueError, match=rf"^{strategy.__name__} cannot shard weights quantised") as error:
        check_strategy(made)
    assert one_sentence(str(error.value))


def test_a_name_for_skip_modules_is_not_a_list_of_letters() -> None:
    with pytest.raises(ValueError, match=r"^skip_modules is a list of names, got 'head'\.$"):
        Quantize(skip_modules="head")


def test_without_a_backbone_yet_it_cannot_be_applied() -> None:
    with pytest.raises(ValueError, match=r"may not have built its backbone yet") as error:
        Quantize().apply(classifier("setup"))
    assert one_sentence(str(error.value))


def test_peft_alone_would_take_another_layer() -> None:
    """What the flag on the backbone is for: without it peft wraps packed bytes as if they were weights."""
    module = Classifier()
    quantize(module.net)
    module.is_loaded_in_4bit = module.net.is_loaded_in_4bit = False
    PEFT(LoraConfig(target_modules=["input"]), backbone="net").apply(module)
    assert not isinstance(module.net.input, Linear4bit)
