"""LoRA-Dash: LoRA, and after a warm-up the singular directions of the weight that it changed most."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.lora_dash.config import LoRADashConfig
from lightning_peft.tuners.lora_dash.layer import LoRADashLayer
from lightning_peft.tuners.lora_dash.model import LoRADashModel

__all__ = ["LoRADashConfig", "LoRADashLayer", "LoRADashModel"]

register_method("lora_dash", LoRADashConfig, LoRADashModel)
