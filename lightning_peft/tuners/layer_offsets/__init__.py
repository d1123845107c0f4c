"""Layer offsets: a vector added to what blocks or their parts give, or a direction taken out of it."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.layer_offsets.config import LayerOffsetsConfig
from lightning_peft.tuners.layer_offsets.layer import LayerOffsetsLayer
from lightning_peft.tuners.layer_offsets.model import LayerOffsetsModel

__all__ = ["LayerOffsetsConfig", "LayerOffsetsLayer", "LayerOffsetsModel"]

register_method("layer_offsets", LayerOffsetsConfig, LayerOffsetsModel)
