"""Kinds of layers x options x methods: right, or refused in one sentence before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D
from tuning import one_sentence

from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.bottleneck import BottleneckConfig
from lightning_peft.tuners.ssb import SSBConfig
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

pytestmark = pytest.mark.filterwarnings("ignore")


class Subclass(nn.Linear):
    """A linear layer by another name."""


class Scaled(nn.Linear):
    """Its function is not that of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 0.5 * self.weight, self.bias)


class WithBias(nn.Linear):
    """Gives its bias apart, as Megatron's do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.bias


def conv(dimensions: int, **options: Any) -> nn.Module:
    made = {"kernel_size": 3, "padding": 1} | options
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](8, 8, **made)


def convolutions(dimensions: int, *names: str) -> dict[str, Callable[[], nn.Module]]:
    options: dict[str, dict[str, Any]] = {
        "": {},
        " strided": {"stride": 2, "padding": 0, "bias": False},
        " 1x1": {"kernel_size": 1, "padding": 0},
        " dilated": {"dilation": 2, "padding": 2},
        " dilated, same": {"dilation": 2, "padding": "same"},
        " circular": {"padding_mode": "circular"},
        " reflect": {"padding_mode": "reflect"},
        " groups": {"groups": 2},
        " depthwise": {"groups": 8},
    }
    chosen = {name: options[name] for name in names} or options
    return {f"Conv{dimensions}d{name}": lambda o=o: conv(dimensions, **o) for name, o in chosen.items()}


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(8, 8),
    "Linear without bias": lambda: nn.Linear(8, 8, bias=False),
    "Conv1D": lambda: Conv1D(8, 8),
    "NonDynamicallyQuantizableLinear": lambda: NonDynamicallyQuantizableLinear(8, 8),
    "subclass": lambda: Subclass(8, 8),
    "scaled subclass": lambda: Scaled(8, 8),
    "tuple subclass": lambda: WithBias(8, 8),
    "LazyLinear": lambda: nn.LazyLinear(8),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "weight_norm on Conv2d": lambda: parametrizations.weight_norm(conv(2)),
    "old weight_norm": lambda: weight_norm(nn.Linear(8, 8)),
    "old weight_norm on Conv1d": lambda: weight_norm(conv(1)),
    "old spectral_norm": lambda: spectral_norm(nn.Linear(8, 8)),
    **convolutions(1, "", " dilated, same"),
    **convolutions(2),
    **convolutions(3, " 1x1", " circular"),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 8, 2),
    "Embedding": lambda: nn.Embedding(20, 8),
    "Embedding max_norm": lambda: nn.Embedding(20, 8, max_norm=1.0),
    "Embedding padding_idx": lambda: nn.Embedding(20, 8, padding_idx=0),
    "Embedding sparse": lambda: nn.Embedding(20, 8, sparse=True),
    "Embedding scale_grad_by_freq": lambda: nn.Embedding(20, 8, scale_grad_by_freq=True),
    "EmbeddingBag": lambda: nn.EmbeddingBag(20, 8),
}
TARGET: dict[str, Any] = {"target_modules": ["layer"]}
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=2, **TARGET),
    "LoRA with bias": lambda: LoraConfig(r=2, lora_bias=True, **TARGET),
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, **TARGET),
    "IA3 out": lambda: IA3Config(feedforward_modules=[], **TARGET),
    "IA3 in": lambda: IA3Config(feedforward_modules=["layer"], **TARGET),
    "LoHa": lambda: LoHaConfig(r=2, **TARGET),
    "LoKr": lambda: LoKrConfig(r=2, **TARGET),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=4, **TARGET),
    "BOFT": lambda: BOFTConfig(boft_block_size=4, **TARGET),
    "SSB": lambda: SSBConfig(**TARGET),
    "bottleneck": lambda: BottleneckConfig(size=2, activation="linear", biases=False, **TARGET),
    "weight deltas": lambda: WeightDeltasConfig(target_parameters=r"layer\.(weight|bias)"),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(LAYERS[kind]()).eval()


def given(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if "Embedding" in kind:
        return torch.randint(0, 20, (3, 4), generator=generator)
    dimensions = next((d for d in (1, 2, 3) if f"{d}d" in kind), 0)
    return torch.randn(3, 8, *[7] * dimensions, generator=generator)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def refused(attempt: Callable[[], Any], text: str = "") -> bool:
    """Whether it is refused; anything but one sentence is an error."""
    try:
        attempt()
    except ValueError as error:
        assert one_sentence(str(error)) and text in str(error), error
        return True
    return False


@pytest.mark.parametrize("kind", LAYERS)
def test_a_method_on_a_layer_is_right_or_refused_in_one_sentence(kind: str) -> None:
    works = []
    for name, method in METHODS.items():
        model, x = net(kind), given(kind)
        stack = stack_of(model)
        if refused(lambda stack=stack, method=method: stack.add(method())):  # type: ignore[misc]
            continue
        model.eval()
        with torch.no_grad():
            expected = net(kind)(x)
            if isinstance(expected, tuple):  # what changes weights alone does not look at outputs
                continue
            assert close(model(x), expected, 1e-6), f"{name} begins as something else"
        model(x).square().sum().backward()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for value in stack.tensors(stack["default"]).values():
                if value.is_floating_point():
                    value.add_(0.3 * torch.randn(value.shape, generator=generator))
            adapted = model(x)
            assert not close(adapted, expected, 1e-3), f"{name} does nothing"
            with stack.disabled():
                assert torch.equal(model(x), expected), f"{name} is not off"
            if refused(stack.merge):
                assert torch.equal(model(x), adapted), f"{name} changed in a refused merge"
            else:
                assert close(model(x), adapted, 1e-5), f"{name} merged is something else"
                works.append(name)
            stack.unmerge()
            assert close(model(x), adapted, 1e-5)
    if kind in ("Linear", "Conv2d", "NonDynamicallyQuantizableLinear", "subclass"):
        assert {"LoRA", "LoRA with bias", "DoRA", "LoHa", "LoKr", "BOFT", "weight deltas"} <= set(works)


SAID = {
    ("Conv2d dilated", "LoRA"): "LoraConfig cannot adapt layer, Conv2d(8, 8, kernel_size=(3, 3)",
    ("Conv2d depthwise", "LoRA"): "groups=8 and rank 2",
    ("ConvTranspose1d", "LoRA"): "cannot be put on the backbone (layer)",
    ("Embedding sparse", "LoRA"): "sparse=True",
    ("Embedding max_norm", "LoRA"): "max_norm rewrites its weight",
    ("Embedding max_norm", "weight deltas"): "WeightDeltasConfig cannot adapt layer, Embedding(20, 8, max_norm=1.0)",
    ("tuple subclass", "LoRA"): "'tuple' object has no attribute 'dtype'",
    ("LazyLinear", "LoRA"): "layer.weight has no shape before the first call",
}


@pytest.mark.parametrize(("kind", "method"), SAID)
def test_what_peft_cannot_adapt_is_refused_before_anything_is_changed(kind: str, method: str) -> None:
    model = net(kind)
    assert refused(lambda: stack_of(model).add(METHODS[method]()), SAID[kind, method])
    assert type(model.layer) is type(net(kind).layer) and not stack_of(model).parts


MERGES = {
    "Conv2d circular": "merged it would compute something else",
    "Conv1d dilated, same": "merged it would compute something else",
    "Conv3d 1x1": "fails with",
    "Conv2d groups": "the method does not know how",
    "scaled subclass": "merged it would compute something else",
    "weight_norm": "parametrize.remove_parametrizations",
    "old spectral_norm": "remove_spectral_norm",
}


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge_that_would_change_a_layer_is_refused_with_its_reason(kind: str) -> None:
    model = net(kind)
    stack_of(model).add(LoraConfig(r=2, init_lora_weights=False, **TARGET))
    assert refused(stack_of(model).merge, MERGES[kind])


def test_a_layer_is_merged_once_its_weight_is_plain() -> None:
    from torch.nn.utils.parametrize import remove_parametrizations

    model, x = net("weight_norm"), given("weight_norm")
    remove_parametrizations(model.layer, "weight")
    stack_of(model).add(LoraConfig(r=2, init_lora_weights=False, **TARGET))
    adapted = model.eval()(x)
    stack_of(model).merge()
    assert close(model(x), adapted, 1e-5)


def test_a_bias_of_lora_has_no_place_in_a_layer_without_one() -> None:
    model = net("Linear without bias")
    stack_of(model).add(METHODS["LoRA with bias"]())
    assert refused(stack_of(model).merge, "the base layer has no bias")


def test_what_hangs_under_a_parametrized_layer_is_no_target(tmp_path: Any) -> None:
    """`target_modules=["0"]` matches `0.parametrizations.weight.0`; peft finds it, and cannot replace it."""
    from peft import PeftModel

    from lightning_peft import save_adapter

    def make() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 8)).eval()

    model, x = make(), given("Linear")
    stack_of(model).add(LoraConfig(r=2, target_modules=["0", "2"], exclude_modules=["2"], init_lora_weights=False))
    assert stack_of(model).parts[0].injection.places() == ["0"]
    save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    assert torch.equal(plain(x), model.eval()(x)) and not torch.equal(plain(x), make()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_the_float32_merge_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.to(dtype)
    stack_of(model).add(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    layer: Any = model[0]
    a, b = layer.lora_A["default"].weight.detach().float(), layer.lora_B["default"].weight.detach().float()
    expected = layer.base_layer.weight.detach().float() + layer.scaling["default"] * (b @ a)
    stack_of(model).merge()
    assert torch.equal(layer.base_layer.weight, expected.to(dtype)) and layer.base_layer.bias.dtype == dtype


def test_weights_beyond_half_precision_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).half()
    stack_of(model).add(LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    layer: Any = model[0]
    layer.lora_A["default"].weight.data.fill_(300.0)
    layer.lora_B["default"].weight.data.fill_(300.0)
    assert refused(stack_of(model).merge, "larger than float16 holds")
