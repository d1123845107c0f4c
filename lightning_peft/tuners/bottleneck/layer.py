"""The wrapper around one frozen matrix that a bottleneck adapter adds to."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from lightning_peft.backbone.modules import is_linear, is_matrix
from lightning_peft.backbone.structure import matrix_shape
from lightning_peft.per_thread import PerThread
from lightning_peft.tuners.bottleneck.branch import Bottleneck
from lightning_peft.tuners.bottleneck.config import BottleneckConfig
from lightning_peft.tuners.bottleneck.hooks import add_to_stream, leave_stream


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Add `alpha * b(z)` to the output `y` of the wrapped matrix, or to the residual stream, one `b` for each adapter.

    z is y, the matrix's own input, or the input of another module that runs earlier in the same call; the latter is
    noted when that module is called and forgotten once it was used. On the stream a hook of the module that gives it
    asks for the change, and the matrix gives what it always did.
    """

    adapter_layer_names = ("bottleneck", "bottleneck_rule")
    other_param_names = ("scaling", "configs", "_sources", "_sites", "_owners")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = matrix_shape(self.get_base_layer())
        self.bottleneck = nn.ModuleDict()
        self.bottleneck_rule = nn.ParameterDict()  # what a Kronecker adapter shares, in the layer that owns it
        self.scaling: dict[str, float] = {}
        self.configs: dict[str, BottleneckConfig] = {}
        self.merged_adapters: list[str] = []
        # modules that are not this layer's children stand in tuples, out of sight of nn.Module
        self._sources: dict[str, tuple[nn.Module]] = {}
        self._sites: dict[str, tuple[nn.Module]] = {}
        self._owners: dict[str, tuple[BottleneckLayer]] = {}
        self._noted: PerThread[dict[str, Tensor]] = PerThread()
        self._before_merge: tuple[Tensor, Tensor | None] | None = None
        self._active_adapter = adapter_name

    @property
    def acts_alone(self) -> bool:
        """True where the layer needs nothing but its own input."""
        return not (self._sources or self._sites)

    def update_layer(
        self,
        adapter_name: str,
        config: BottleneckConfig,
        site: nn.Module | None = None,
        owner: BottleneckLayer | None = None,
        norm: bool = False,
    ) -> None:
        """Give the layer one more adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            site: parallel, the module whose input the adapter reads, None for its own; on the stream, the module
                whose output it reads and adds to.
            owner: the layer that holds what a Kronecker adapter shares; None: this one is to hold it.
            norm: the site is a norm of the sum that the adapter adds to.
        """
        inputs, outputs = matrix_shape(self)
        if config.placement != "parallel":
            inputs = outputs
        elif site is not None:  # what is no matrix is given the stream, which is as wide as what is added to it
            inputs = matrix_shape(site)[0] if is_matrix(site) else outputs
        self.bottleneck[adapter_name] = Bottleneck(inputs, outputs, config)
        self.scaling[adapter_name], self.configs[adapter_name] = config.alpha, config
        if site is not None and config.placement == "stream":
            self._sites[adapter_name] = (site,)
            add_to_stream(site, self, adapter_name, norm)
        elif site is not None:
            self._sources[adapter_name] = (site,)
            site.register_forward_pre_hook(_Note(self, adapter_name))
        if config.kronecker:
            if owner is None:
                rule = torch.empty(*[config.kronecker] * 3).normal_(std=config.kronecker_std)
                self.bottleneck_rule[adapter_name] = nn.Parameter(rule)
            self._owners[adapter_name] = (owner or self,)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        for name in self._acting():
            if name in self._sites:
                continue
            z = y
            if name in self._sources:
                z = self._take_note(name, y)
            elif self.configs[name].placement == "parallel":
                z = x
            y = y + self._change(name, z).to(y.dtype)
        return y

    def stream_change(self, adapter_name: str, z: Tensor) -> Tensor | None:
        """Return what an adapter adds to the residual stream that it reads as `z`; None where it does not act."""
        if self.disable_adapters or adapter_name not in self._acting():
            return None
        return self._change(adapter_name, z).to(z.dtype)

    def _change(self, adapter_name: str, z: Tensor) -> Tensor:
        branch: Any = self.bottleneck[adapter_name]
        out: Tensor = branch(z.to(next(branch.parameters()).dtype), self._rule(adapter_name))
        return self.scaling[adapter_name] * out

    def note(self, adapter_name: str, x: Tensor) -> None:
        """Note the input of an adapter's source in this call."""
        if not self.disable_adapters and adapter_name in self._acting():
            self._noted.set({**(self._noted.get() or {}), adapter_name: x})

    def check_merge(self, adapter_names: list[str]) -> None:
        """Raise `ValueError` unless these adapters (those of them that the layer has) can become weights."""
        base: Any = self.get_base_layer()
        for name in adapter_names:
            if name in self.configs and not self.configs[name].merges():
                raise ValueError(
                    f"Adapter {name!r} is not a linear map of the matrix's own input or output "
                    f"(activation={self.configs[name].activation!r}), so it cannot be written into the weights."
                )
            if name in self.configs and not (is_linear(base) and base.weight.is_floating_point()):
                raise ValueError(f"Cannot merge a bottleneck into {type(base).__name__}, only into plain matrices.")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write linear adapters into the matrix: `W + M`, or sequential `(1 + M) W` and `(1 + M) b`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bottleneck]
        self.check_merge(names)
        base: Any = self.get_base_layer()
        for name in names:
            weight = base.weight.detach() if isinstance(base, nn.Linear) else base.weight.detach().T
            branch: Any = self.bottleneck[name]
            change = self.scaling[name] * branch.matrix(self._rule(name))
            bias = None if base.bias is None else base.bias.detach()
            if self.configs[name].placement == "sequential":
                bias = None if bias is None else (bias + change @ bias.to(change.dtype)).to(bias.dtype)
                change = change @ weight.to(change.dtype)
            weight = (weight + change).to(weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                # peft's words, by which callers know it
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: it would put NaN or "
                    "infinity into them."
                )
            if not self.merged_adapters:
                self._before_merge = (base.weight.data, None if base.bias is None else base.bias.data)
            base.weight.data = weight if isinstance(base, nn.Linear) else weight.T.contiguous()
            if bias is not None:
                base.bias.data = bias
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the matrix's own weights back, bit for bit."""
        if self._before_merge is not None:
            base: Any = self.get_base_layer()
            weight, bias = self._before_merge
            base.weight.data = weight
            if bias is not None:
                base.bias.data = bias
            self._before_merge = None
            self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out, and what it hung on another module."""
        self.leave_sites(adapter_name)
        super().delete_adapter(adapter_name)

    def leave_sites(self, adapter_name: str) -> None:
        """Take an adapter's hooks off other modules."""
        for site in self._sites.get(adapter_name, ()):
            leave_stream(site, self, adapter_name)
        for source in self._sources.get(adapter_name, ()):
            for key, hook in list(source._forward_pre_hooks.items()):
                if isinstance(hook, _Note) and hook.layer is self and hook.adapter_name == adapter_name:
                    del source._forward_pre_hooks[key]

    def _acting(self) -> list[str]:
        """Return the active adapters that are not merged, without those at strength 0: the base stays bit for bit."""
        return [
            name
            for name in self.active_adapters
            if name in self.bottleneck and name not in self.merged_adapters and self.scaling[name] != 0
        ]

    def _rule(self, adapter_name: str) -> Tensor | None:
        if adapter_name not in self._owners:
            return None
        (owner,) = self._owners[adapter_name]
        return owner.bottleneck_rule[adapter_name]

    def _take_note(self, adapter_name: str, y: Tensor) -> Tensor:
        noted = dict(self._noted.get() or {})
        z = noted.pop(adapter_name, None)
        self._noted.set(noted)
        if z is None or z.shape[:-1] != y.shape[:-1]:
            reason = "it was not called before" if z is None else f"it had an input of shape {tuple(z.shape)}"
            raise RuntimeError(
                f"Parallel adapter {adapter_name!r} adds to an output of shape {tuple(y.shape)} and reads the input of "
                f"another matrix of the same part, but {reason}."
            )
        return z

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


class _Note:
    """A forward pre-hook that hands a module's input to the layer behind it; copied and pickled with both."""

    def __init__(self, layer: BottleneckLayer, adapter_name: str) -> None:
        self.layer, self.adapter_name = layer, adapter_name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.layer.note(self.adapter_name, args[0])
