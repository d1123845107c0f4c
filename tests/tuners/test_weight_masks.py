"""Weight masks: what they compute, their straight-through gradients, and that a folder has one bit for each weight."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from tuning import one_sentence, python

from lightning_peft import load_adapter, save_adapter
from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.quantization import Quantization, quantize
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import AdapterStack, stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
from lightning_peft.tuners.weight_deltas.masks import keep_largest
from lightning_peft.tuners.weight_masks import WeightMasksConfig
from lightning_peft.tuners.weight_masks.largest import largest

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*tie_word_embeddings", "ignore:Adapter .* was")
]

BASES = ("linear", "without bias", "conv1d", "hooked", "nf4", "int8")
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(7))


def base(kind: str = "linear", inputs: int = 6, outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    made = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=kind != "without bias")
    with torch.no_grad():
        made.weight.normal_()
        if made.bias is not None:
            made.bias.normal_()
    if kind == "hooked":
        made.register_forward_hook(lambda module, inputs, output: 2 * output)
    model = nn.Sequential(made)
    if kind in ("nf4", "int8"):
        quantize(model, Quantization(kind))  # type: ignore[arg-type]
    return model


def weight_of(model: nn.Module) -> tuple[Tensor, Tensor | float]:
    """What the layer multiplies with, `[outputs, inputs]`, by calling it, and its bias."""
    layer: Any = model[0].get_base_layer() if hasattr(model[0], "get_base_layer") else model[0]  # type: ignore[index]
    bias = 0.0 if layer.bias is None else layer.bias.detach()
    return (layer(torch.eye(6)) - layer(torch.zeros(1, 6))).T.detach(), bias


def masked(model: nn.Module, name: str = "mask", seed: int = 4, **options: Any) -> AdapterStack:
    """Masks of random scores on every linear layer that the options do not leave out."""
    targets = [n for n, m in model.named_modules() if is_linear(m)]
    part = stack_of(model).add(WeightMasksConfig(**{"target_modules": targets, "density": 0.5} | options), name)
    generator = torch.Generator().manual_seed(seed)
    for layer in part.injection.layers():
        scores = layer.weight_mask_scores[name]
        scores.data.copy_(torch.randn(scores.shape, generator=generator))
    return stack_of(model)


def scores_of(model: nn.Module, name: str = "mask") -> nn.Parameter:
    layer: Any = model[0]  # type: ignore[index]
    return layer.weight_mask_scores[name]


def mask_of(model: nn.Module, name: str = "mask") -> Tensor:
    """The mask, by its definition: the half of the largest scores."""
    flat = scores_of(model, name).detach().flatten()
    kept = sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))[: len(flat) // 2]
    return torch.zeros(len(flat)).index_fill(0, torch.tensor(kept), 1.0).reshape(4, 6)


# -- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("kind", BASES)
def test_outputs_and_gradients_are_those_of_a_dense_reference(kind: str, alpha: float) -> None:
    model, weight = base(kind), weight_of(base(kind))[0]
    bias, factor = weight_of(base(kind))[1], 2.0 if kind == "hooked" else 1.0
    masked(model, alpha=alpha)
    x, times = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 4)
    y = model(x)
    (y * times).sum().backward()
    mine, to_x = scores_of(model).grad, x.grad
    dense = mask_of(model).requires_grad_()  # straight-through: the gradient of the mask is the score's
    reference = x.detach().requires_grad_()
    # what a hook makes of the layer's own output it makes of that alone, and not of what masking changes
    change = (weight / factor) * (alpha * (dense - 1)) if factor != 1 else weight * (alpha * (dense - 1))
    expected = reference @ (weight + change).T + factor * bias
    (expected * times).sum().backward()
    tolerance = 0.05 if kind == "int8" else 1e-5  # whose inputs are rounded as well
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=10 * tolerance if kind == "int8" else tolerance)
    torch.testing.assert_close(mine, dense.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(to_x, reference.grad, rtol=tolerance, atol=10 * tolerance)


def test_two_masks_intersect_and_each_gets_its_gradient_through_the_other() -> None:
    model, (weight, bias) = base(), weight_of(base())
    masked(model, "one", seed=1, alpha=0.5)
    stack = masked(model, "two", seed=2, target_modules=["0"])
    one, two = mask_of(model, "one").requires_grad_(), mask_of(model, "two").requires_grad_()
    x, times = torch.randn(5, 6), torch.randn(5, 4)
    expected = x @ (weight * (1 - 0.5 * (1 - one)) * two).T + bias
    (expected * times).sum().backward()
    for parameter in (scores_of(model, "one"), scores_of(model, "two")):
        parameter.requires_grad_()
    (model(x) * times).sum().backward()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(scores_of(model, "one").grad, one.grad)
    torch.testing.assert_close(scores_of(model, "two").grad, two.grad)
    before = base()(x)
    stack.scale(0.0)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", BASES)
def test_a_mask_that_keeps_everything_and_one_that_is_off_leave_the_layer_bit_for_bit(kind: str) -> None:
    model, x = base(kind), torch.randn(3, 6)
    expected = model(x)
    stack = masked(model, density=1.0)
    assert torch.equal(model(x), expected)
    model[0].keep_at_most("mask", 0.5)  # type: ignore[operator]
    assert not torch.equal(model(x), expected)
    with stack.disabled():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("below", ["lora", "deltas"])
def test_an_adapter_below_is_trained_beside_the_mask_and_merged_with_it(below: str) -> None:
    model, weight = base(), weight_of(base())[0]
    if below == "lora":
        part = stack_of(model).add(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "below")
    else:
        part = stack_of(model).add(WeightDeltasConfig(target_parameters=["0.weight"]), "below")
        next(part.injection.layers()).values["below"]["weight"].data.normal_()
    stack = masked(model, target_modules=["0"])
    stack.train(["below", "mask"])
    x = torch.randn(5, 6)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    expected = model(x)
    # LoRA adds to the masked weight; a delta is part of the weight that is masked
    layer: Any = next(part.injection.layers())
    delta = layer.get_delta_weight("below") if below == "lora" else layer.values["below"]["weight"]
    mask = mask_of(model)
    dense = weight * mask + delta if below == "lora" else (weight + delta) * mask
    torch.testing.assert_close(expected, x @ dense.T + weight_of(base())[1])
    stack.merge()
    torch.testing.assert_close(model(x), expected)
    stack.unmerge()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
def test_merged_it_computes_the_same_and_unmerged_the_weight_is_back_bit_for_bit(kind: str) -> None:
    model, x = base(kind), torch.randn(3, 6)
    stack = masked(model)
    layer: Any = model[0]
    expected, before = model(x), layer.base_layer.weight.detach().clone()
    stack.merge()
    weight = layer.base_layer.weight.T if kind == "conv1d" else layer.base_layer.weight
    assert int((weight == 0).sum()) == 12
    torch.testing.assert_close(model(x), expected)
    stack.unmerge()
    assert torch.equal(layer.base_layer.weight, before) and torch.equal(model(x), expected)


def test_quantised_weights_are_not_merged_into() -> None:
    stack = masked(base("nf4"))
    with pytest.raises(ValueError, match="WeightMasksConfig cannot be merged into quantised weights"):
        stack.merge()


def test_no_weight_is_held_for_backward_but_the_base_own() -> None:
    model = base("linear", 40, 50)
    masked(model)
    layer: Any = model[0]
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(torch.randn(3, 40))
    own = layer.base_layer.weight.untyped_storage().data_ptr()
    new = [t for t in kept if t.untyped_storage().data_ptr() != own]
    assert output.requires_grad and len(new) < len(kept)
    assert sum(t.nbytes for t in new) == 50 * 40 + 4 * 3 * 40  # the mask, a byte an entry, and the input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model, x = base(), torch.randn(5, 6)
    masked(model)
    expected = model(x)
    with torch.autocast("cpu", dtype):
        mixed = model(x)
        mixed.float().sum().backward()
    assert mixed.dtype == dtype and scores_of(model).grad is not None
    torch.testing.assert_close(mixed.float(), expected, rtol=0.02, atol=0.05)
    half = base().to(dtype)
    masked(half)
    assert scores_of(half).dtype == torch.float32 and half(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(half(x.to(dtype)).float(), expected, rtol=0.02, atol=0.05)


# -- which entries are kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [None, 0.0, -1.0, 1.0, 9.0])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 1)])
def test_exactly_as_many_are_kept_and_of_ties_the_first_whatever_is_guessed(
    shape: tuple[int, ...], guess: float | None
) -> None:
    scores = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(3)).float()  # many ties
    for count in range(scores.numel() + 1):
        mask, threshold = largest(scores, count, guess)
        assert int(mask.sum()) == count
        assert torch.equal(mask, keep_largest([scores], [torch.ones(shape).bool()], count)[0])
        assert torch.equal(largest(scores, count, threshold)[0], mask)


def test_a_score_that_was_changed_behind_the_layer_is_seen() -> None:
    model, x = base(), torch.randn(3, 6)
    masked(model)
    before = model(x)
    scores_of(model).data.neg_()  # as an average of weights is put in their place
    assert not torch.equal(model(x), before)
    torch.testing.assert_close(model(x), x @ (weight_of(base())[0] * mask_of(model)).T + weight_of(base())[1])


@pytest.mark.parametrize(("count", "value"), [(25, 0.0), (-1, 0.0), (3, float("nan"))])
def test_what_cannot_be_chosen_is_one_sentence(count: int, value: float) -> None:
    with pytest.raises(ValueError) as error:
        largest(torch.full((24,), value), count)
    assert one_sentence(str(error.value))


def test_magnitude_and_random_scores() -> None:
    weight = weight_of(base())[0]
    model = base()
    stack_of(model).add(WeightMasksConfig(target_modules=["0"], criterion="magnitude", density=0.25), "m")
    layer: Any = model[0]
    assert torch.equal(layer.mask("m").nonzero(), (weight.abs() >= weight.abs().flatten().sort().values[-6]).nonzero())
    drawn = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
        config = WeightMasksConfig(target_modules=["0", "1"], criterion="random", density=0.5, seed=seed)
        stack_of(model).add(config, "r")
        drawn.append([layer.mask("r") for layer in model])  # type: ignore[operator]
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])


# -- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_bit_for_each_weight_and_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    model, again = base("linear", 40, 50), base("linear", 40, 50)
    stack = masked(model)
    x = torch.randn(3, 40)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + 50 * 40 // 8 and {t.dtype for t in tensors.values()} == {torch.uint8}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["density"] == 0.5
    assert stack["mask"].injection.count_trained(tensors) == 50 * 40  # a score for each
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x)) and not any(p.requires_grad for p in again.parameters())
    save_adapter(again, tmp_path / "again")  # what was loaded is written as it was
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["density"] == 0.5


def test_sizes_that_are_no_multiple_of_eight(tmp_path: Path) -> None:
    model, again, x = base("linear", 5, 3), base("linear", 5, 3), torch.randn(2, 5)
    masked(model)
    save_adapter(model, tmp_path)
    assert [t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()] == [2]
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_peft_loads_the_folder_after_an_import_of_the_package_alone(tmp_path: Path) -> None:
    kinds = ("llama", "gpt2")
    for kind in kinds:
        model: Any = rough(kind)
        stack_of(model).add(WeightMasksConfig(density=0.5, task_type="CAUSAL_LM"), "mask")
        save_adapter(model, tmp_path / kind)
        with torch.no_grad():
            torch.save(model.eval()(input_ids=IDS).logits, tmp_path / kind / "expected.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    printed = python(
        "import sys, torch, lightning_peft\n"
        "from peft import PeftModel\n"
        "from lightning_peft.testing.models import rough\n"
        "root, *kinds = sys.argv[1:]\n"
        "for kind in kinds:\n"
        "    model = PeftModel.from_pretrained(rough(kind), f'{root}/{kind}').eval()\n"
        "    with torch.no_grad():\n"
        "        logits = model(input_ids=torch.load(f'{root}/ids.pt')).logits\n"
        "    print(kind, torch.equal(logits, torch.load(f'{root}/{kind}/expected.pt')))\n",
        tmp_path,
        *kinds,
    )
    assert printed.split() == ["llama", "True", "gpt2", "True"]


def test_what_peft_saves_of_scores_peft_trains_on(tmp_path: Path) -> None:
    model = get_peft_model(base(), WeightMasksConfig(target_modules=["0"], density=0.5))
    layer: Any = model.base_model.model[0]
    layer.weight_mask_scores["default"].data.normal_()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base(), str(tmp_path), is_trainable=True)
    x = torch.randn(2, 6)
    assert torch.equal(again(x), model(x)) and any(p.requires_grad for p in again.parameters())


def test_a_folder_of_the_wrong_size_is_one_sentence(tmp_path: Path) -> None:
    masked(model := base())
    save_adapter(model, tmp_path)
    with pytest.raises((AdapterError, ValueError)) as error:
        load_adapter(base(inputs=60), tmp_path)
    assert "shape" in str(error.value) or "base" in str(error.value)


def test_the_strength_is_saved(tmp_path: Path) -> None:
    model, again, x = base(), base(), torch.randn(2, 6)
    masked(model).scale(0.25)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alpha"] == 0.25
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"criterion": "size"}])
def test_wrong_settings_are_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        WeightMasksConfig(**options)
    assert one_sentence(str(error.value))


def test_only_linear_layers_are_masked() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 3))
    with pytest.raises(ValueError, match=r"weight masks are for linear layers"):
        stack_of(model).add(WeightMasksConfig(target_modules=["0"]), "mask")
    with pytest.raises(ValueError, match="no linear layers that could be masked"):
        stack_of(copy.deepcopy(model)).add(WeightMasksConfig(), "mask")
