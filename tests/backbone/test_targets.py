"""Targets are chosen by name, by block and by part, and what does not exist is refused."""

from __future__ import annotations

import re

import pytest
from edits import add_lora
from tiny_models import tiny
from torch import nn
from tuning import Net, one_sentence

from lightning_peft.backbone.defaults import default_targets
from lightning_peft.backbone.targets import Layers, choose_targets


def numbers(names: list[str] | str) -> list[int]:
    assert isinstance(names, list)
    return [int(m[1]) for name in names if (m := re.search(r"\.(\d+)\.", name))]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (Layers(first=2), [0, 1]),
        (Layers(last=1), [2]),
        (Layers(every=2), [1]),
        (Layers(every=1), [0, 1, 2]),
        (Layers(random=2, seed=4), [0, 1]),
        (Layers(random=2, seed=0), [1, 2]),
        ([0, 2], [0, 2]),
        (None, [0, 1, 2]),
    ],
)
def test_blocks_are_chosen_by_rule_or_number(layers: Layers | list[int] | None, expected: list[int]) -> None:
    assert numbers(choose_targets(tiny("llama"), None, layers, "attention"))[::4] == expected


def test_an_encoders_and_a_decoders_blocks_are_counted_apart() -> None:
    found = choose_targets(tiny("t5"), ["q"], Layers(last=1))
    assert found == [
        "encoder.block.2.layer.0.SelfAttention.q",
        "decoder.block.2.layer.0.SelfAttention.q",
        "decoder.block.2.layer.1.EncDecAttention.q",
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "bert", "t5", "vit"])
def test_attention_and_mlp_share_nothing_and_cover_every_matrix_of_the_blocks(kind: str) -> None:
    model = tiny(kind)
    attention, mlp = (set(choose_targets(model, within=part)) for part in ("attention", "mlp"))
    assert attention and mlp and not attention & mlp
    in_blocks = {
        name
        for name, m in model.named_modules()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and re.search(r"\.\d+\.", name)
    }
    assert attention | mlp == in_blocks


def test_a_part_restricts_the_targets_that_are_named() -> None:
    assert choose_targets(tiny("gpt2"), ["c_proj"], [1], "mlp") == ["transformer.h.1.mlp.c_proj"]
    assert choose_targets(tiny("gpt2"), r".*\.c_proj", [1], "attention") == ["transformer.h.1.attn.c_proj"]


def test_what_is_not_restricted_stays_as_given() -> None:
    assert choose_targets(tiny("llama"), ["q_proj"]) == ["q_proj"]
    assert choose_targets(tiny("llama"), ".*q_proj") == ".*q_proj"


def test_adapters_do_not_show_in_the_choice() -> None:
    model = tiny("llama")
    before = choose_targets(model, None, Layers(last=1), "mlp")
    add_lora(model, ["q_proj", "down_proj"])
    assert choose_targets(model, None, Layers(last=1), "mlp") == before


def test_a_network_of_convolutions_has_those_adapted() -> None:
    assert default_targets(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))) == ["0", "2"]
    assert "conv" not in default_targets(Net())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: Layers(), r"^Layers takes exactly one of first, last, every and random, got none\.$"),
        (lambda: Layers(first=1, last=1), r"^Layers takes exactly one of"),
        (lambda: Layers(last=0), r"at least 1"),
        (lambda: choose_targets(tiny("llama"), None, Layers(first=4)), r"asks for 4 blocks, but there are 3\.$"),
        (lambda: choose_targets(tiny("llama"), None, [5]), r"^There is no block 5 to adapt: .* are 0, 1, 2\.$"),
        (lambda: choose_targets(tiny("llama"), ["q_proj"], None, "mlp"), r"^None of the target modules is in the mlp"),
        (lambda: choose_targets(Net(), None, None, "attention"), r"^Net has no block with attention in it"),
        (lambda: choose_targets(tiny("llama"), None, None, "head"), r'^within must be "attention" or "mlp"'),
        (lambda: default_targets(nn.Embedding(3, 3)), r"^Embedding has no linear layer to adapt"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_sentence(given, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        given()
    assert one_sentence(str(error.value))
