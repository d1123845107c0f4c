"""Targets in the forms that peft's own methods take them."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from tiny_models import tiny
from tuning import one_sentence

from lightning_peft.tuners.bottleneck import BottleneckConfig
from lightning_peft.tuners.prefix import PrefixConfig
from lightning_peft.tuners.ssb import SSBConfig
from lightning_peft.tuners.targets import default_blocks, ordered

METHODS = (SSBConfig, BottleneckConfig, PrefixConfig)


def test_a_set_is_put_in_order_and_a_regular_expression_is_left_alone() -> None:
    assert ordered({"b", "a"}) == ["a", "b"]
    assert ordered(("b", "a")) == ["b", "a"]
    assert ordered("b|a") == "b|a"


@pytest.mark.parametrize("layers", [1, [1]])
@pytest.mark.parametrize("config", METHODS)
def test_a_methods_own_targets_are_those_of_the_blocks_that_are_chosen(config: Any, layers: int | list[int]) -> None:
    everywhere = get_peft_model(tiny("llama"), config()).targeted_module_names
    chosen = get_peft_model(tiny("llama"), config(layers_to_transform=layers)).targeted_module_names
    assert chosen == [name for name in everywhere if ".layers.1." in name] != everywhere


def test_own_targets_are_counted_in_no_list_that_is_named() -> None:
    with pytest.raises(ValueError, match=r"^layers_pattern='h' goes with target_modules: give the names") as error:
        default_blocks(SSBConfig(layers_to_transform=[0], layers_pattern="h"))
    assert one_sentence(str(error.value))
