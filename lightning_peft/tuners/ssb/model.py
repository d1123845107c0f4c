"""The tuner that puts SSB into a model."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.tuners.ssb.config import SSBConfig
from lightning_peft.tuners.ssb.layer import SSBLayer


class SSBModel(BaseTuner):
    """Wraps linear layers in `SSBLayer`; see `SSBConfig`.

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
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's own annotation

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: SSBConfig, model_config: dict
    ) -> SSBConfig:
        if not peft_config.target_modules:
            raise ValueError("SSBConfig needs target_modules: names of linear layers, or a regular expression.")
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SSBConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, SSBLayer):
            target.update_layer(adapter_name, peft_config)
        else:
            check_called([current_key], self.model)
            setattr(parent, target_name, SSBLayer(target, adapter_name, peft_config, current_key))
