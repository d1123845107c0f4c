"""LoRA-Dash against its authors' code, numpy and peft's LoRA; the switch to directions changes no output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from tuning import one_sentence

from lightning_peft.backbone.quantization import Quantization, quantize
from lightning_peft.stack.adapter_files.folder import AdapterError, read_folder
from lightning_peft.stack.adapter_files.saving import save_adapter
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.lora_dash import LoRADashConfig, LoRADashLayer
from lightning_peft.tuners.lora_dash.directions import choose_directions, task_directions

# of the authors' layer with the weights of `as_theirs` (Chongjie-Si/Subspace-Tuning 2c63d06, layers_LoRA-Dash.py): the
# directions it chose, and the first row of its output at the switch and with coefficients
THEIR_ORDER = [7, 2, 4, 3, 6, 8, 0, 1]
THEIR_COEFFICIENTS = [0.5, -0.25, 0.75, 1.0, -1.0, 0.125, 0.3, -0.6]
AT_THE_SWITCH = [0.097095, -0.780076, 0.121746, -2.642026, 0.871523, -3.992916, 0.259868, -1.443823, -0.245377]
WITH_COEFFICIENTS = [0.070918, 0.008914, 0.021171, -2.651252, 0.799245, -3.576648, -0.231124, -1.424642, 0.022302]


def wave(*shape: int, frequency: float = 1.0) -> Tensor:
    numbers = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(frequency * numbers**1.5).reshape(shape).float()


def as_theirs() -> tuple[nn.Sequential, Any]:
    """A layer of 12 inputs and 9 outputs with the low-rank part that the authors' was given, and its tuner layer."""
    model = nn.Sequential(nn.Linear(12, 9))
    model[0].weight.data, model[0].bias.data = wave(9, 12), wave(9, frequency=0.3)
    part = stack_of(model).add(LoRADashConfig(target_modules=["0"], r=2, lora_scale=2.0), "dash")
    layer = next(part.injection.layers())
    layer.dash_A["dash"].data, layer.dash_B["dash"].data = wave(2, 12, frequency=0.7), 0.1 * wave(9, 2, frequency=0.9)
    return model, layer


def adapted(kind: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A `PeftModel` whose B is drawn, as after a warm-up."""
    torch.manual_seed(seed)
    config = LoRADashConfig(**({"r": 2, "directions": 3} | options))
    model = get_peft_model(tiny(kind), config)
    for layer in layers(model):
        layer.dash_B["default"].data.normal_(std=0.3)
    return model


def layers(model: nn.Module) -> list[LoRADashLayer]:
    return [module for module in model.modules() if isinstance(module, LoRADashLayer)]


def tokens() -> Tensor:
    return torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model.eval()(tokens()).logits


# -- the directions -------------------------------------------------------------------------------------------------


def test_directions_and_outputs_are_the_authors() -> None:
    model, layer = as_theirs()
    x = wave(3, 12, frequency=1.3)
    before = model(x)
    torch.testing.assert_close(before[0], torch.tensor(AT_THE_SWITCH), rtol=1e-5, atol=2e-6)
    assert choose_directions(model, "dash") == 1
    assert torch.equal(model(x), before)
    u, _, vt = np.linalg.svd(wave(9, 12).double().numpy(), full_matrices=False)
    for i, theirs in enumerate(THEIR_ORDER):
        ours = torch.outer(layer.dash_outputs["dash"][:, i], layer.dash_inputs["dash"][i])
        torch.testing.assert_close(ours, torch.from_numpy(np.outer(u[:, theirs], vt[theirs])).float())
    layer.dash_coefficients["dash"].data = torch.tensor(THEIR_COEFFICIENTS)
    torch.testing.assert_close(model(x)[0], torch.tensor(WITH_COEFFICIENTS), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_the_chosen_directions_have_the_highest_change_rates(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, b, a = (torch.randn(size, generator=generator) for size in (shape, (shape[0], 2), (2, shape[1])))
    outputs, inputs = task_directions(weight, a, b, 3)
    u, sigma, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    change = b.double().numpy() @ a.double().numpy()
    rates = [abs(u[:, i] @ change @ vt[i]) / sigma[i] for i in range(len(sigma))]
    for i, largest in enumerate(sorted(range(len(rates)), key=lambda i: -rates[i])[:3]):
        rank_one = torch.outer(outputs[:, i], inputs[i])
        torch.testing.assert_close(rank_one, torch.from_numpy(np.outer(u[:, largest], vt[largest])))


def test_directions_in_which_the_weight_is_zero_come_last() -> None:
    weight = torch.diag(torch.tensor([5.0, 1.0, 0.0]))
    outputs, inputs = task_directions(weight, torch.eye(3), torch.eye(3), 3)
    rank_one = [torch.outer(outputs[:, i], inputs[i]).abs().diagonal().argmax().item() for i in range(3)]
    assert rank_one == [1, 0, 2]  # rates 1, 1/5, and none


# -- the switch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_switch_changes_no_output_bit_for_bit(kind: str) -> None:
    model = adapted(kind)
    before = run(model)
    assert choose_directions(model, "default") == len(layers(model))
    assert torch.equal(run(model), before)
    assert all(layer.dash_outputs["default"].norm(dim=0).allclose(torch.ones(3)) for layer in layers(model))


def test_before_the_switch_it_is_pefts_lora_and_coefficients_have_a_gradient_of_zero() -> None:
    ours, theirs = adapted(), get_peft_model(tiny("llama"), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    state = get_peft_model_state_dict(ours)
    theirs_state = {
        key.replace(".dash_", ".lora_") + ".weight": value for key, value in state.items() if key[-2:] in ("_A", "_B")
    }
    assert not set_peft_model_state_dict(theirs, theirs_state).unexpected_keys
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model(tokens(), labels=tokens()).loss.backward()
    gradients = {name.split(".lora_")[0]: p.grad for name, p in theirs.named_parameters() if "lora_A" in name}
    for name, module in ours.named_modules():
        if isinstance(module, LoRADashLayer):
            torch.testing.assert_close(module.dash_A["default"].grad, gradients[name], rtol=1e-4, atol=1e-6)
            coefficients: Any = module.dash_coefficients["default"].grad
            assert coefficients is not None and not coefficients.any()


def test_after_it_coefficients_have_the_gradient_of_the_formula() -> None:
    model, layer = as_theirs()
    choose_directions(model, "dash")
    x = wave(3, 12, frequency=1.3)
    gradient = torch.autograd.grad(model(x).square().sum(), layer.dash_coefficients["dash"])[0]
    u, v, y = layer.dash_outputs["dash"], layer.dash_inputs["dash"], model(x).detach()
    expected = torch.stack([(2 * y * torch.outer(x @ v[i], u[:, i])).sum() for i in range(8)])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


# -- as a plain LoRA, and saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("chosen", [True, False])
def test_it_is_a_plain_lora_of_its_rank_and_its_directions(scale: float, chosen: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    part = stack_of(model).add(LoRADashConfig(r=2, directions=3, lora_scale=1.5), "dash")
    for layer in layers(model):
        layer.dash_B["dash"].data.normal_(std=0.3)
    if chosen:
        choose_directions(model, "dash")
        for layer in layers(model):
            layer.dash_coefficients["dash"].data.normal_()
    stack_of(model).scale(scale)
    save_adapter(model, tmp_path)
    config, tensors, _ = read_folder(tmp_path)
    assert isinstance(config, LoRADashConfig)
    factors = config.lora_factors(tensors)
    assert len(factors) == len(part.injection.places())
    plain = get_peft_model(tiny("llama"), LoraConfig(r=5, lora_alpha=5, target_modules=part.injection.places()))
    state = {f"{name}.lora_A.weight": a for name, (a, _) in factors.items()}
    state |= {f"{name}.lora_B.weight": b for name, (_, b) in factors.items()}
    assert not set_peft_model_state_dict(plain, state).unexpected_keys
    torch.testing.assert_close(run(plain), run(model), rtol=1e-5, atol=1e-5)


def test_no_lora_holds_a_module_that_was_trained_whole(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["norm"])
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"norm.weight is no tensor of LoRA-Dash, and no LoRA can hold it") as error:
        LoRADashConfig.from_pretrained(tmp_path).lora_factors(load_file(tmp_path / "adapter_model.safetensors"))
    assert one_sentence(str(error.value))


@pytest.mark.parametrize("low", [False, True])
def test_a_folder_is_loaded_without_any_decomposition(
    low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    choose_directions(model, "default")
    for layer in layers(model):
        layer.dash_coefficients["default"].data.normal_()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("a decomposition"))
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merged_it_computes_the_same_and_unmerging_gives_the_weight_back(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 4) if kind == "linear" else Conv1D(4, 6))
    own, x = model[0].weight, torch.randn(3, 6)
    stack_of(model).add(LoRADashConfig(target_modules=["0"], r=2), "dash")
    assert model[0].dash_coefficients["dash"].shape == (4,)  # no more than the layer has
    model[0].dash_B["dash"].data.normal_()
    choose_directions(model, "dash")
    model[0].dash_coefficients["dash"].data.normal_()
    stack, expected = stack_of(model), model(x)
    stack.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    stack.unmerge()
    assert model[0].get_base_layer().weight is own and torch.equal(model(x), expected)


def test_on_quantised_weights_directions_are_of_what_they_compute_with_and_nothing_is_merged() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 4))
    quantize(model, Quantization("nf4"))
    x = torch.randn(2, 8)
    expected = model(x)
    stack_of(model).add(LoRADashConfig(target_modules=["0"], r=2), "dash")
    choose_directions(model, "dash")
    assert torch.equal(model(x), expected) and model[0].dash_outputs["dash"].any()
    with pytest.raises(ValueError, match=r"^LoRADashConfig cannot be merged into quantised weights"):
        stack_of(model).merge()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^0 is a Conv1d, but LoRADash changes linear layers\.$"):
        stack_of(nn.Sequential(nn.Conv1d(2, 2, 3))).add(LoRADashConfig(target_modules=["0"]), "dash")
    with pytest.raises(ValueError, match=r"^Sequential has no LoRA-Dash adapter 'dash'\.$"):
        choose_directions(nn.Sequential(), "dash")
    with pytest.raises(ValueError, match=r"^r and directions must be at least 1, got 8 and 0\.$"):
        LoRADashConfig(directions=0)
