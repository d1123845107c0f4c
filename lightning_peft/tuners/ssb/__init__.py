"""SSB: a weight scaled from both sides by learned vectors, y = u ⊙ W (v ⊙ x) + b; from the input's side alone, SSL."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.ssb.config import SSBConfig
from lightning_peft.tuners.ssb.layer import SSBLayer
from lightning_peft.tuners.ssb.model import SSBModel

__all__ = ["SSBConfig", "SSBLayer", "SSBModel"]

register_method("ssb", SSBConfig, SSBModel)
