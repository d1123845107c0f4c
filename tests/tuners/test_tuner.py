from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from tuning import one_sentence

from lightning_peft.tuners.ssb import SSBConfig
from lightning_peft.tuners.ssb.layer import SSBLayer
from lightning_peft.tuners.tuner import Tuner


class Bare(Tuner[SSBConfig, SSBLayer]):
    prefix = "ssb_"
    tuner_layer_cls = SSBLayer


class Picky(Bare):
    def _check_config(self, config: SSBConfig) -> None:
        raise ValueError(f"refused {config.target_modules}")


class Wrapping(Bare):
    def _adapt(
        self, config: SSBConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        setattr(parent, name, SSBLayer(target, adapter_name, config, key))


def model() -> nn.Module:
    return nn.Sequential(nn.ModuleDict({"inner": nn.Linear(3, 2)}), nn.Linear(2, 2))


def test_a_configuration_is_checked_before_a_module_is_adapted() -> None:
    with pytest.raises(ValueError, match="refused"):
        Picky(model(), SSBConfig(target_modules=["inner"]), "default")


def test_a_tuner_that_adapts_no_module_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Bare replaces no module"):
        Bare(model(), SSBConfig(target_modules=["inner"]), "default")


def test_a_tuner_is_given_the_target_where_it_stands_and_finds_its_layers_again() -> None:
    tuner = Wrapping(model(), SSBConfig(target_modules=["inner"]), "default")
    (layer,) = tuner._layers()
    assert layer is tuner.model.get_submodule("0.inner") and isinstance(layer.base_layer, nn.Linear)


def test_rows_with_different_adapters_are_refused_in_one_sentence() -> None:
    adapted = get_peft_model(model(), SSBConfig(target_modules=["1"]))
    adapted.add_adapter("other", SSBConfig(target_modules=["1"]))
    x = torch.randn(2, 2)
    adapted.base_model.model[0] = nn.Identity()
    with pytest.raises(
        ValueError, match=r"^SSBModel computes a whole batch with the active adapters and cannot take"
    ) as error:
        adapted(x, adapter_names=["default", "other"])
    assert one_sentence(str(error.value))
    with adapted.disable_adapter():  # as in peft, where there is nothing to choose
        adapted(x, adapter_names=["default", "other"])
