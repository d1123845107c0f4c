"""The tuner that puts SSB into a model."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.backbone.linear_layers import linear_layers
from lightning_peft.backbone.targets import choose_targets
from lightning_peft.tuners.ssb.config import SSBConfig
from lightning_peft.tuners.ssb.layer import SSBLayer
from lightning_peft.tuners.targets import default_blocks
from lightning_peft.tuners.tuner import Tuner


class SSBModel(Tuner[SSBConfig, SSBLayer]):
    """Wrap linear layers in `SSBLayer`; see `SSBConfig`.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.ssb import SSBConfig
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> config = SSBConfig(target_modules=["0", "2"])
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        12
    """

    prefix: str = "ssb_"
    tuner_layer_cls = SSBLayer

    def _check_config(self, config: SSBConfig) -> None:
        if config.target_modules is None:
            names, layers = linear_layers(self.model), default_blocks(config)
            config.target_modules = names if layers is None else choose_targets(self.model, names, layers)
        if not config.target_modules:
            raise ValueError(
                f"{type(self.model).__name__} has no linear layers that SSB could scale, or target_modules is empty: name "
                "them, or give a regular expression."
            )

    def _adapt(
        self, config: SSBConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        if isinstance(target, SSBLayer):
            target.update_layer(adapter_name, config)
        else:
            check_called([key], self.model)
            setattr(parent, name, SSBLayer(target, adapter_name, config, key))
