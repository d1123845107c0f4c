"""Singular-value tuning against numpy's decomposition, and that other singular vectors than the saved are noticed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from tuning import ROOT, one_sentence

from lightning_peft import load_adapter
from lightning_peft.backbone.quantization import Quantization, quantize
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.singular_values import SingularValuesConfig, decomposition
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig

INPUTS, OUTPUTS = 6, 4


def base(kind: str = "linear", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layer: Any = Conv1D(OUTPUTS, INPUTS) if kind == "conv1d" else nn.Linear(INPUTS, OUTPUTS)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model = nn.Sequential(layer).to(dtype)
    if kind == "nf4":
        quantize(model, Quantization("nf4"))
    return model


def put(model: nn.Module, name: str = "sv", seed: int | None = 1, **options: Any) -> Any:
    """The layer, with an adapter whose differences are drawn; zero without a seed."""
    part = stack_of(model).add(SingularValuesConfig(target_modules=["0"], **options), name)
    layer = next(part.injection.layers())
    if seed is not None:
        delta = layer.singular_deltas[name]
        delta.data = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed))
    return layer


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, INPUTS, generator=torch.Generator().manual_seed(2)).to(dtype)


def matrix(model: nn.Module) -> np.ndarray:
    """The weight `[outputs, inputs]` of the bare layer."""
    layer: Any = model[0]  # type: ignore[index]
    return (layer.weight if isinstance(layer, nn.Linear) else layer.weight.T).detach().double().numpy()


def output(weight: np.ndarray, model: nn.Module) -> Tensor:
    layer: Any = model[0]  # type: ignore[index]
    return x() @ torch.from_numpy(weight).float().T + layer.bias


# -- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(OUTPUTS))
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_difference_of_minus_sigma_removes_that_rank_one_part(kind: str, index: int) -> None:
    plain, model = base(kind), base(kind)
    u, sigma, vt = np.linalg.svd(matrix(plain), full_matrices=False)
    layer = put(model, seed=None)
    layer.singular_deltas["sv"].data[index] = -sigma[index]
    without = matrix(plain) - sigma[index] * np.outer(u[:, index], vt[index])
    torch.testing.assert_close(model(x()), output(without, plain), rtol=1e-5, atol=1e-5)
    assert np.linalg.matrix_rank(without, tol=1e-6) == OUTPUTS - 1


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("top", [None, 2, 99])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_computes_with_the_changed_singular_values(kind: str, top: int | None, nonnegative: bool) -> None:
    plain, model = base(kind), base(kind)
    layer = put(model, top=top, nonnegative=nonnegative, alpha=0.5)
    layer.singular_deltas["sv"].data *= -16  # so that some singular value would turn negative
    u, sigma, vt = np.linalg.svd(matrix(plain), full_matrices=False)
    delta = np.zeros(OUTPUTS)
    delta[:top] = layer.singular_deltas["sv"].detach().numpy()
    changed = np.maximum(sigma + delta, 0) if nonnegative else sigma + delta
    assert (changed != sigma + delta).any() == nonnegative
    expected = output(u @ np.diag(sigma + 0.5 * (changed - sigma)) @ vt, plain)
    torch.testing.assert_close(model(x()), expected, rtol=1e-5, atol=1e-5)
    assert layer.singular_deltas["sv"].shape == (min(top or OUTPUTS, OUTPUTS),)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("linear", torch.float32),
        ("linear", torch.bfloat16),
        ("linear", torch.float16),
        ("conv1d", torch.float32),
        ("conv1d", torch.bfloat16),
        ("nf4", torch.float32),
    ],
)
def test_untrained_it_is_the_base_bit_for_bit(kind: str, dtype: torch.dtype, nonnegative: bool) -> None:
    model = base(kind, dtype)
    expected = model(x(dtype))
    put(model, seed=None, nonnegative=nonnegative)
    assert torch.equal(model(x(dtype)), expected)


def test_gradients_are_those_of_the_formula() -> None:
    model = base()
    layer = put(model)
    delta = layer.singular_deltas["sv"]
    gradient = torch.autograd.grad(model(x()).square().sum(), delta)[0]
    u, _, vt = (torch.from_numpy(part).float() for part in np.linalg.svd(matrix(base()), full_matrices=False))
    y = model(x()).detach()
    expected = torch.stack([(2 * y * ((x() @ vt[i])[..., None] * u[:, i])).sum() for i in range(OUTPUTS)])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merged_it_computes_the_same_and_unmerging_gives_the_weight_back(kind: str, dtype: torch.dtype) -> None:
    model = base(kind, dtype)
    own = model[0].weight
    put(model)
    stack, expected = stack_of(model), model(x(dtype))
    stack.merge()
    assert not torch.equal(model[0].get_base_layer().weight, own)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(model(x(dtype)), expected, rtol=tolerance, atol=tolerance)
    stack.unmerge()
    assert model[0].get_base_layer().weight is own and torch.equal(model(x(dtype)), expected)


def test_two_adapters_share_the_vectors_and_add_up() -> None:
    model, plain = base(), base()
    layer = put(model, "one", 1)
    model(x())
    outputs = layer.basis().outputs
    put(model, "two", 2, top=3)
    both = model(x())
    assert torch.equal(layer.basis().outputs, outputs)
    u, sigma, vt = np.linalg.svd(matrix(plain), full_matrices=False)
    delta = layer.singular_deltas["one"].detach().numpy().copy()
    delta[:3] += layer.singular_deltas["two"].detach().numpy()
    torch.testing.assert_close(both, output(u @ np.diag(sigma + delta) @ vt, plain), rtol=1e-5, atol=1e-5)


def test_over_a_quantised_layer_the_vectors_are_those_of_the_weight_it_computes_with() -> None:
    model, plain = base("nf4"), base("nf4")
    layer = put(model, seed=None)
    weight = decomposition.base_weight(plain[0]).numpy()
    u, sigma, vt = np.linalg.svd(weight, full_matrices=False)
    layer.singular_deltas["sv"].data[0] = -float(sigma[0])
    change = x() @ torch.from_numpy(sigma[0] * np.outer(u[:, 0], vt[0])).T
    torch.testing.assert_close(model(x()), plain(x()) - change, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"^SingularValuesConfig cannot be merged into quantised weights"):
        stack_of(model).merge()


@pytest.mark.parametrize("first", ["lora", "deltas"])
@pytest.mark.parametrize("below", [True, False])
def test_the_vectors_are_the_bases_own_whatever_else_is_on_it_and_merged_first(first: str, below: bool) -> None:
    configs = {
        "lora": LoraConfig(target_modules=["0"], r=2, init_lora_weights=False),
        "deltas": WeightDeltasConfig(target_parameters=["0.weight"]),
    }
    model = base()
    for step in ("other", "sv") if below else ("sv", "other"):
        if step == "sv":
            layer = put(model)
        else:
            stack_of(model).add(configs[first], "other")
            for name, parameter in model.named_parameters():
                if "values" in name:
                    parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    stack = stack_of(model)
    copied = copy.deepcopy(model)
    stack.merge()  # before any call
    merged = model(x())
    assert torch.equal(layer.basis().sketches[OUTPUTS], decomposition.decompose(base()[0], [OUTPUTS]).sketches[OUTPUTS])
    torch.testing.assert_close(copied(x()), merged, rtol=1e-4, atol=1e-4)


def test_the_vectors_are_no_state_and_may_be_computed_in_inference_mode() -> None:
    model = base()
    layer = put(model)
    with torch.inference_mode():  # as in a check of validation before training
        model(x())
    model(x()).sum().backward()
    assert layer.singular_deltas["sv"].grad is not None
    assert {name for name, _ in layer.named_buffers()} == {"singular_sketches.sv"}
    again = copy.deepcopy(model)
    assert again[0].basis().outputs is layer.basis().outputs and torch.equal(again(x()), model(x()))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x()), model(x()))


# -- saved and loaded -----------------------------------------------------------------------------------------------

_AGAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
from peft import PeftModel
import lightning_peft
from torch import nn

torch.set_num_threads(int(sys.argv[2]))
held = load_file(sys.argv[1] + "/base.safetensors")
model = nn.Sequential(nn.Linear(48, 40))
model.load_state_dict({key: held[key] for key in ("0.weight", "0.bias")})
with torch.no_grad():
    y = PeftModel.from_pretrained(model, sys.argv[1])(held["x"])
save_file({"y": y}, sys.argv[1] + f"/y{sys.argv[2]}.safetensors")
"""


def test_a_fresh_process_computes_the_same_bit_for_bit_and_the_folder_holds_no_vectors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, inputs = nn.Sequential(nn.Linear(48, 40)), torch.randn(7, 48)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    model = get_peft_model(plain, SingularValuesConfig(target_modules=["0"]))
    layer: Any = model.base_model.model[0]
    layer.singular_deltas["default"].data.normal_()
    with torch.no_grad():
        expected = model(inputs)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == 40 + decomposition.SKETCH_SIZE
    save_file({**state, "x": inputs}, tmp_path / "base.safetensors")
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-W", "ignore", "-c", _AGAIN, str(tmp_path), threads]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300, capture_output=True)
    assert torch.equal(load_file(tmp_path / f"y{threads}.safetensors")["y"], expected)


def test_it_is_made_without_values_until_they_are_read(tmp_path: Path) -> None:
    model = get_peft_model(base(), SingularValuesConfig(target_modules=["0"]))
    layer: Any = model.base_model.model[0]
    layer.singular_deltas["default"].data.normal_()
    expected = model(x())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded(x()), expected)
    with torch.device("meta"):
        nothing = get_peft_model(nn.Sequential(nn.Linear(6, 4)), SingularValuesConfig(target_modules=["0"]))
    assert nothing(torch.empty(2, 6, device="meta")).shape == (2, 4)


def saved_on(model: nn.Module, folder: Path, called: bool = True) -> Tensor:
    """Save an adapter that was trained on a model, and return what it computed."""
    adapted = get_peft_model(model, SingularValuesConfig(target_modules=["0"]))
    layer: Any = adapted.base_model.model[0]
    layer.singular_deltas["default"].data = torch.tensor([0.4, -0.3, 0.2, -0.1])
    expected = adapted(x()).detach() if called else x()
    adapted.save_pretrained(folder)
    return expected


@pytest.mark.parametrize("other", ["weight", "precision"])
def test_on_a_base_with_other_singular_vectors_it_is_refused_in_one_sentence(other: str, tmp_path: Path) -> None:
    saved_on(base(), tmp_path)
    model = base()
    if other == "weight":
        model[0].weight.data[0, 0] += 0.01
    else:
        model = model.to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(model, tmp_path)
    call = x(model[0].get_base_layer().weight.dtype)  # type: ignore[operator]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^The singular vectors of 0 are not those that adapter 'default'"
        ) as error:
            loaded(call)
        assert one_sentence(str(error.value))
    with pytest.raises(ValueError, match=r"^The singular vectors"):
        loaded.merge_and_unload()


def test_tensors_that_are_loaded_after_a_call_are_compared_too(tmp_path: Path) -> None:
    saved_on(base(), tmp_path)
    other = base()
    other[0].weight.data[0, 0] += 0.01
    model = get_peft_model(other, SingularValuesConfig(target_modules=["0"]))
    model.eval()(x())
    model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match=r"^The singular vectors"):
        model.eval()(x())


def test_signs_may_be_others_but_not_the_vectors_of_equal_singular_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal() -> nn.Sequential:
        model = base()
        u, _, vt = torch.linalg.svd(model[0].weight.data, full_matrices=False)
        model[0].weight.data = u @ torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0])) @ vt
        return model

    expected, own = saved_on(equal(), tmp_path), decomposition.singular_vectors
    for turned in (False, True):

        def elsewhere(weight: Tensor, turned: bool = turned) -> tuple[Tensor, Tensor, Tensor]:
            """What another machine may compute: other signs; other vectors of the same space."""
            u, sigma, vt = (part.clone() for part in own(weight))
            u[:, 0], vt[0] = -u[:, 0], -vt[0]
            if turned:
                turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)
                u[:, 1:3], vt[1:3] = u[:, 1:3] @ turn, turn.T @ vt[1:3]
            torch.testing.assert_close(u @ torch.diag(sigma) @ vt, weight.double(), rtol=1e-5, atol=1e-5)
            return u, sigma, vt

        monkeypatch.setattr(decomposition, "singular_vectors", elsewhere)
        loaded = PeftModel.from_pretrained(equal(), tmp_path)
        if turned:
            with pytest.raises(ValueError, match=r"equal singular values, whose vectors each machine chooses"):
                loaded(x())
        else:
            assert torch.equal(loaded(x()), expected)


def test_the_number_of_threads_does_not_matter() -> None:
    torch.manual_seed(3)
    layer, threads = nn.Linear(150, 130), torch.get_num_threads()
    bases = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            bases.append(decomposition.decompose(layer, [130]))
    finally:
        torch.set_num_threads(threads)
    one, two = (b.matrix(torch.arange(130.0)) for b in bases)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-5)
    assert not decomposition.differ(bases[0].sketches[130], bases[1].sketches[130])


def test_an_adapter_that_was_never_called_is_saved_and_loaded_too(tmp_path: Path) -> None:
    saved_on(base(), tmp_path / "called")
    saved_on(base(), tmp_path / "not", called=False)
    models = [base(), base()]
    for model, folder in zip(models, ("called", "not"), strict=True):
        load_adapter(model, tmp_path / folder)
    assert torch.equal(models[0](x()), models[1](x()))


# -- wrong use ------------------------------------------------------------------------------------------------------


def test_what_has_no_singular_values_to_train_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 3))
    with pytest.raises(ValueError, match=r"^0 is a Conv1d, but SingularValues changes linear layers\.$"):
        stack_of(model).add(SingularValuesConfig(target_modules=["0"]), "sv")
    with pytest.raises(ValueError, match=r"^top must be at least 1, or None for all singular values, got 0\.$"):
        SingularValuesConfig(top=0)
    broken = base()
    broken[0].weight.data[0, 0] = torch.nan
    put(broken)
    with pytest.raises(ValueError, match=r"^A weight of 4 x 6 holds NaN or infinity, so it has no singular vectors\.$"):
        broken(x())
