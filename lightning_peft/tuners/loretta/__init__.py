"""LoRETTA's re-parametrising form: a LoRA whose two matrices are tensor trains."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.loretta.config import LoRETTAConfig
from lightning_peft.tuners.loretta.layer import LoRETTALayer
from lightning_peft.tuners.loretta.model import LoRETTAModel

__all__ = ["LoRETTAConfig", "LoRETTALayer", "LoRETTAModel"]

register_method("loretta", LoRETTAConfig, LoRETTAModel)
