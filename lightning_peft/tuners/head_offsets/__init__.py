"""Head offsets: a vector per attention head, added where the concatenated heads enter the output projection."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.head_offsets.config import HeadOffsetsConfig
from lightning_peft.tuners.head_offsets.layer import HeadOffsetsLayer
from lightning_peft.tuners.head_offsets.model import HeadOffsetsModel

__all__ = ["HeadOffsetsConfig", "HeadOffsetsLayer", "HeadOffsetsModel"]

register_method("head_offsets", HeadOffsetsConfig, HeadOffsetsModel)
