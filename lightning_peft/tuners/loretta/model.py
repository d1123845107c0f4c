"""The tuner that puts LoRETTA into a model."""

from __future__ import annotations

from torch import nn

from lightning_peft.backbone.fused import check_called
from lightning_peft.backbone.parts import attentions
from lightning_peft.backbone.projections import projections
from lightning_peft.backbone.targets import Layers
from lightning_peft.tuners.loretta.config import LoRETTAConfig
from lightning_peft.tuners.loretta.layer import LoRETTALayer
from lightning_peft.tuners.targets import default_blocks
from lightning_peft.tuners.tuner import Tuner


def query_and_value(model: nn.Module, layers: Layers | list[int] | None = None) -> list[str]:
    """Return the names of the matrices that give queries and values; where one gives all three, of that one.

    Raises:
        ValueError: the model has no attention in its blocks, or not these blocks.
    """
    found = [projections(span) for span in attentions(model, layers)]
    return [name for p in found for name in (p.query, p.value) if name]


class LoRETTAModel(Tuner[LoRETTAConfig, LoRETTALayer]):
    """Wrap linear layers in `LoRETTALayer`; see `LoRETTAConfig`.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.loretta import LoRETTAConfig
        >>> model = nn.Sequential(nn.Linear(768, 768))
        >>> config = LoRETTAConfig(target_modules=["0"])
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        1160
    """

    prefix: str = "loretta_"
    tuner_layer_cls = LoRETTALayer

    def _check_config(self, config: LoRETTAConfig) -> None:
        if config.target_modules is None:
            config.target_modules = query_and_value(self.model, default_blocks(config))
        if not config.target_modules:
            raise ValueError("target_modules is empty: name linear layers, or give a regular expression.")

    def _adapt(
        self, config: LoRETTAConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        if isinstance(target, LoRETTALayer):
            target.update_layer(adapter_name, config)
        else:
            check_called([key], self.model)
            setattr(parent, name, LoRETTALayer(target, adapter_name, config, key))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # peft expects the name to be the last or the last but one in a key, and here a train's cores stand under it
        for side in ("loretta_A", "loretta_B"):
            shorter = key.replace(f".{side}.{adapter_name}.", f".{side}.")
            if shorter != key:
                return shorter
        return super()._remove_adapter_name_from_key(key, adapter_name)
