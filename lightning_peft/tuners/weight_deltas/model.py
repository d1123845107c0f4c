"""The tuner that puts weight deltas into a model."""

from __future__ import annotations

import difflib
import re
from contextlib import nullcontext
from typing import Any

from peft import PeftConfig
from torch import nn

from lightning_peft.backbone.peft_private import set_active
from lightning_peft.tuners.tuner import Tuner
from lightning_peft.tuners.weight_deltas.config import WeightDeltasConfig
from lightning_peft.tuners.weight_deltas.layer import WeightDeltasLayer
from lightning_peft.tuners.weight_deltas.owners import Place, places
from lightning_peft.tuners.weight_deltas.view import ATTRIBUTE


class WeightDeltasModel(Tuner[WeightDeltasConfig, WeightDeltasLayer]):
    """Give modules a `WeightDeltasLayer` each; see `WeightDeltasConfig`. No module is replaced and no name changes.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.weight_deltas import WeightDeltasConfig
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> config = WeightDeltasConfig(target_parameters=["0.bias", "2.weight"])
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        9
    """

    # transformers puts an adapter's name after the first `prefix[^.]*` in a saved key, which with the dot is
    # `weight_deltas.values`; peft deletes from the layers whose names do not contain it, which is all of them
    prefix: str = f"{ATTRIBUTE}."
    tuner_layer_cls = WeightDeltasLayer
    # whatever wraps a module reads its weights with the deltas in them, so these are merged first and unmerged last
    innermost = True
    changes_weights = False  # none that is quantised

    def _check_config(self, config: WeightDeltasConfig) -> None:
        if not config.target_parameters:
            raise ValueError("WeightDeltasConfig needs target_parameters: the full names, or a regular expression.")

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return False  # parameters are targeted, not modules

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        assert isinstance(peft_config, WeightDeltasConfig)
        chosen = _chosen(model, peft_config)
        context: Any = nullcontext
        if low_cpu_mem_usage:
            from accelerate import init_empty_weights

            context = init_empty_weights
        names: dict[nn.Module, dict[str, str]] = {}
        layers: dict[nn.Module, WeightDeltasLayer] = {}
        with context():
            for full_name, where in chosen.items():
                for place in where:
                    owner = place.owner
                    layers[owner] = owner._modules.get(ATTRIBUTE) or WeightDeltasLayer(owner)  # type: ignore[assignment]
                    if not hasattr(owner, ATTRIBUTE):
                        owner.add_module(ATTRIBUTE, layers[owner])
                    names.setdefault(owner, {})[place.name] = full_name
                first, *others = where
                for place in others:
                    if place.owner is not first.owner or place.name != first.name:
                        layers[place.owner].links[place.name] = (layers[first.owner], first.name)
            for owner, layer in layers.items():
                layer.update_layer(adapter_name, peft_config, names[owner])
                layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        return list(chosen)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:  # so peft says, whose own returns the model
        if merge:
            self._check_declared(adapter_names)
        for layer in self._layers():
            if merge:
                layer.merge(safe_merge, adapter_names)
                layer._before_merge.clear()
            for adapter in list(layer.scaling):
                set_active(layer, [])
                layer.delete_adapter(adapter)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def _chosen(model: nn.Module, config: WeightDeltasConfig) -> dict[str, list[Place]]:
    """Return the places of each targeted parameter by its first full name; check that it can have a delta."""
    known = places(model, missing=config.add_missing)
    first = {place.full_name: where[0].full_name for where in known for place in where}
    by_name = {where[0].full_name: where for where in known}
    targets = config.target_parameters
    if isinstance(targets, str):
        names = [name for name in by_name if re.fullmatch(targets, name)]
        if not names:
            raise ValueError(f"No parameter of {type(model).__name__} has a name like {targets!r}.")
    else:
        for name in targets or ():
            if name not in first:
                near = ", ".join(difflib.get_close_matches(name, first, n=3, cutoff=0.0))
                raise ValueError(f"{type(model).__name__} has no parameter {name!r}; the nearest names are {near}.")
        names = list(dict.fromkeys(first[name] for name in targets or ()))
    for name in names:
        parameter = by_name[name][0].parameter
        if parameter is not None and not parameter.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({str(parameter.dtype).removeprefix('torch.')}) and cannot have a delta: choose "
                "biases and norms, or an unquantised base."
            )
    return {name: by_name[name] for name in names}
