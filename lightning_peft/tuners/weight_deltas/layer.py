"""The deltas of one module's own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_peft.backbone.modules import is_matrix
from lightning_peft.tuners.tuner import TunerLayer, check_merged
from lightning_peft.tuners.weight_deltas.config import WeightDeltasConfig, storage, unpack
from lightning_peft.tuners.weight_deltas.hard_concrete import sampled, settled
from lightning_peft.tuners.weight_deltas.view import attach, detach


class WeightDeltasLayer(nn.Module, TunerLayer):
    """A child of the module whose parameters it changes; `effective` gives what they then read as.

    Args:
        owner: the module; it is not registered as a child of this one, which is the owner's child.
    """

    adapter_layer_names = ("values", "gates", "tensor_gates")
    other_param_names = (
        *("masks", "indices", "bits", "fixed", "gate_rates"),
        *("scaling", "pruned", "gate_starts", "noise"),
    )

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.values = nn.ModuleDict()  # adapter -> parameter -> delta
        self.masks = nn.ModuleDict()
        self.indices = nn.ModuleDict()
        self.bits = nn.ModuleDict()
        self.fixed = nn.ModuleDict()  # of stored entries, the deltas of those that their mask leaves out
        self.gates = nn.ModuleDict()
        self.tensor_gates = nn.ModuleDict()
        self.gate_rates = nn.ModuleDict()
        self.gate_starts: dict[str, float] = {}
        self.noise: dict[str, dict[str, list[Tensor]]] = {}  # while gates are sampled
        self.scaling: dict[str, float] = {}
        self.pruned: dict[str, bool] = {}
        # parameters that another module has as well, which holds their deltas: parameter -> (its layer, its name)
        self.links: dict[str, tuple[WeightDeltasLayer, str]] = {}
        self.merged_adapters: list[str] = []
        self._owner = (owner,)  # in a tuple, so that it does not become a child
        self._before_merge: dict[str, Tensor | None] = {}
        self._active_adapter: list[str] = []

    def update_layer(self, adapter_name: str, config: WeightDeltasConfig, names: Mapping[str, str]) -> None:
        """Give the layer zero deltas for one more adapter.

        Args:
            adapter_name: the adapter.
            config: its configuration.
            names: for each of the owner's parameters that it changes, the full name.
        """
        values, gates, tensor_gates = (nn.ParameterDict() for _ in range(3))
        masks, indices, bits, fixed, rates = (BufferDict(persistent=True) for _ in range(5))
        for name, full_name in names.items():
            if name in self.links:
                continue
            shape, dtype, device = self._form(name)
            if config.kept is not None and full_name in config.kept:
                count = config.kept[full_name]
                values[name] = nn.Parameter(torch.zeros(count, dtype=storage(dtype), device=device))
                if full_name in (config.packed or ()):
                    bits[name] = torch.zeros(-(-shape.numel() // 8), dtype=torch.uint8, device=device)
                else:
                    indices[name] = torch.arange(count, dtype=torch.int32, device=device)
                if full_name in (config.masked or ()):
                    masks[name] = torch.ones(count, dtype=torch.bool, device=device)
                    fixed[name] = torch.zeros(count, dtype=storage(dtype), device=device)
            else:
                values[name] = nn.Parameter(torch.zeros(shape, dtype=storage(dtype), device=device))
                if full_name in (config.masked or ()):
                    masks[name] = torch.ones(shape, dtype=torch.bool, device=device)
                if config.gates is not None:
                    gates[name] = nn.Parameter(torch.zeros(shape, device=device))
                    rates[name] = torch.zeros((), device=device)
                    if config.tensor_gates:
                        tensor_gates[name] = nn.Parameter(torch.zeros(1, device=device))
        held: list[tuple[nn.ModuleDict, Any]] = [(self.values, values), (self.masks, masks), (self.indices, indices)]
        held += [(self.bits, bits), (self.fixed, fixed), (self.gates, gates), (self.tensor_gates, tensor_gates)]
        for container, entries in [*held, (self.gate_rates, rates)]:
            if len(entries):
                container[adapter_name] = entries
        if config.gates is not None:
            self.gate_starts[adapter_name] = config.gates
        self.scaling[adapter_name] = config.alpha
        self.pruned[adapter_name] = config.pruned
        attach(self._owner[0], self, set(names))

    @property
    def in_features(self) -> int | None:
        """The width of the owner's input; None where it is no matrix."""
        return self._shape()[0]

    @property
    def out_features(self) -> int | None:
        """The width of the owner's output; None where it is no matrix."""
        return self._shape()[1]

    def _shape(self) -> tuple[int, int] | tuple[None, None]:
        from lightning_peft.backbone.structure import matrix_shape

        return matrix_shape(self._owner[0]) if is_matrix(self._owner[0]) else (None, None)

    def base_form(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Return device and precision of the owner's first parameter."""
        first = next(parameter for parameter in self._owner[0]._parameters.values() if parameter is not None)
        return first.device, first.dtype

    def cast_to_base(self, adapter_name: str) -> None:
        """Turn an adapter's deltas to the precision of their parameters, which one module may have in several."""
        for name, value in self._by_parameter(self.values, adapter_name).items():
            value.data = value.data.to(self._form(name)[1])

    def effective(self, name: str) -> Tensor | None:
        """Return the owner's parameter `name` with the active adapters' deltas added, or as it is without any."""
        if name in self.links:
            layer, linked = self.links[name]
            return layer.effective(linked)
        if self.disable_adapters and self.merged:
            self.unmerge()
        parameter = self._owner[0]._parameters.get(name)
        active = () if self.disable_adapters else self.active_adapters
        active = [a for a in active if a not in self.merged_adapters and self._changes(a, name)]
        return self._sum(name, parameter, active) if active else parameter

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas to the parameters in place; the parameters as they were are kept for `unmerge`."""
        for adapter in [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]:
            sums: dict[str, Tensor] = {}
            for name in self._by_parameter(self.values, adapter):
                with torch.no_grad():
                    sums[name] = self._sum(name, self._owner[0]._parameters[name], [adapter])
            if safe_merge:
                check_merged(adapter, sums.values())
            for name, merged in sums.items():
                parameter = self._owner[0]._parameters[name]
                before = None if parameter is None else parameter.detach().clone()
                self._before_merge.setdefault(name, before)
                if parameter is None:
                    self._owner[0]._parameters[name] = nn.Parameter(merged, requires_grad=False)
                else:
                    parameter.data.copy_(merged)
            self.merged_adapters.append(adapter)

    def added_by_merge(self, adapter_names: list[str] | None) -> list[tuple[nn.Module, str]]:
        names = self.active_adapters if adapter_names is None else adapter_names
        changed = {own for name in (*names, *self.merged_adapters) for own in self._by_parameter(self.values, name)}
        before = self._owner[0]._parameters | self._before_merge
        return [(self._owner[0], own) for own in sorted(changed) if before[own] is None]

    def unmerge(self) -> None:
        """Put the owner's parameters back, bit for bit."""
        for name, before in self._before_merge.items():
            parameter = self._owner[0]._parameters[name]
            if before is None:
                self._owner[0]._parameters[name] = None
            elif parameter is not None:
                parameter.data.copy_(before)
        self._before_merge.clear()
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not self.scaling:
            detach(self._owner[0])

    def get_base_layer(self) -> nn.Module:
        """Return a module without anything: no other is wrapped."""
        return nn.Module()

    def _get_available_adapters(self) -> set[str]:
        return set(self.scaling)  # also those whose deltas another layer holds

    def _changes(self, adapter: str, name: str) -> bool:
        return name in self._by_parameter(self.values, adapter)

    def _sum(self, name: str, parameter: Tensor | None, adapters: list[str]) -> Tensor:
        """Return `parameter + scaling * change`, computed in the deltas' precision."""
        _, dtype, _ = self._form(name)
        before = self._before_merge.get(name, parameter)
        total = None if parameter is None else parameter.to(storage(dtype))
        for adapter in adapters:
            change = self._change(adapter, name, before)
            if self.scaling[adapter] != 1.0:
                change = change * self.scaling[adapter]
            total = change if total is None else total + change
        assert total is not None
        return total.to(dtype)

    def _change(self, adapter: str, name: str, base: Tensor | None) -> Tensor:
        """Return what one adapter adds at strength 1, in the shape of the parameter."""
        value: Tensor = self._by_parameter(self.values, adapter)[name]
        if name in self._by_parameter(self.gates, adapter):
            value = self._gated(adapter, name, value)
        indices, bits, masks = (self._by_parameter(c, adapter) for c in (self.indices, self.bits, self.masks))
        if name not in indices and name not in bits and name not in masks:
            return value
        shape, _, _ = self._form(name)
        outside = value.new_zeros(()).expand(shape)
        if self.pruned[adapter] and base is not None:
            outside = -base.detach().to(value.dtype)
        if name in masks and name not in indices and name not in bits:
            return torch.where(masks[name], value, outside)
        if name in masks:
            value = torch.where(masks[name], value, self._by_parameter(self.fixed, adapter)[name])
        if name in bits:
            mask = unpack(bits[name], shape.numel()).reshape(shape)
            return outside.masked_scatter(mask, value)
        return outside.reshape(-1).index_copy(0, indices[name].long(), value).reshape(shape)

    def _gated(self, adapter: str, name: str, value: Tensor) -> Tensor:
        """Return a delta times its gates: sampled ones where there is noise, else those of evaluation."""
        noise = self.noise.get(adapter, {}).get(name)
        start, rate = self.gate_starts[adapter], self._by_parameter(self.gate_rates, adapter)[name]
        trained = [self._by_parameter(self.gates, adapter)[name]]
        if adapter in self.tensor_gates:
            trained.append(self._by_parameter(self.tensor_gates, adapter)[name])
        for i, part in enumerate(trained):
            logits = start + rate * part
            value = value * (settled(logits) if noise is None else sampled(logits, noise[i]))
        return value

    @staticmethod
    def _by_parameter(container: nn.ModuleDict, adapter: str) -> Any:
        """Return one adapter's tensors by parameter, or nothing."""
        return container[adapter] if adapter in container else {}  # noqa: SIM401 - it has no `get`

    def _form(self, name: str) -> tuple[torch.Size, torch.dtype, torch.device]:
        """Return shape, precision and device of the owner's parameter; of a missing bias, as they would be."""
        owner = self._owner[0]
        parameter = owner._parameters.get(name)
        if parameter is not None:
            return parameter.shape, parameter.dtype, parameter.device
        from lightning_peft.backbone.structure import matrix_shape

        weight = owner._parameters["weight"]
        assert weight is not None
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        return torch.Size([matrix_shape(owner)[1]]), dtype, weight.device

    def __repr__(self) -> str:
        return "weight_deltas." + super().__repr__()
