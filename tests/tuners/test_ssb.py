"""SSB and SSL: what they compute, that they are IA3's equals, and that merging can be undone to the bit."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from tuning import Classifier, Language, one_sentence, same, texts, weights

from lightning_peft import adapters
from lightning_peft.backbone.linear_layers import linear_layers
from lightning_peft.backbone.modules import base_modules, is_linear
from lightning_peft.backbone.quantization import is_quantized, quantize
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks import PEFT, SSB, SSL, LoRA
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing import check_adaptation
from lightning_peft.testing.architectures import ARCHITECTURES
from lightning_peft.tuners.ssb import SSBConfig, SSBLayer

BASES = ("linear", "without bias", "conv1d", "nf4", "int8")


def base(kind: str = "linear", inputs: int = 6, outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    made = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=kind != "without bias")
    with torch.no_grad():
        made.weight.normal_()
        if made.bias is not None:
            made.bias.normal_()
    model = nn.Sequential(made)
    if kind in ("nf4", "int8"):
        from lightning_peft.backbone.quantization import Quantization

        quantize(model, Quantization(kind))  # type: ignore[arg-type]
    return model


def with_vectors(model: nn.Module, sides: str = "both", **options: Any) -> Any:
    """SSB on every linear layer, its vectors away from one."""
    targets = [name for name, m in model.named_modules() if is_linear(m)]
    part = stack_of(model).add(SSBConfig(target_modules=targets, sides=sides, **options), "ssb")
    generator = torch.Generator().manual_seed(4)
    for layer in part.tuner.model.modules():
        for vectors in (getattr(layer, "ssb_in", {}), getattr(layer, "ssb_out", {})):
            for vector in vectors.values():
                vector.data += 0.3 * torch.randn(vector.shape, generator=generator)
    return stack_of(model)


def plain(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | float]:
    """`W x` and `b` of the layer alone."""
    layer: Any = model[0].get_base_layer() if hasattr(model[0], "get_base_layer") else model[0]  # type: ignore[index]
    bias = 0.0 if layer.bias is None else layer.bias
    return layer(x) - bias, bias


# -- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("sides", ["both", "input", "output"])
def test_it_scales_the_weight_and_not_the_bias(kind: str, sides: str, shape: tuple[int, ...]) -> None:
    model, x = base(kind), torch.randn(shape)
    with_vectors(model, sides)
    layer: Any = model[0]
    v = layer.ssb_in["ssb"] if sides != "output" else torch.ones(6)
    u = layer.ssb_out["ssb"] if sides != "input" else torch.ones(4)
    product, bias = plain(model, x * v)
    torch.testing.assert_close(model(x), u * product + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    model, x = base(kind), torch.randn(5, 6, requires_grad=True)
    with_vectors(model)
    layer: Any = model[0]
    u, v = layer.ssb_out["ssb"], layer.ssb_in["ssb"]
    found = torch.autograd.grad(model(x).square().sum(), (u, v, x))
    product, bias = plain(model, x * v)
    expected = torch.autograd.grad((u * product + bias).square().sum(), (u, v, x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_ssl_is_ia3_with_every_module_a_feed_forward_one_bit_for_bit(kind: str) -> None:
    ours, theirs = tiny(kind), tiny(kind)
    targets = [name for name, m in ours.named_modules() if is_linear(m) and name != "lm_head"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        theirs = get_peft_model(theirs, IA3Config(target_modules=targets, feedforward_modules=targets))
    part = stack_of(ours).add(SSBConfig(target_modules=targets, sides="input"), "ssl")
    vectors = {key.removesuffix(".ssb_in"): v for key, v in part.tuner.model.state_dict().items() if ".ssb_in." in key}
    theirs_vectors = [p for n, p in theirs.named_parameters() if ".ia3_l." in n]
    assert len(vectors) == len(theirs_vectors) == len(targets)
    for ours_vector, theirs_vector in zip(vectors.values(), theirs_vectors, strict=True):
        assert ours_vector.numel() == theirs_vector.numel()
        values = 1 + 0.3 * torch.randn(ours_vector.shape)
        ours_vector.copy_(values)
        theirs_vector.data.copy_(values.view_as(theirs_vector))
    ids = next(iter(texts()))[0]
    a, b = ours(input_ids=ids, labels=ids), theirs(input_ids=ids, labels=ids)
    assert torch.equal(a.logits, b.logits)
    a.loss.backward()
    b.loss.backward()
    trained = [p for n, p in ours.named_parameters() if ".ssb_in." in n]
    for ours_vector, theirs_vector in zip(trained, theirs_vectors, strict=True):
        assert torch.equal(ours_vector.grad, theirs_vector.grad.flatten())


@pytest.mark.parametrize("kind", BASES)
def test_untrained_off_and_at_strength_zero_it_is_the_base_bit_for_bit(kind: str) -> None:
    model, x = base(kind), torch.randn(3, 6)
    expected = model(x)
    stack = stack_of(model)
    stack.add(SSBConfig(target_modules=["0"]), "new")
    assert torch.equal(model(x), expected)
    stack.remove("new")
    stack = with_vectors(model)
    assert not torch.allclose(model(x), expected)
    with stack.disabled():
        assert torch.equal(model(x), expected)
    stack.scale(0.0)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("strength", [-1.0, 0.5, 2.0])
def test_the_dial_goes_from_ones_to_the_vectors(strength: float) -> None:
    model, x = base(), torch.randn(3, 6)
    stack = with_vectors(model)
    layer: Any = model[0]
    u, v = (1 + strength * (vectors["ssb"] - 1) for vectors in (layer.ssb_out, layer.ssb_in))
    stack.scale(strength)
    product, bias = plain(model, x * v)
    torch.testing.assert_close(model(x), u * product + bias)
    stack.merge()
    torch.testing.assert_close(model(x), u * product + bias)


def test_two_adapters_multiply() -> None:
    model, x = base(), torch.randn(3, 6)
    stack = with_vectors(model)
    stack.add(SSBConfig(target_modules=["0"]), "second")
    layer: Any = model[0]
    layer.ssb_out["second"].data.fill_(3.0)
    product, bias = plain(model, x * layer.ssb_in["ssb"])
    torch.testing.assert_close(model(x), 3 * layer.ssb_out["ssb"] * product + bias)


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
@pytest.mark.parametrize("sides", ["both", "input", "output"])
def test_merged_it_computes_the_same_and_unmerging_gives_every_bit_back(kind: str, sides: str) -> None:
    model, x = base(kind), torch.randn(3, 6)
    own = model[0].weight
    stack = with_vectors(model, sides)
    before, expected = weights(model), model(x)
    stack.merge()
    assert not torch.equal(model[0].get_base_layer().weight, own)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(plain(model, x)[0] + plain(model, x)[1], expected)
    stack.unmerge()
    assert model[0].get_base_layer().weight is own and same(before, weights(model))
    assert torch.equal(model(x), expected)


def test_merging_leaves_a_weight_that_is_shared_alone_elsewhere() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    embedded = model["embed"].weight.detach().clone()
    part = stack_of(model).add(SSBConfig(target_modules=["head"]), "ssb")
    next(part.injection.layers()).ssb_out["ssb"].data.fill_(2.0)
    stack_of(model).merge()
    assert torch.equal(model["embed"].weight, embedded)
    stack_of(model).unmerge()
    assert model["head"].base_layer.weight is model["embed"].weight


@pytest.mark.parametrize("inner", ["LoRA", "IA3"])
def test_it_scales_what_other_adapters_made_of_the_layer(inner: str) -> None:
    model, x = base(), torch.randn(2, 3, 6)
    config = (
        LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
        if inner == "LoRA"
        else IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    )
    stack = stack_of(model)
    stack.add(config, "inner")
    bias = model(torch.zeros(1, 1, 6)).flatten()  # IA3 scales the bias as well
    part = stack.add(SSBConfig(target_modules=["0"]), "ssb")
    layer: Any = next(part.injection.layers())
    layer.ssb_out["ssb"].data.normal_()
    layer.ssb_in["ssb"].data.normal_()
    u, v = layer.ssb_out["ssb"], layer.ssb_in["ssb"]
    expected = u * (layer.base_layer(x * v) - bias) + bias
    torch.testing.assert_close(model(x), expected)
    stack.merge()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_into_quantised_weights_it_is_not_merged(kind: str) -> None:
    model, x = base(kind), torch.randn(3, 6)
    stack = with_vectors(model)
    expected, before = model(x), weights(model)
    with pytest.raises(ValueError, match=r"^SSBConfig cannot be merged into quantised weights") as error:
        stack.merge()
    assert one_sentence(str(error.value))
    assert torch.equal(model(x), expected) and same(before, weights(model))


def test_vectors_that_are_not_finite_are_not_merged() -> None:
    model = base()
    stack = with_vectors(model)
    model[0].ssb_out["ssb"].data[0] = torch.nan
    # peft's words, which callers know
    with pytest.raises(ValueError, match=r"^NaNs detected in the merged weights\. The adapter ssb seems to be broken"):
        stack.merge()
    assert not model[0].merged


# -- as a method of peft and as a callback --------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_without_targets_and_for_all_linear_the_layers_of_the_blocks_are_scaled(kind: str, targets: str | None) -> None:
    model = get_peft_model(tiny(kind), SSBConfig(target_modules=targets))
    scaled = {name for name, module in model.get_base_model().named_modules() if isinstance(module, SSBLayer)}
    assert scaled == set(linear_layers(tiny(kind)))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ("q_proj", "v_proj"), {"v_proj", "q_proj"}])
def test_targets_are_given_in_any_form_and_saved_in_one(targets: Any, tmp_path: Any) -> None:
    config = SSBConfig(target_modules=targets, layers_to_transform=[1])
    model = get_peft_model(tiny("llama"), config)
    scaled = [name for name, module in model.get_base_model().named_modules() if isinstance(module, SSBLayer)]
    assert scaled == [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")]
    model.save_pretrained(tmp_path)
    assert SSBConfig.from_pretrained(tmp_path).target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_vectors_have_the_precision_that_peft_asks_for(dtype: torch.dtype, autocast: bool) -> None:
    config = SSBConfig(target_modules=["0"])
    model = get_peft_model(base().to(dtype), config, autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


def test_it_is_made_without_values_until_they_are_read(tmp_path: Any) -> None:
    model = get_peft_model(base(), SSBConfig(target_modules=["0"]))
    model.base_model.model[0].ssb_out["default"].data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))


def test_peft_saves_and_loads_it(tmp_path: Any) -> None:
    model = get_peft_model(tiny("llama"), SSBConfig(target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if ".ssb_" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    ids = next(iter(texts()))[0]
    assert torch.equal(PeftModel.from_pretrained(tiny("llama"), tmp_path)(ids).logits, model(ids).logits)
    merged = model.merge_and_unload()
    assert not any(".ssb_" in name for name in merged.state_dict())


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
@pytest.mark.parametrize("callback", [SSB, SSL])
def test_by_default_every_linear_layer_of_the_blocks(kind: str, callback: type[SSB]) -> None:
    module = ARCHITECTURES[kind].make_module()
    callback(backbone="backbone", train_head=False).apply(module)
    stack = adapters(module)
    heads = {"bert": {"cls.predictions.transform.dense", "cls.predictions.decoder"}, "vit": {"classifier"}}
    outside = {"convolutional": {"input"}, "hand_written": {"out"}, **heads}.get(kind, {"lm_head"})
    linear = {name: matrix_shape(m) for name, m in base_modules(stack.backbone) if is_linear(m)}
    assert set(stack.parts[0].injection.places()) == linear.keys() - outside
    count = sum(i + (o if callback is SSB else 0) for n, (i, o) in linear.items() if n not in outside)
    assert sum(p.numel() for p in stack.backbone.parameters() if p.requires_grad) == count


def test_layers_and_parts_can_be_chosen() -> None:
    module = Language("llama")
    SSB(layers=Layers(last=1), within="attention").apply(module)
    places = adapters(module).parts[0].injection.places()
    assert places == [f"model.layers.2.self_attn.{p}_proj" for p in "qkvo"]


def test_without_blocks_every_linear_layer() -> None:
    module = Classifier()
    module.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    SSB(backbone="net").apply(module)
    assert adapters(module).parts[0].injection.places() == ["0", "2"]


class Encoder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2)


def test_the_projection_that_pytorchs_attention_never_calls_is_left_out() -> None:
    module = Encoder()
    SSB().apply(module)
    assert adapters(module).parts[0].injection.places() == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    with pytest.raises(ValueError, match=r"out_proj is never called, since nn\.MultiheadAttention") as error:
        SSB(target_modules=["out_proj"]).apply(Encoder())
    assert one_sentence(str(error.value))


def test_it_goes_with_lora_in_either_order() -> None:
    for callbacks in ((LoRA(r=2), SSB()), (SSB(), LoRA(r=2))):
        module = Language("llama")
        for callback in callbacks:
            callback.apply(module)
        ids = next(iter(texts()))[0]
        assert torch.equal(module.model(ids).logits, tiny("llama")(ids).logits)
        assert [part.name for part in adapters(module).parts] == [callback.name for callback in callbacks]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "convolutional"])
@pytest.mark.parametrize("callback", [SSB, SSL])
def test_the_laws_hold(kind: str, callback: type[SSB]) -> None:
    made = ARCHITECTURES[kind]
    outcomes = check_adaptation(made.make_module, callback(backbone="backbone"), made.batches)
    assert {o.law for o in outcomes if o.holds} >= {"identity", "frozen", "off", "merge", "round trip", "resume"}


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["conv"]}, r"^conv is a Conv1d, but SSB scales linear layers\.$"),
        ({"target_modules": []}, r"^\w+ has no linear layers that SSB could scale, or target_modules is empty: name"),
        ({"target_modules": ["input"], "sides": "left"}, r"^sides must be one of both, input, output, got 'left'\.$"),
    ],
)
def test_what_cannot_be_scaled_is_refused(options: dict[str, Any], message: str) -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=message) as error:
        PEFT(SSBConfig(**options), backbone="net").apply(module)
    assert one_sentence(str(error.value))
    assert not any("ssb" in name for name in module.state_dict())


def test_on_a_quantised_base_the_layers_stay_quantised() -> None:
    module = Language("llama")
    quantize(module.model)
    SSB().apply(module)
    part = adapters(module).parts[0]
    assert all(is_quantized(layer.get_base_layer()) for layer in part.injection.layers())
