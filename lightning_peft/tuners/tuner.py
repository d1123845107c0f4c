"""The base of the tuners: peft's, whose hooks it gives the types of one method's configuration and layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from lightning_peft.backbone.modules import base_modules

C = TypeVar("C", bound=PeftConfig)
L = TypeVar("L", bound=BaseTunerLayer)


class Tuner(BaseTuner, Generic[C, L]):
    """Put layers of type L into a model, as configurations of type C say.

    peft declares its hooks for every configuration, and calls them with a tuner's own.
    """

    tuner_layer_cls: type[L]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's own annotation

    def _check_config(self, config: C) -> None:
        """Raise `ValueError` unless the configuration fits the model."""

    def _adapt(self, config: C, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str) -> None:
        """Give `target`, the child of `parent` called `name`, in the model `key`, one more adapter."""
        raise NotImplementedError(f"{type(self).__name__} replaces no module.")

    def _layers(self) -> list[L]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        self._check_config(cast("C", peft_config))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._adapt(cast("C", peft_config), adapter_name, target, target_name, parent, current_key)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            if isinstance(layer, TunerLayer) and not autocast_adapter_dtype:
                layer.cast_to_base(adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:  # so peft says, whose own returns the model
        if merge:
            self._check_merge_allowed()
            self._check_declared(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_declared(self, adapter_names: list[str] | None) -> None:
        """Raise `ValueError` where merging adds parameters to a model that, saved and loaded, would lack them."""
        if not hasattr(self.model, "save_pretrained"):
            return  # a state dict holds them, and none but a model that has them takes it
        layers = [layer for layer in self._layers() if isinstance(layer, TunerLayer)]
        added = [place for layer in layers for place in layer.added_by_merge(adapter_names)]
        if added:
            names = {module: name for name, module in base_modules(self.model)}
            first, model = f"{names[added[0][0]]}.{added[0][1]}", type(self.model).__name__
            raise ValueError(
                f"Merging adds {len(added)} parameters that a plain {model} has no place for, the first is {first}, so "
                "that the merged model would lose them when it is saved and loaded: save the adapter and write it with "
                "lightning_peft.bake into a model that has them, or call merge_adapter() to use it in memory."
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # peft drops the argument where a tuner has no such method, and computes every row with the active adapters
        if kwargs.get("adapter_names") is not None and not all(layer.disable_adapters for layer in self._layers()):
            raise ValueError(
                f"{type(self).__name__} computes a whole batch with the active adapters and cannot take another for "
                "each row: leave out adapter_names, and call the model once for each adapter (set_adapter)."
            )
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; of those that remain the active ones stay active, else the first by name becomes it.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        active = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        active = active or sorted(self.peft_config)[:1]
        if self.active_adapters != active:  # peft asks the first layer, which may have carried no other adapter
            self.set_adapter(active)


class TunerLayer(BaseTunerLayer):
    """A tuner layer that is made in float32, whatever the base's precision, and may be made without values.

    `update_layer` ends with `self._move_adapter_to_device_of_base_layer(adapter_name)`.
    """

    def base_form(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Return device and precision of the weights that the layer adapts; None where it has none."""
        return self._get_base_layer_device_and_dtype(self.get_base_layer())

    def cast_to_base(self, adapter_name: str) -> None:
        """Turn an adapter's parameters to the base's precision; where that is quantised, leave them."""
        _, dtype = self.base_form()
        if dtype is not None and dtype.is_floating_point:
            for tensor in self.adapter_tensors(adapter_name):
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.to(dtype)

    def added_by_merge(self, adapter_names: list[str] | None) -> list[tuple[nn.Module, str]]:
        """Return the parameters that a merge adds, or has added, to the base: their modules and names in these.

        Args:
            adapter_names: which adapters; None for the active ones.
        """
        return []

    def adapter_tensors(self, adapter_name: str) -> Iterator[Tensor]:
        """Yield an adapter's parameters and buffers in this layer."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, attribute)
            if isinstance(held, nn.ParameterDict | nn.ModuleDict | BufferDict) and adapter_name in held:
                entry: Any = held[adapter_name]
                yield from [entry] if isinstance(entry, Tensor) else (*entry.parameters(), *entry.buffers())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # peft's own turns the adapter to the base's precision as well, and so rounds what was read from a file
        device = self.base_form()[0] if device is None else device
        if device is None or device.type == "meta":
            return
        for tensor in self.adapter_tensors(adapter_name):
            if not tensor.is_meta:  # else its values come later, from a file
                tensor.data = tensor.data.to(device)


def check_merged(adapter_name: str, weights: Iterable[Tensor]) -> None:
    """Raise `ValueError`, in peft's words, where an adapter puts NaN or infinity into merged weights."""
    if not all(torch.isfinite(weight).all() for weight in weights):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: it would put NaN or "
            "infinity into them."
        )


def remove_child(owner: nn.Module, name: str) -> None:
    """Take a child out of a module.

    The owner gets a new dictionary of children: peft deletes adapters while it walks over the old one.
    """
    children = owner._modules.copy()
    children.pop(name, None)
    owner.__dict__["_modules"] = children
