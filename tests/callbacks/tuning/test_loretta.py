"""LoRETTA's two forms as callbacks: how many they train, what adapters compute, and norms beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCABULARY, tiny
from torch import nn
from transformers import BertConfig, BertModel
from tuning import QUIET, Language, base_weights, fit, moved, one_sentence

from lightning_peft import adapters, load_adapter, save_adapter
from lightning_peft.backbone.targets import Layers
from lightning_peft.callbacks import Houlsby, LoRETTAAdp, LoRETTARep
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.bottleneck import BottleneckConfig, BottleneckLayer
from lightning_peft.tuners.bottleneck.branch import Bottleneck
from lightning_peft.tuners.tensor_train import TensorTrain

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
IDS = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


def applied(callback: Any, kind: str = "llama") -> Any:
    module = tiny(kind)
    callback.train_head = False
    callback.apply(module)
    return module


def trained(backbone: nn.Module) -> int:
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


def shake(backbone: nn.Module) -> None:
    """Make what is trained random."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def written_out(train: Any) -> np.ndarray:
    """The matrix `[inputs, outputs]` of a train, multiplied out from its last core to its first."""
    product = np.ones((1, 1))
    for core in reversed([core.detach().double().numpy() for core in train.cores]):
        product = np.stack([core[:, i] @ product for i in range(core.shape[1])], axis=1).reshape(core.shape[0], -1)
    inputs = int(np.prod(train.shape.inputs))
    return product.reshape(inputs, -1)


# -- how many -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    """BERT-base's blocks, two of its twelve."""
    return BertModel(BertConfig(num_hidden_layers=2, vocab_size=8, max_position_embeddings=8), add_pooling_layer=False)


@pytest.mark.parametrize(
    ("callback", "count"),
    [
        (LoRETTARep(), 2 * 2 * (580 + 580)),
        (LoRETTAAdp(), 2 * 2 * (780 + 64 + 780 + 768)),
        (LoRETTARep(train_norms=True), 2 * 2 * (580 + 580) + (1 + 2 * 2) * 2 * 768),
    ],
)
def test_on_berts_widths_it_trains_the_papers_numbers(bert: nn.Module, callback: Any, count: int) -> None:
    assert callback.trainable_parameters(bert) == count
    names = callback.make_configs(bert)
    assert list(names) == list(callback.names)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("norms", [False, True])
def test_the_formula_counts_what_is_trained(kind: str, norms: bool) -> None:
    for callback in (LoRETTARep(train_norms=norms), LoRETTAAdp(size=16, train_norms=norms)):
        expected = callback.trainable_parameters(tiny(kind))
        assert trained(applied(callback, kind)) == expected


# -- adapters of tensor trains --------------------------------------------------------------------------------------


def test_an_adapter_adds_up_of_relu_of_down() -> None:
    torch.manual_seed(1)
    branch = Bottleneck(32, 48, BottleneckConfig(target_modules=[""], size=16, tensor_rank=3, placement="parallel"))
    shake(branch)
    z = torch.randn(5, 32)
    down: Any = branch.down
    up: Any = branch.up
    hidden = np.maximum(z.double().numpy() @ written_out(down) + down.bias.detach().numpy(), 0)
    expected = hidden @ written_out(up) + up.bias.detach().numpy()
    np.testing.assert_allclose(branch(z).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_it_computes_what_houlsbys_adapters_of_those_matrices_do(kind: str) -> None:
    ours, theirs = applied(LoRETTAAdp(size=8, tensor_rank=3), kind), applied(Houlsby(size=8, activation="relu"), kind)
    bare = ours(input_ids=IDS).logits
    assert torch.equal(bare, tiny(kind)(input_ids=IDS).logits)  # it begins as nothing
    shake(ours)
    layers = [[m for m in model.modules() if isinstance(m, BottleneckLayer)] for model in (ours, theirs)]
    for own, other in zip(*layers, strict=True):
        mine: Any = own.bottleneck["loretta_adp"]
        plain: Any = other.bottleneck["houlsby"]
        for train, matrix in ((mine.down, plain.down), (mine.up, plain.up)):
            assert isinstance(train, TensorTrain)
            matrix.weight.data.copy_(torch.from_numpy(written_out(train).T))
            matrix.bias.data.copy_(train.bias.data)
    expected = theirs(input_ids=IDS).logits
    assert (ours(input_ids=IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - bare).abs().max() > 1e-2


def test_a_linear_one_without_biases_is_merged() -> None:
    model, x = nn.Sequential(nn.Linear(12, 6)), torch.randn(3, 12)
    plain: dict[str, Any] = {"activation": "linear", "biases": False, "size": 4}
    stack_of(model).add(BottleneckConfig(target_modules=["0"], tensor_rank=2, **plain), "a")
    shake(model)
    expected = model(x)
    stack_of(model).merge()
    torch.testing.assert_close(model[0].get_base_layer()(x), expected, atol=1e-5, rtol=1e-5)


def test_glorot_begins_as_the_authors_do_and_not_at_the_base() -> None:
    module = applied(LoRETTAAdp(size=8, init="glorot"))
    assert not torch.allclose(module(input_ids=IDS).logits, tiny("llama")(input_ids=IDS).logits)
    assert "identity" in LoRETTAAdp(init="glorot").exempt


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRETTARep(r=0), "The rank r must be at least 1, got 0"),
        (lambda: LoRETTARep(tensor_rank=0), "The rank tensor_rank must be at least 1, got 0"),
        (lambda: LoRETTARep(dropout=1.0), "dropout must be in"),
        (lambda: LoRETTAAdp(tensor_rank=0), "The rank tensor_rank must be at least 1, got 0"),
        (lambda: applied(LoRETTAAdp(init="bert")), "Tensor trains begin as lora, mam or glorot, not as bert"),
        (lambda: BottleneckConfig(kronecker=2, tensor_rank=2), "Kronecker products or a tensor train"),
        (lambda: BottleneckConfig(tensor_rank=-1), "tensor_rank must not be negative"),
        (lambda: LoRETTARep(train_norms=True).make_configs(without_norms()), "no norms to train"),
    ],
)
def test_what_cannot_be_is_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert one_sentence(str(error.value))


def without_norms() -> nn.Module:
    model = tiny("llama")
    for name, module in list(model.named_modules()):
        if "Norm" in type(module).__name__:
            model.set_submodule(name, nn.Identity())
    return model


# -- norms ----------------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_layers_where_these_are_chosen() -> None:
    module = applied(LoRETTARep(train_norms=True, layers=Layers(last=1)))
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert all(".layers.2." in name for name in names)
    assert sum("weight_deltas" in name for name in names) == 2


@pytest.mark.parametrize("method", [LoRETTARep, LoRETTAAdp])
def test_norms_are_trained_beside_it_and_saved_as_an_adapter_of_their_own(method: Any, tmp_path: Path) -> None:
    module = Language()
    before = base_weights(module)
    callback = method(train_norms=True)
    fit(module, callback)
    assert [part.name for part in adapters(module).parts] == [callback.name, f"{callback.name}-norms"]
    assert not moved(before, base_weights(module))
    logits = module.eval().model(input_ids=IDS).logits
    save_adapter(module, tmp_path)
    deltas = load_file(tmp_path / f"{callback.name}-norms" / "adapter_model.safetensors")
    assert len(deltas) == sum("norm" in name for name, _ in tiny("llama").named_parameters()) == 7
    assert all(delta.any() for delta in deltas.values())
    fresh = Language()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval().model(input_ids=IDS).logits, logits)
