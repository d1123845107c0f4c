"""Bottleneck adapters: a narrow trained network beside or behind a frozen matrix, its own ones plain or structured."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.bottleneck.config import BottleneckConfig
from lightning_peft.tuners.bottleneck.layer import BottleneckLayer
from lightning_peft.tuners.bottleneck.model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

register_method("bottleneck", BottleneckConfig, BottleneckModel)
