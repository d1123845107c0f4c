"""LoRTA: one CP tensor of low rank for the updates of all attention matrices, of all heads and all layers."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.lorta.config import LoRTAConfig
from lightning_peft.tuners.lorta.layer import LoRTALayer
from lightning_peft.tuners.lorta.model import LoRTAModel

__all__ = ["LoRTAConfig", "LoRTALayer", "LoRTAModel"]

register_method("lorta", LoRTAConfig, LoRTAModel)
