"""The tuner that puts singular-value tuning into a model."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.tuners.linear_wrapper import fill_in_targets
from lightning_peft.tuners.singular_values.config import SingularValuesConfig
from lightning_peft.tuners.singular_values.layer import SingularValuesLayer
from lightning_peft.tuners.tuner import Tuner


class SingularValuesModel(Tuner[SingularValuesConfig, SingularValuesLayer]):
    """Wrap linear layers in `SingularValuesLayer`; see `SingularValuesConfig`.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.singular_values import SingularValuesConfig
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> config = SingularValuesConfig(target_modules=["0", "2"])
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        5
    """

    prefix: str = "singular_"
    tuner_layer_cls = SingularValuesLayer

    def _check_config(self, config: SingularValuesConfig) -> None:
        fill_in_targets(config, self.model, "SingularValues could change")

    def _adapt(
        self,
        config: SingularValuesConfig,
        adapter_name: str,
        target: nn.Module,
        name: str,
        parent: nn.Module,
        key: str,
    ) -> None:
        if isinstance(target, SingularValuesLayer):
            target.update_layer(adapter_name, config)
        else:
            check_called([key], self.model)
            setattr(parent, name, SingularValuesLayer(target, adapter_name, config, key))
