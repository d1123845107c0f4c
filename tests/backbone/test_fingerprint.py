"""The fingerprint knows a base model again in another precision, with adapters on or quantised, and no other model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from edits import PROJECTIONS, add_lora, add_offsets, both
from tiny_models import LANGUAGE_MODELS, tiny
from torch import nn

from lightning_peft.backbone.fingerprint import fingerprint, mismatch
from lightning_peft.editing import head_sites

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def other_seed(kind: str) -> nn.Module:
    """The same architecture, initialised anew: norms and biases are alike, matrices are not."""
    model = tiny(kind)
    torch.manual_seed(1)
    model.apply(model._init_weights)
    return model


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_it_is_json_and_the_same_each_time(kind: str) -> None:
    made = fingerprint(tiny(kind))
    assert json.loads(json.dumps(made)) == made == fingerprint(tiny(kind))
    assert mismatch(made, made) is None and made["samples"]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_another_precision_is_the_same_base(kind: str, dtype: torch.dtype) -> None:
    a, b = fingerprint(tiny(kind)), fingerprint(tiny(kind).to(dtype))
    assert mismatch(a, b) is None and mismatch(b, a) is None


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_another_seed_is_another_base(kind: str) -> None:
    assert (difference := mismatch(fingerprint(tiny(kind)), fingerprint(other_seed(kind)))) is not None
    assert "tensors hold other values" in difference
    assert mismatch(fingerprint(tiny(kind)), fingerprint(other_seed(kind).bfloat16())) is not None


def test_a_base_that_was_trained_a_little_is_another_base() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4)
    assert mismatch(fingerprint(tiny("llama")), fingerprint(model)) is not None


def test_other_shapes_are_another_base() -> None:
    difference = mismatch(fingerprint(tiny("llama")), fingerprint(tiny("wide_llama")))
    assert difference == "their parameters have other names or shapes (model types llama and llama)"
    difference = mismatch(fingerprint(tiny("gpt2")), fingerprint(tiny("opt")))
    assert difference == "their parameters have other names or shapes (model types gpt2 and opt)"


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_adapters_are_not_part_of_the_base(kind: str) -> None:
    bare = fingerprint(tiny(kind))
    lora = tiny(kind)
    add_lora(lora, [PROJECTIONS[kind]])
    for model in (lora, add_offsets(tiny(kind)).backbone, both(kind)[0]):
        assert fingerprint(model) == bare


def test_a_hand_written_module_has_one_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    made = fingerprint(model)
    assert made["model_type"] is None and set(made["samples"]) == {*model.state_dict()} - {"1.num_batches_tracked"}
    assert mismatch(made, fingerprint(copy.deepcopy(model))) is None
    nn.init.normal_(model[2].weight)
    assert mismatch(made, fingerprint(model)) == "1 of 8 tensors hold other values: 2.weight"


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_change_anywhere_is_seen_and_named(kind: str) -> None:
    made = fingerprint(tiny(kind))
    for name, parameter in (model := tiny(kind)).named_parameters():
        with torch.no_grad():
            parameter.add_(0.1)
        total = len(made["samples"])
        assert mismatch(made, fingerprint(model)) == f"1 of {total} tensors hold other values: {name}"
        with torch.no_grad():
            parameter.copy_(tiny(kind).get_parameter(name))


def test_statistics_of_a_normalisation_are_part_of_the_base() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    made = fingerprint(model)
    model[1].running_var.mul_(2.0)
    assert mismatch(made, fingerprint(model)) == "1 of 6 tensors hold other values: 1.running_var"


def test_what_a_fingerprint_of_four_matrices_holds_is_compared() -> None:
    """Release 68ae323 sampled four matrices, in the same form."""
    made = fingerprint(tiny("llama"))
    names = [name for name, parameter in tiny("llama").named_parameters() if parameter.dim() > 1]
    old = made | {"samples": {name: made["samples"][name] for name in (names[0], names[3], names[-1])}}
    assert mismatch(old, made) is None and mismatch(old, fingerprint(other_seed("llama"))) is not None


def test_another_number_of_values_is_another_base() -> None:
    made = fingerprint(nn.Linear(3, 4))
    cut = made | {"samples": {n: sample | {"values": sample["values"][:2]} for n, sample in made["samples"].items()}}
    assert mismatch(cut, made) == "2 of 2 tensors hold other values: bias, weight"


def test_a_module_of_vectors_alone_is_known_by_them() -> None:
    made = fingerprint(nn.LayerNorm(4))
    changed = nn.LayerNorm(4)
    nn.init.constant_(changed.weight, 2.0)
    assert mismatch(made, fingerprint(changed)) == "1 of 2 tensors hold other values: weight"


def test_a_4_bit_copy_is_the_same_base() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("llama")
    for site in head_sites(model):
        linear = model.get_submodule(site.name)
        quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False)
        quantised.load_state_dict(linear.state_dict())
        model.set_submodule(site.name, quantised.to("cpu"))
    assert mismatch(fingerprint(tiny("llama")), fingerprint(model)) is None
    assert mismatch(fingerprint(other_seed("llama")), fingerprint(model)) is not None


def test_a_model_on_the_meta_device_is_compared_by_shape() -> None:
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    assert mismatch(fingerprint(nn.Linear(3, 4)), fingerprint(empty)) is None
    assert mismatch(fingerprint(nn.Linear(4, 3)), fingerprint(empty)) is not None
