"""Quantising in place: what is quantised, what it computes, and that it stays as it is."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from tuning import one_sentence, same, weights

from lightning_peft.backbone.fingerprint import fingerprint, mismatch
from lightning_peft.backbone.quantization import (
    Quantization,
    dequantize,
    is_quantized,
    quantize,
    quantized_layers,
    weight_bytes,
)
from lightning_peft.testing.architectures import ARCHITECTURES

TYPES = ("nf4", "fp4", "int8")


def layer(quant_type: str = "nf4", inputs: int = 512, outputs: int = 256, double_quant: bool = True) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    quantize(model, Quantization(quant_type, double_quant))  # type: ignore[arg-type]
    return model[0]


def weight(quantized: Any) -> Tensor:
    """The full weight, read without this package: what the layer makes of the unit vectors."""
    bias = torch.zeros(()) if quantized.bias is None else quantized.bias
    with torch.no_grad():
        return (quantized(torch.eye(quantized.in_features)) - bias).T


# -- what it is -----------------------------------------------------------------------------------------------------


def test_bits_of_a_weight_are_those_of_the_paper() -> None:
    shape = {"inputs": 1024, "outputs": 1024}
    tables = 4 * (16 + 256 + 1)  # NF4's 16 values; with double quantisation the 256 of the scales, and their mean
    assert weight_bytes(layer(double_quant=True, **shape)) - tables == 1024 * 1024 * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert weight_bytes(layer(double_quant=False, **shape)) - 4 * 16 == 1024 * 1024 * 4.5 / 8
    assert weight_bytes(layer("int8", **shape)) == 1024 * 1024 + 4 * 1024


def test_nf4_are_quantiles_of_a_normal_distribution_with_an_exact_zero() -> None:
    quantized = layer(double_quant=False)
    levels = quantized.weight.quant_state.code
    # Dettmers et al. 2023, section 3: quantiles of N(0, 1), eight above and seven below zero, scaled into [-1, 1]
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    expected = torch.cat([above, below, torch.zeros(1)]).sort().values
    assert torch.allclose(levels, expected / expected.max(), atol=1e-5)
    assert (levels == 0).sum() == 1
    blocks = weight(quantized).reshape(-1, 64)
    relative = blocks / blocks.abs().amax(1, keepdim=True)
    assert (relative[..., None] - levels).abs().amin(-1).max() < 1e-6


@pytest.mark.parametrize("quant_type", TYPES)
def test_what_is_quantised_already_is_not_changed_by_quantising_it(quant_type: str) -> None:
    first = layer(quant_type, double_quant=False)
    again = nn.Sequential(nn.Linear(512, 256))
    again[0].load_state_dict({"weight": weight(first), "bias": first.bias})
    quantize(again, Quantization(quant_type, double_quant=False))  # type: ignore[arg-type]
    torch.testing.assert_close(weight(again[0]), weight(first), rtol=1e-3, atol=1e-6)


def test_int8_is_within_half_a_step_of_the_weight() -> None:
    torch.manual_seed(0)
    full = nn.Linear(512, 256)
    step = full.weight.abs().amax(1, keepdim=True) / 127
    half = 0.5 + 127 * 2**-11  # bitsandbytes rounds to float16 first
    assert ((weight(layer("int8")) - full.weight).abs() <= half * step).all()


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("shape", [(5, 512), (2, 5, 512), (2, 3, 5, 512)])
def test_it_computes_with_its_weight_and_bias_in_any_shape(quant_type: str, shape: tuple[int, ...]) -> None:
    quantized = layer(quant_type)
    x = torch.randn(shape, requires_grad=True)
    y = quantized(x)
    expected = nn.functional.linear(x, weight(quantized), quantized.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant_type", TYPES)
def test_a_bias_can_be_trained(quant_type: str) -> None:
    quantized = layer(quant_type)
    quantized(torch.randn(2, 5, 512)).sum().backward()
    assert torch.equal(quantized.bias.grad, torch.full((256,), 10.0))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_compute_dtype_is_inside_only(compute_dtype: str) -> None:
    model = nn.Sequential(nn.Linear(512, 256))
    full = weights(model)
    quantize(model, Quantization(compute_dtype=compute_dtype))
    exact, x = copy.deepcopy(model), torch.randn(4, 512)
    exact[0].compute_dtype = None
    y = model(x)
    assert y.dtype == torch.float32 and model[0].bias.dtype == torch.float32
    assert torch.equal(model[0].bias, full["0.bias"])
    assert torch.equal(y, exact(x)) == (compute_dtype == "float32")
    assert torch.equal(y, y.bfloat16().float()) == (compute_dtype == "bfloat16")


def test_under_autocast_it_answers_as_a_linear_layer_would() -> None:
    quantized, x = layer(), torch.randn(4, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(x).dtype == nn.Linear(512, 256)(x).dtype == torch.bfloat16
    assert quantized(x).dtype == torch.float32  # the first precision it saw does not stay


@pytest.mark.parametrize("quant_type", TYPES)
def test_using_it_changes_nothing_of_it(quant_type: str) -> None:
    quantized = layer(quant_type, inputs=64, outputs=48)
    before, x = weights(quantized), torch.randn(3, 64)
    with torch.no_grad():
        outputs = [quantized.train(mode)(x) for mode in (False, True)]
        quantized(x.bfloat16())
        again = quantized.eval()(x)
    assert same(before, weights(quantized))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], again)


@pytest.mark.parametrize("quant_type", TYPES)
def test_its_state_can_be_copied_moved_and_loaded(quant_type: str) -> None:
    quantized, other, x = layer(quant_type), layer(quant_type), torch.randn(3, 512)
    with torch.no_grad():
        other.bias.zero_()
        expected = quantized(x)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(quantized.state_dict())
        assert torch.equal(other(x), expected)
        assert torch.equal(copy.deepcopy(quantized)(x), expected)
        assert torch.equal(nn.Sequential(quantized).to("cpu").float()(x), expected)


def test_another_weights_state_is_loaded_with_its_scales() -> None:
    model, x = nn.Sequential(nn.Linear(512, 256)), torch.randn(3, 512)
    quantize(model)
    quantized = layer()
    quantized.load_state_dict(model[0].state_dict())
    assert torch.equal(quantized(x), model(x))


# -- what is quantised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_architecture_is_quantised_and_put_back(kind: str) -> None:
    made, batch = ARCHITECTURES[kind], ARCHITECTURES[kind].batches[0]
    module, full = made.make_module().eval(), made.make_module().eval()
    names = quantize(module.backbone)
    assert names == [name for name, _ in quantized_layers(module.backbone)]
    with torch.no_grad():
        before = module(batch)
        distance = (before - full(batch)).abs().max() / before.abs().max()
        assert distance > 1e-4  # it is another function, if not by much
        assert dequantize(module.backbone) == names
        torch.testing.assert_close(module(batch), before, rtol=1e-5, atol=1e-5)
    assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
    assert not any(is_quantized(m) for m in module.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "convolutional"])
def test_quantising_again_does_nothing(kind: str) -> None:
    backbone = tiny(kind)
    names = quantize(backbone)
    layers, before = [m for _, m in quantized_layers(backbone)], weights(backbone)
    assert quantize(backbone) == names
    assert [m for _, m in quantized_layers(backbone)] == layers and same(before, weights(backbone))


@pytest.mark.parametrize(("kind", "left"), [("llama", {"lm_head"}), ("gpt2", {"lm_head"}), ("vit", {"classifier"})])
def test_heads_and_tied_weights_are_left(kind: str, left: set[str]) -> None:
    backbone = tiny(kind)
    quantize(backbone)
    assert {n for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and not is_quantized(m)} == left


def test_what_transformers_keeps_in_float32_is_left() -> None:
    names = quantize(tiny("t5"))
    assert names and not any(name.endswith(".wo") for name in names)


def test_a_weight_that_two_modules_share_is_left() -> None:
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10))
    model[2].weight = model[0].weight
    assert quantize(model) == ["1"]


def test_a_module_with_two_names_is_replaced_under_both() -> None:
    inner = nn.Linear(16, 16)
    model = nn.Sequential(inner, nn.ReLU(), nn.Sequential(inner))
    assert quantize(model) == ["0"]
    assert model[0] is model[2][0] and is_quantized(model[0])


def test_what_is_named_is_left_and_all_inside_it() -> None:
    backbone = tiny("llama")
    names = quantize(backbone, skip=["mlp", "layers.1"])
    assert names == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 2) for p in "qkvo"]


@pytest.mark.parametrize("grad", [True, False])
def test_pytorchs_own_encoder_computes_with_the_quantised_weights(grad: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 3, 64)
    full = encoder(x)
    assert quantize(encoder) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    with torch.set_grad_enabled(grad):
        distance = (encoder(x) - full).abs().max() / full.abs().max()
    assert 1e-4 < distance < 0.3


def test_shapes_alone_can_be_quantised() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 1024))
    quantize(model)
    assert math.isclose(weight_bytes(model), weight_bytes(layer(inputs=1024, outputs=1024)), rel_tol=1e-4)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_a_quantised_base_is_the_same_base(kind: str) -> None:
    full, quantized = ARCHITECTURES[kind].make_module().backbone, ARCHITECTURES[kind].make_module().backbone
    quantize(quantized)  # type: ignore[arg-type]
    a, b = fingerprint(full), fingerprint(quantized)  # type: ignore[arg-type]
    assert mismatch(a, b) is None and mismatch(b, a) is None


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "nf3"}, r'^quant_type must be "nf4", "fp4" or "int8", got \'nf3\'\.$'),
        ({"compute_dtype": "int8"}, r"^compute_dtype must be one of float32, bfloat16, float16, got 'int8'\.$"),
        ({"quant_type": "int8", "compute_dtype": "bfloat16"}, r"computes in integers: leave compute_dtype out\.$"),
        ({"threshold": -1.0}, r"^threshold must not be negative, got -1\.0\.$"),
        ({"threshold": float("nan")}, r"^threshold must not be negative, got nan\.$"),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Quantization(**options)
    assert one_sentence(str(error.value))


def test_a_name_to_skip_must_exist() -> None:
    with pytest.raises(ValueError, match=r"^No module .* called 'lm_haed'; the nearest names are lm_head") as error:
        quantize(tiny("llama"), skip=["lm_haed"])
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("other", [Quantization("fp4"), Quantization("int8"), Quantization(double_quant=False)])
def test_quantised_in_another_way_is_refused(other: Quantization) -> None:
    backbone = tiny("llama")
    quantize(backbone)
    before = weights(backbone)
    with pytest.raises(ValueError, match=r"q_proj is quantised already with .*, but .* is asked for\.$") as error:
        quantize(backbone, other)
    assert one_sentence(str(error.value)) and same(before, weights(backbone))


def test_nothing_to_quantise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Sequential has no linear layer to quantise\.$"):
        quantize(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_adapters_on_full_weights_are_in_the_way() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    backbone = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny("llama"))
    with pytest.raises(ValueError, match=r"already has adapters on its full weights") as error:
        quantize(backbone)
    assert one_sentence(str(error.value))


def test_an_input_cast_to_the_weights_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"was given torch\.uint8, .* name the layer in skip_modules\.$") as error:
        layer()(torch.zeros(2, 512, dtype=torch.uint8))
    assert one_sentence(str(error.value))


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lightning_peft.backbone.quantized_layers", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-peft\[quantization\]\.$") as error:
        quantize(nn.Sequential(nn.Linear(4, 4)))
    assert one_sentence(str(error.value))
