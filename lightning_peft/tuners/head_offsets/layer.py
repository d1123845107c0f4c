"""The wrapper around one attention output projection."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn

from lightning_peft.positions import Positions, untrack
from lightning_peft.stack.gates import check_mergeable, gated, where
from lightning_peft.tuners.head_offsets.config import OFFSET, SCALE, HeadOffsetsConfig
from lightning_peft.tuners.tuner import TunerLayer, check_merged


class HeadOffsetsLayer(nn.Module, TunerLayer):
    """Add `alpha * offset` to chosen heads of the input `[B, T, H * head_dim]`, then run the projection.

    Only the input is touched, so the projection may be any module: Linear, Conv1D, a quantised or LoRA-wrapped one.
    """

    adapter_layer_names = ("head_offsets",)
    other_param_names = (
        "head_offsets_directions",
        "head_offsets_roles",
        "head_offsets_probe",
        "heads",
        "scaling",
        "policies",
        "configs",
    )

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: HeadOffsetsConfig, name: str, positions: Positions
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.head_offsets = nn.ParameterDict({})
        self.head_offsets_directions = BufferDict(persistent=True)  # what gains multiply, [heads, head_dim]
        self.head_offsets_roles = BufferDict(persistent=True)  # of LoFiT's vectors: OFF, OFFSET or SCALE, [heads]
        self.head_offsets_probe = BufferDict(persistent=True)  # a gate's, [heads, head_dim + 1]
        self.heads: dict[str, Tensor] = {}
        self.scaling: dict[str, float] = {}
        self.policies: dict[str, str] = {}
        self.configs: dict[str, HeadOffsetsConfig] = {}
        self.merged_adapters: list[str] = []
        self._bias_before_merge: Tensor | None = None
        self._positions = positions
        self._changes: dict[str, tuple[tuple[Any, ...], Tensor]] = {}  # by adapter: its key and the change
        # of a module of another kind it is (None, None), which `update_layer` refuses
        self.in_features, self.out_features = cast("tuple[int, int]", _get_in_out_features(self.get_base_layer()))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: HeadOffsetsConfig, name: str) -> None:
        """Give the layer zero offsets for one more adapter. `name` is the module's full name."""
        size = config.head_size(name)
        if not size or not self.in_features or self.in_features % size:
            raise ValueError(
                f"{name} takes {self.in_features} features, which is not a multiple of head_dim={size}: "
                "it is not an attention output projection of heads of that size."
            )
        count = self.in_features // size
        heads = list(range(count)) if config.heads is None else sorted(config.heads[name])
        if any(not 0 <= head < count for head in heads) or len(set(heads)) != len(heads):
            raise ValueError(f"{name} has heads 0 to {count - 1}, but heads {heads} were asked for.")
        self.heads[adapter_name] = torch.tensor(heads)
        self.scaling[adapter_name] = config.alpha
        self.policies[adapter_name], self.configs[adapter_name] = config.positions, config
        width = 1 if config.parameters == "gains" else size
        if config.parameters == "gains":
            self.head_offsets_directions[adapter_name] = torch.zeros(len(heads), size)
        if config.parameters == "lofit":
            self.head_offsets_roles[adapter_name] = torch.full((len(heads),), SCALE, dtype=torch.int8)
        if config.gate is not None:
            self.head_offsets_probe[adapter_name] = torch.zeros(len(heads), size + 1)
        self.head_offsets[adapter_name] = nn.Parameter(torch.zeros(len(heads), width))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def displacement(self, adapter_name: str) -> Tensor:
        """Return the vector `[H * head_dim]` that one adapter adds, with its strength; zero at heads without offset."""
        offsets = self.head_offsets[adapter_name]
        if adapter_name in self.head_offsets_directions:
            offsets = offsets * self.head_offsets_directions[adapter_name]
        if adapter_name in self.head_offsets_roles:
            offsets = offsets * (self.head_offsets_roles[adapter_name] == OFFSET)[:, None]
        return self._spread(adapter_name, offsets)

    def change(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return what one adapter adds to the input `x [..., H * head_dim]`, or a vector `[H * head_dim]` for all."""
        displacement = self.displacement(adapter_name).to(x.dtype)
        if adapter_name in self.head_offsets_probe:
            displacement = displacement * self._strength(adapter_name, x).to(x.dtype)
        if adapter_name not in self.head_offsets_roles:
            return displacement
        scales = self.head_offsets[adapter_name] * (self.head_offsets_roles[adapter_name] == SCALE)[:, None]
        return displacement + x * self._spread(adapter_name, scales).to(x.dtype)

    def _strength(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return how much of the displacement each token gets, by its heads' probes, in the shape of `x`."""
        config, probe = self.configs[adapter_name], self.head_offsets_probe[adapter_name]
        size = probe.shape[1] - 1
        heads = self.heads[adapter_name] = self.heads[adapter_name].to(x.device)
        z = x.unflatten(-1, (-1, size)).index_select(-2, heads)
        strength = gated(z, probe, str(config.gate), config.beta, config.threshold)
        whole = strength.new_zeros(*x.shape[:-1], x.shape[-1] // size).index_copy(-1, heads, strength)
        return whole.repeat_interleave(size, dim=-1)

    def _spread(self, adapter_name: str, vectors: Tensor) -> Tensor:
        """Put vectors `[heads, head_dim]`, times the strength, at their heads in `[H * head_dim]`, else zero."""
        count, size = self.in_features // vectors.shape[1], vectors.shape[1]
        if len(vectors) < count:
            heads = self.heads[adapter_name] = self.heads[adapter_name].to(vectors.device)
            vectors = vectors.new_zeros(count, size).index_copy(0, heads, vectors)
        return vectors.reshape(-1) * self.scaling[adapter_name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        for adapter_name in self.active_adapters:
            # strength 0 edits nothing, and must not need to know where the answer begins
            if self.scaling.get(adapter_name) and adapter_name not in self.merged_adapters:
                change, policy = self._cached_change(adapter_name, x), self.policies[adapter_name]
                whole = self._positions.everywhere(policy)
                x = x + (change if whole else where(self._positions, policy, x) * change)
        return self.base_layer(x, *args, **kwargs)

    def _cached_change(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return `change`, computed once for all short steps of one `generate` where it is the same in each."""
        key = (self._positions.generation, self.scaling[adapter_name], x.dtype)
        before, change = self._changes.get(adapter_name, (None, x))
        if before is not None and before[0] is key[0] and before[1:] == key[1:]:
            return change
        change = self.change(adapter_name, x)
        if key[0] is not None and change.dim() == 1:  # a vector, the same for every token
            self._changes[adapter_name] = (key, change)
        return change

    def check_merge(self, adapter_names: list[str]) -> None:
        """Raise `ValueError` unless these adapters (those of them that the layer has) can become a bias."""
        base = self.get_base_layer()
        for name in adapter_names:
            if name in self.policies:
                check_mergeable(name, self.policies[name], self.configs[name].gate)
            if name in self.head_offsets_roles and self._scales(name):
                raise ValueError(f"Adapter {name!r} still scales heads to choose among them, which no bias computes.")
            if name in self.policies and not hasattr(base, "bias"):
                raise ValueError(f"Cannot merge head offsets into {type(base).__name__}: it has no place for a bias.")

    def added_by_merge(self, adapter_names: list[str] | None) -> list[tuple[nn.Module, str]]:
        base: Any = self.get_base_layer()
        before = self._bias_before_merge if self.merged_adapters else base.bias
        names = self.active_adapters if adapter_names is None else adapter_names
        adds = before is None and any(name in self.head_offsets for name in (*names, *self.merged_adapters))
        return [(base, "bias")] if adds else []

    def follow(self, positions: Positions) -> None:
        """Read the positions of the model's calls from here."""
        self._positions = positions

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._changes.pop(adapter_name, None)
        if not self.configs and "_positions" in self.__dict__:  # the wrapper stays, as peft's do
            model = self._positions.model
            del self._positions
            untrack(model)

    def _scales(self, adapter_name: str) -> bool:
        """Return whether an adapter still scales heads to choose among them by training; False without values."""
        roles = self.head_offsets_roles[adapter_name]
        return not roles.is_meta and bool((roles == SCALE).any())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the edit into the projection's bias: `b + W_o · displacement`, exact for `positions="all"`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.head_offsets]
        self.check_merge(names)
        base: Any = self.get_base_layer()
        for name in names:
            # running the projection itself serves Conv1D, quantised and wrapped layers alike
            with torch.no_grad():
                displacement = self.displacement(name).to(next(self.base_layer.parameters()).device)
                displacement = displacement.to(_float_dtype(self.base_layer))[None]
                change = (self.base_layer(displacement) - self.base_layer(torch.zeros_like(displacement)))[0]
            if safe_merge:
                check_merged(name, [change])
            if not self.merged_adapters:
                self._bias_before_merge = None if base.bias is None else base.bias.detach().clone()
            merged = change if base.bias is None else base.bias.detach() + change
            base.bias = nn.Parameter(merged, requires_grad=False)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the projection's own bias back, bit for bit."""
        if self.merged_adapters:
            base: Any = self.get_base_layer()
            before = self._bias_before_merge
            base.bias = None if before is None else nn.Parameter(before, requires_grad=False)
            self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "head_offsets." + super().__repr__()


def _float_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype to feed `module`: that of its floating-point weights (quantised ones are packed integers)."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
