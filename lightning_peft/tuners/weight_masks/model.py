"""The tuner that puts weight masks into a model."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.tuners.linear_wrapper import fill_in_targets
from lightning_peft.tuners.tuner import Tuner
from lightning_peft.tuners.weight_masks.config import WeightMasksConfig
from lightning_peft.tuners.weight_masks.layer import WeightMasksLayer


class WeightMasksModel(Tuner[WeightMasksConfig, WeightMasksLayer]):
    """Wrap linear layers in `WeightMasksLayer`; see `WeightMasksConfig`.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.weight_masks import WeightMasksConfig
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> config = WeightMasksConfig(target_modules=["0", "2"])
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        18
    """

    prefix: str = "weight_mask_"
    tuner_layer_cls = WeightMasksLayer
    # a mask is of the layer's own weight, into which other adapters are written after it
    innermost = True

    def _check_config(self, config: WeightMasksConfig) -> None:
        fill_in_targets(config, self.model, "could be masked")

    def _adapt(
        self, config: WeightMasksConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        if isinstance(target, WeightMasksLayer):
            target.update_layer(adapter_name, config, key)
        else:
            check_called([key], self.model)
            setattr(parent, name, WeightMasksLayer(target, adapter_name, config, key))
