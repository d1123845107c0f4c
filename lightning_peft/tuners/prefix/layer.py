"""The wrapper around one attention's query projection, which keeps that attention's prefixes."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.per_thread import PerThread
from lightning_peft.tuners.prefix.attention import attach, detach
from lightning_peft.tuners.prefix.config import PrefixConfig


class PrefixLayer(nn.Module, BaseTunerLayer):
    """Run the query projection as it is, note the gates of its tokens, and give the attention its prefixes.

    Args:
        base_layer: the matrix that gives the queries; its input is the attention's.
        adapter_name: the first adapter.
        attention: the module it stands in.
    """

    adapter_layer_names = ("prefix_key", "prefix_value", "prefix_mix", "prefix_gate")
    other_param_names = ("scaling", "_biased")

    def __init__(self, base_layer: nn.Module, adapter_name: str, attention: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prefix_key = nn.ParameterDict()
        self.prefix_value = nn.ParameterDict()
        self.prefix_mix = nn.ParameterDict()
        self.prefix_gate = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        # attentions that give biases of relative positions, in tuples as the one below
        self._biased: dict[str, tuple[nn.Module]] = {}
        self._gates: PerThread[dict[str, Tensor]] = PerThread()
        self._attention = (attention,)  # in a tuple, out of sight of nn.Module: it is no child
        self._active_adapter = adapter_name

    def update_layer(
        self,
        adapter_name: str,
        config: PrefixConfig,
        key_width: int,
        value_width: int,
        biased: nn.Module | None = None,
    ) -> None:
        """Give the attention one more prefix.

        Args:
            adapter_name: its name.
            config: its configuration.
            key_width: of the keys of all heads.
            value_width: likewise.
            biased: the attention whose biases of relative positions count the prefix too; None: they do not.
        """
        if biased is not None:
            self._biased[adapter_name] = (biased,)
        self.prefix_key[adapter_name] = nn.Parameter(torch.empty(config.length, key_width).normal_(std=config.std))
        self.prefix_value[adapter_name] = nn.Parameter(torch.empty(config.length, value_width).normal_(std=config.std))
        if config.init == "identity":
            self.prefix_mix[adapter_name] = nn.Parameter(torch.zeros(1))
        if config.gate:
            gate = nn.Linear(matrix_shape(self)[0], 1)
            nn.init.normal_(gate.weight, std=0.02)
            nn.init.zeros_(gate.bias)
            self.prefix_gate[adapter_name] = gate
        self.scaling[adapter_name] = config.alpha
        self._move_adapter_to_device_of_base_layer(adapter_name)
        attach(self._attention[0], self)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for name in self.acting():
            if name in self.prefix_gate:
                gate: Any = self.prefix_gate[name]
                value = torch.sigmoid(gate(x.to(gate.weight.dtype)))
                self._gates.set({**(self._gates.get() or {}), name: value})
        return self.base_layer(x, *args, **kwargs)

    def acting(self) -> list[str]:
        """Return the prefixes that act; those at strength 0 are left out, so the base stays bit for bit."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.prefix_key and self.scaling[name] != 0]

    def prefix(self, adapter_name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys and values `[B, heads_kv, length, head_dim]` that go before `key` and `value`, and the gate
        of every query, `[B, T, 1]` or None."""
        expanded = []
        for states, prefix in ((key, self.prefix_key[adapter_name]), (value, self.prefix_value[adapter_name])):
            rows, heads, _, size = states.shape
            if prefix.shape[1] != heads * size:
                raise ValueError(
                    f"The prefix is {prefix.shape[1]} wide, but the attention has {heads} heads of {size} features."
                )
            split = prefix.to(states.dtype).view(-1, heads, size).transpose(0, 1)
            expanded.append(split.expand(rows, -1, -1, -1))
        gate = None
        if adapter_name in self.prefix_gate:
            gates = dict(self._gates.get() or {})
            gate = gates.pop(adapter_name, None)
            self._gates.set(gates)
            if gate is None:
                raise RuntimeError(f"The gate of prefix {adapter_name!r} was not computed: its projection did not run.")
        return expanded[0], expanded[1], gate

    def position_bias(self, adapter_name: str, bias: Tensor, length: int) -> Tensor:
        """Return biases `[1, heads, T, length + S]` of positions, given those of the tokens alone."""
        if adapter_name not in self._biased:
            return torch.cat([bias.new_zeros(*bias.shape[:-1], length), bias], -1)
        source: Any = self._biased[adapter_name][0]
        queries, keys = bias.shape[-2:]
        counted: Tensor = source.compute_bias(queries, length + keys, bias.device, past_seen_tokens=keys - queries)
        return counted.to(bias.dtype)

    def strength(self, adapter_name: str) -> Tensor | float | None:
        """Return the factor of the prefix's change of the output; None for 1."""
        alpha = self.scaling[adapter_name]
        if adapter_name in self.prefix_mix:
            return alpha * torch.tanh(self.prefix_mix[adapter_name])
        return None if alpha == 1 else alpha

    def delete_adapter(self, adapter_name: str) -> None:
        """Take a prefix out; after the last one the attention is as it was."""
        super().delete_adapter(adapter_name)
        if not self.prefix_key:
            detach(self._attention[0], self)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise `ValueError`: a prefix cannot be merged."""
        raise ValueError("A prefix is seen by the softmax of every query and cannot be written into the weights.")

    def unmerge(self) -> None:
        """Do nothing: nothing was merged."""

    def __repr__(self) -> str:
        return "prefix." + super().__repr__()
