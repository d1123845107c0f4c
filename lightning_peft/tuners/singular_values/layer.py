"""The wrapper around one linear layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from lightning_peft.tuners.linear_wrapper import MatrixChangeLayer
from lightning_peft.tuners.singular_values.config import SingularValuesConfig
from lightning_peft.tuners.singular_values.decomposition import SKETCH_SIZE, Basis, decompose, differ


class SingularValuesLayer(MatrixChangeLayer):
    """Add `U diag(δ) Vᵀ x` to a linear layer's output, U and V the singular vectors of its weight.

    They are computed in the first call, since weights may come, or move, after the adapter is put on; over another
    adapter at once, before that is merged. They are no buffers: DDP would send them in every step.
    """

    adapter_layer_names = ("singular_deltas",)
    other_param_names = ("singular_sketches", "scaling", "nonnegative")
    config_name = "SingularValuesConfig"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SingularValuesConfig, key: str) -> None:
        super().__init__(base_layer, "SingularValues", key)
        self.key = key
        self.singular_deltas = nn.ParameterDict({})
        self.singular_sketches = BufferDict(persistent=True)
        self.nonnegative: dict[str, bool] = {}
        self._basis: Basis | None = None
        self._compared: dict[str, tuple[int, int]] = {}  # the sketches that the basis was compared with
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SingularValuesConfig) -> None:
        """Give the layer differences of zero for one more adapter."""
        size = min(self.in_features, self.out_features)
        size = size if config.top is None else min(size, config.top)
        self.singular_deltas[adapter_name] = nn.Parameter(torch.zeros(size))
        self.singular_sketches[adapter_name] = torch.zeros(SKETCH_SIZE, dtype=torch.int32)
        self.scaling[adapter_name] = config.alpha
        self.nonnegative[adapter_name] = config.nonnegative
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        device, _ = self.base_form()
        if self.base_layer is not self.get_base_layer() and device is not None and device.type != "meta":
            self.basis()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.acting()
        y = self.base_layer(x, *args, **kwargs)
        if not acting:
            return y
        basis = self.basis(x.device)
        total = torch.zeros((), device=x.device)
        for name in acting:
            change = self.scaling[name] * self.difference(name, basis)
            missing = max(len(self.singular_deltas[other]) for other in acting) - len(change)
            total = total + nn.functional.pad(change, (0, missing))
        return (y + basis.apply(x, total)).to(y.dtype)

    def difference(self, adapter_name: str, basis: Basis) -> Tensor:
        """Return by how much an adapter changes the singular values at strength 1, `[k]`."""
        delta = self.singular_deltas[adapter_name]
        if not self.nonnegative[adapter_name]:
            return delta
        values = basis.values[: len(delta)]
        return torch.relu(values + delta) - values

    def change(self, adapter_name: str) -> Tensor:
        basis = self.basis()
        return basis.matrix(self.difference(adapter_name, basis))

    def basis(self, device: torch.device | None = None) -> Basis:
        """Return the singular vectors of the base's weight, computed where they are not, and compared with the saved.

        Args:
            device: where they are needed; default, where the weight is.

        Raises:
            ValueError: a saved adapter was trained with others.
        """
        device = device or self.base_form()[0]
        needed = {len(delta) for delta in self.singular_deltas.values()}
        if self._basis is None or not needed <= self._basis.sketches.keys():
            basis = self._compute(needed)
        else:
            basis = self._basis
        if device is not None and basis.outputs.device != device:
            with torch.inference_mode(False), torch.no_grad():
                basis = basis.to(device)
        if not basis.outputs.is_meta:
            self._basis = basis
            if not torch.compiler.is_compiling():
                self._compare(basis)
        return basis

    @torch.compiler.disable
    def _compute(self, counts: set[int]) -> Basis:
        self._compared.clear()
        return decompose(self.get_base_layer(), counts)

    def _compare(self, basis: Basis) -> None:
        """Compare the basis with what adapters were saved with, and note it for those that are new."""
        for name, saved in self.singular_sketches.items():
            # what is read from a file is copied into the buffer, or takes its place; DDP copies in every step
            state = (id(saved), 0 if saved.is_inference() else saved._version)
            if saved.is_meta or (name in self._compared and (self.training or self._compared[name] == state)):
                continue
            own = basis.sketches[len(self.singular_deltas[name])]
            if not saved.any():
                saved.copy_(own)
            elif differ(saved, own):
                raise ValueError(
                    f"The singular vectors of {self.key} are not those that adapter {name!r} was trained with: the "
                    "base has other weights, another precision, or equal singular values, whose vectors each machine "
                    "chooses; load it on the base and in the precision it was trained on, and merge it there."
                )
            self._compared[name] = (id(saved), 0 if saved.is_inference() else saved._version)

    def __repr__(self) -> str:
        return "singular_values." + super().__repr__()
