"""The layer that edits the output of one module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import is_linear
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.positions import Positions, PositionsError, untrack
from lightning_peft.stack.gates import placed
from lightning_peft.tokens import Tokens
from lightning_peft.tuners.output_hooks import ChangesOutput, add_output_hook
from lightning_peft.tuners.reft.config import ReftConfig
from lightning_peft.tuners.reft.edit import edit, orthonormal
from lightning_peft.tuners.tuner import TunerLayer, remove_child

ATTRIBUTE = "reft"  # the child that a module gets


class ReftLayer(nn.Module, TunerLayer, ChangesOutput):
    """A child of the module whose output it edits, by a forward hook; the module keeps its name.

    Args:
        owner: the module; it is not registered as a child of this one, which is the owner's child.
        name: its full name.
        positions: of the backbone.
    """

    adapter_layer_names = ("reft_rows", "reft_source", "reft_bias")
    other_param_names = ("reft_dropout", "scaling", "configs")

    def __init__(self, owner: nn.Module, name: str, positions: Positions) -> None:
        super().__init__()
        self.reft_rows = nn.ParameterDict({})  # R [units, r, width], of orthonormal rows what these are made of
        self.reft_source = nn.ParameterDict({})  # W [units, r, width]
        self.reft_bias = nn.ParameterDict({})  # b [units, r]
        self.reft_dropout = nn.ModuleDict({})
        self.scaling: dict[str, float] = {}
        self.configs: dict[str, ReftConfig] = {}
        self.merged_adapters: list[str] = []  # peft asks every layer for it
        self.name = name
        self._positions = positions
        self._active_adapter: list[str] = []
        self.attach(owner)

    def attach(self, owner: nn.Module) -> None:
        """Make this layer a child of a module, and of no other.

        Raises:
            ValueError: it has one of its own already.
        """
        if ATTRIBUTE in owner._modules:
            raise ValueError(f"{self.name} has ReFT below and above an adapter: take the upper out first.")
        if hasattr(self, "_owner"):
            self._detach()
        self._owner: tuple[nn.Module] = (owner,)  # in a tuple, so that it does not become a child
        owner.add_module(ATTRIBUTE, self)
        add_output_hook(owner, self.after)
        self.train(owner.training)

    def _detach(self) -> None:
        owner = self.owner
        remove_child(owner, ATTRIBUTE)
        for key, hook in list(owner._forward_hooks.items()):
            if getattr(hook, "__self__", None) is self:
                del owner._forward_hooks[key]

    @property
    def owner(self) -> nn.Module:
        """The module whose output is edited."""
        return self._owner[0]

    @property
    def in_features(self) -> int:
        """The width of the owner's input, where it is a matrix; else of its output."""
        owner: Any = self.owner
        owner = owner.get_base_layer() if hasattr(owner, "base_layer") else owner
        return matrix_shape(owner)[0] if is_linear(owner) else self.out_features

    @property
    def out_features(self) -> int:
        """The width of the owner's output."""
        return next(iter(self.reft_rows.values())).shape[-1]

    def base_form(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Return the device of the owner's first parameter, and the precision of the first that is not quantised."""
        own = set(self.parameters())
        others = [parameter for parameter in self.owner.parameters() if parameter not in own]
        dtypes = (parameter.dtype for parameter in others if parameter.is_floating_point())
        return (others[0].device if others else None), next(dtypes, None)

    def update_layer(self, adapter_name: str, config: ReftConfig) -> None:
        """Give the layer the edits of one more adapter."""
        assert config.width is not None
        shape = (config.units, config.r, config.width)
        for held, size in ((self.reft_rows, shape), (self.reft_source, shape), (self.reft_bias, shape[:2])):
            held[adapter_name] = nn.Parameter(torch.empty(size))
        # a new module is in training, and its owner may not be
        self.reft_dropout[adapter_name] = nn.Dropout(config.dropout).train(self.owner.training)
        self.scaling[adapter_name], self.configs[adapter_name] = config.alpha, config
        self._initialise(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._begin_as_nothing(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _initialise(self, adapter_name: str) -> None:
        config, bias = self.configs[adapter_name], self.reft_bias[adapter_name]
        if bias.is_meta:  # the values come later, from a file
            return
        for rows, source in zip(self.reft_rows[adapter_name], self.reft_source[adapter_name], strict=True):
            if config.orthogonal:
                nn.init.orthogonal_(rows)
            else:
                nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
            nn.init.kaiming_uniform_(source, a=math.sqrt(5))  # as in a linear layer, likewise the bias
        nn.init.uniform_(bias, -(self.out_features**-0.5), self.out_features**-0.5)

    @torch.no_grad()
    def _begin_as_nothing(self, adapter_name: str) -> None:
        """Let an untrained adapter change nothing, bit for bit, unless it is to begin as the authors'."""
        config = self.configs[adapter_name]
        if config.init_reft_weights is True and not self.reft_bias[adapter_name].is_meta:
            self.reft_bias[adapter_name].zero_()
            for unit, source in enumerate(self.reft_source[adapter_name]):
                source.copy_(self.rows(adapter_name, unit)) if config.subtract else source.zero_()

    def cast_to_base(self, adapter_name: str) -> None:
        super().cast_to_base(adapter_name)
        self._begin_as_nothing(adapter_name)  # rounded apart, W and R would differ

    def rows(self, adapter_name: str, unit: int = 0) -> Tensor:
        """Return R `[r, width]` of one of an adapter's edits, its rows orthonormal where they are to be."""
        rows = self.reft_rows[adapter_name][unit]
        return orthonormal(rows) if self.configs[adapter_name].orthogonal else rows

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Edit the owner's output, or the first element of a tuple; a forward hook of the owner."""
        if self.disable_adapters:
            return None  # it stays as it is
        first = h = output if isinstance(output, Tensor) else output[0]
        for name in self.active_adapters:
            # strength 0 edits nothing, and must not need to know where the prompt ends
            if name in self.configs and self.scaling[name] != 0:
                h = self._edited(name, h)
        if h is first:
            return None
        return h if isinstance(output, Tensor) else (h, *output[1:])

    def _edited(self, adapter_name: str, h: Tensor) -> Tensor:
        config = self.configs[adapter_name]
        if h.shape[-1] != config.width:
            raise ValueError(
                f"{self.name} gives {h.shape[-1]} features, but adapter {adapter_name!r} was made for width="
                f"{config.width}."
            )
        edited = h
        for unit in range(config.units):
            policies = config.selections if config.share_weights else [config.selections[unit]]
            acting = self._acting(adapter_name, policies)
            if not acting:
                continue
            rows, source, bias = (
                tensor.to(h.device)
                for tensor in (
                    self.rows(adapter_name, unit),
                    self.reft_source[adapter_name][unit],
                    self.reft_bias[adapter_name][unit],
                )
            )
            change = edit(h, rows, source, bias, config.subtract, config.activation)
            change = self.reft_dropout[adapter_name](self.scaling[adapter_name] * change)
            moved = h + change.to(h.dtype)
            mask = self._mask(acting, h)
            edited = moved if mask is None else torch.where(mask, moved, edited)
        return edited

    def _acting(self, adapter_name: str, policies: list[str]) -> list[str]:
        """Return the selections that may have a token of the current call.

        Raises:
            PositionsError: in training, nothing says where the prompt ends, so that nothing would be trained.
        """
        needing = [policy for policy in policies if Tokens.parse(policy).phase == "prompt"]
        trains = self.training and torch.is_grad_enabled() and self.reft_bias[adapter_name].requires_grad
        if needing and trains and not self._positions.prompt_known and not torch.compiler.is_compiling():
            raise PositionsError(
                f"Adapter {adapter_name!r} edits {needing[0]!r} tokens, and nothing says where the prompts of this "
                "batch end, so that it would train on none: give prompt_end or labels in the batch, or choose "
                'positions such as "all[0:7]" or "all".'
            )
        return [policy for policy in policies if not self._positions.nowhere(policy, prompts=True)]

    def _mask(self, policies: list[str], h: Tensor) -> Tensor | None:
        """Return the tokens of any of the selections, shaped to choose from h; None: every one."""
        if "all" in policies:
            return None
        masks = [placed(self._positions.mask(policy, prompts=True), self._positions, h) for policy in policies]
        return torch.stack(masks).any(0)

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
        return "reft." + super().__repr__()
