"""The layer that moves the output of one module."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.positions import Positions, untrack
from lightning_peft.stack.gates import check_mergeable, gated, where
from lightning_peft.tuners.layer_offsets.config import LayerOffsetsConfig
from lightning_peft.tuners.layer_offsets.writing import check_write, innermost, unit, written
from lightning_peft.tuners.output_hooks import ChangesOutput, add_output_hook
from lightning_peft.tuners.tuner import TunerLayer, check_merged, remove_child

ATTRIBUTE = "layer_edits"  # the child that a module gets


class LayerOffsetsLayer(nn.Module, TunerLayer, ChangesOutput):
    """A child of the module whose output it moves, by a forward hook.

    The module stays what it is and keeps its name, since blocks are asked for what they hold: a wrapper would rename
    everything in them.

    Args:
        owner: the module; it is not registered as a child of this one, which is the owner's child.
        name: its full name.
        positions: of the backbone.
    """

    adapter_layer_names = ("layer_offsets",)
    other_param_names = ("layer_offsets_probe", "scaling", "configs")

    def __init__(self, owner: nn.Module, name: str, positions: Positions) -> None:
        super().__init__()
        self.layer_offsets = nn.ParameterDict({})
        self.layer_offsets_probe = BufferDict(persistent=True)
        self.scaling: dict[str, float] = {}
        self.configs: dict[str, LayerOffsetsConfig] = {}
        self.merged_adapters: list[str] = []
        self.name = name
        self._before_merge: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._positions = positions
        self._active_adapter: list[str] = []
        self.attach(owner)

    def attach(self, owner: nn.Module) -> None:
        """Make this layer a child of a module, and of no other.

        Raises:
            ValueError: it has one of its own already.
        """
        if ATTRIBUTE in owner._modules:
            raise ValueError(f"{self.name} has layer offsets below and above an adapter: take the upper out first.")
        if hasattr(self, "_owner"):
            self._detach()
        # in tuples, so that they do not become children
        self._owner: tuple[nn.Module] = (owner,)
        self._writes: tuple[nn.Module] | None = None
        owner.add_module(ATTRIBUTE, self)
        add_output_hook(owner, self.after)

    def _detach(self) -> None:
        owner = self.owner
        remove_child(owner, ATTRIBUTE)
        for key, hook in list(owner._forward_hooks.items()):
            if getattr(hook, "__self__", None) is self:
                del owner._forward_hooks[key]

    @property
    def owner(self) -> nn.Module:
        """The module whose output is moved."""
        return self._owner[0]

    @property
    def in_features(self) -> int:
        """The width of the owner's input, where it is a matrix; else of its output."""
        owner = innermost(self.owner)
        return matrix_shape(owner)[0] if is_linear(owner) else self.out_features

    @property
    def out_features(self) -> int:
        """The width of the owner's output."""
        return next(iter(self.layer_offsets.values())).shape[-1]

    def base_form(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Return the device of the owner's first parameter, and the precision of the first that is not quantised."""
        own = set(self.parameters())
        others = [parameter for parameter in self.owner.parameters() if parameter not in own]
        dtypes = (parameter.dtype for parameter in others if parameter.is_floating_point())
        return (others[0].device if others else None), next(dtypes, None)

    def write_to(self, matrix: nn.Module | None) -> None:
        """Set the matrix whose bias is one of the owner's output, where the owner is no matrix itself."""
        self._writes = None if matrix is None else (matrix,)

    def forget_merged(self) -> None:
        """Forget the parameters from before a merge, so that it stays for good."""
        self._before_merge.clear()

    def update_layer(self, adapter_name: str, config: LayerOffsetsConfig) -> None:
        """Give the layer zero vectors for one more adapter."""
        assert config.width is not None
        self.layer_offsets[adapter_name] = nn.Parameter(torch.zeros(config.tokens, config.width))
        if config.gate is not None:
            self.layer_offsets_probe[adapter_name] = torch.zeros(config.width + 1)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.scaling[adapter_name], self.configs[adapter_name] = config.alpha, config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Move the owner's output, or the first element of a tuple; a forward hook of the owner."""
        if self.disable_adapters:
            return None  # it stays as it is
        first = x = output if isinstance(output, Tensor) else output[0]
        for name in self.active_adapters:
            # strength 0 edits nothing, and must not need to know where the answer begins
            if name in self.configs and name not in self.merged_adapters and self.scaling[name] != 0:
                x = self._moved(name, x)
        if x is first:
            return None
        return x if isinstance(output, Tensor) else (x, *output[1:])

    def _moved(self, adapter_name: str, x: Tensor) -> Tensor:
        config, vectors = self.configs[adapter_name], self.layer_offsets[adapter_name].to(x.device)
        if x.shape[-1] != vectors.shape[-1]:
            raise ValueError(
                f"{self.name} gives {x.shape[-1]} features, but adapter {adapter_name!r} was made for width="
                f"{vectors.shape[-1]}."
            )
        if config.operation == "ablate":
            d = unit(vectors[0])
            vectors = -(x.to(d.dtype) * d).sum(-1, keepdim=True) * d
        change = (self.scaling[adapter_name] * vectors).to(x.dtype)
        mask = self._mask(adapter_name, config, x)
        if config.tokens > 1:
            return x + mask @ change
        return x + (change if mask is None else mask * change)

    def _mask(self, adapter_name: str, config: LayerOffsetsConfig, x: Tensor) -> Any:
        """Return how much of each vector a token gets, `[..., tokens]`; None: all of it, everywhere."""
        mask: Tensor | None = None
        if config.tokens > 1 and self._positions.by_mask:
            raise ValueError(
                f"Adapter {adapter_name!r} has a vector for each of {config.tokens} tokens, and a mask does not say "
                "which is which: give the start of the answers instead."
            )
        if config.tokens > 1 or not self._positions.everywhere(config.positions):
            mask = torch.cat([where(self._positions, policy, x) for policy in config.policies], -1)
        if config.gate is not None:
            probe = self.layer_offsets_probe[adapter_name]
            strength = gated(x, probe, config.gate, config.beta, config.threshold)[..., None].to(x.dtype)
            mask = strength if mask is None else mask * strength
        return mask

    def check_merge(self, adapter_names: list[str]) -> None:
        """Raise `ValueError` unless these adapters (those of them that the layer has) can be written into weights."""
        for name in adapter_names:
            if name in self.configs:
                config = self.configs[name]
                check_mergeable(name, config.policies[0], config.gate)
                check_write(self._matrix(config.operation), config.operation, self.name)

    def added_by_merge(self, adapter_names: list[str] | None) -> list[tuple[nn.Module, str]]:
        names = self.active_adapters if adapter_names is None else adapter_names
        added = [(matrix, key) for matrix, key, before in self._before_merge if before is None]
        for name in names:
            if name in self.configs and name not in self.merged_adapters and self.configs[name].operation == "add":
                matrix = self._matrix("add")
                if is_linear(matrix) and getattr(matrix, "bias", None) is None:
                    added.append((matrix, "bias"))
        return list(dict.fromkeys(added))

    def _matrix(self, operation: str) -> nn.Module:
        """Return the module whose weights give the output."""
        owner = innermost(self.owner)
        return self._writes[0] if self._writes is not None and operation == "add" else owner

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the edit into a bias (added) or into weights and bias (ablated) of the matrix that gives the output."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        self.check_merge(names)
        for name in names:
            operation = self.configs[name].operation
            matrix = self._matrix(operation)
            new = written(matrix, self.layer_offsets[name][0], operation, self.scaling[name])
            if safe_merge:
                check_merged(name, new.values())
            for key, value in new.items():
                self._before_merge.append((matrix, key, getattr(matrix, key)))
                setattr(matrix, key, nn.Parameter(value, requires_grad=False))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the matrix's own parameters back, the very objects, so that what was tied is tied again."""
        while self._before_merge:
            matrix, key, parameter = self._before_merge.pop()
            setattr(matrix, key, parameter)
        self.merged_adapters.clear()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not self.configs:
            self._detach()
            untrack(self._positions.model)

    def get_base_layer(self) -> nn.Module:
        """Return a module without anything: no other is wrapped."""
        return nn.Module()

    def _get_available_adapters(self) -> set[str]:
        return set(self.configs)

    def __repr__(self) -> str:
        return "layer_offsets." + super().__repr__()
