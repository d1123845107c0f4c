"""ReFT: a trained edit of low rank of what blocks give, at chosen tokens."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.reft.config import ReftConfig
from lightning_peft.tuners.reft.layer import ReftLayer
from lightning_peft.tuners.reft.model import ReftModel

__all__ = ["ReftConfig", "ReftLayer", "ReftModel"]

register_method("reft", ReftConfig, ReftModel)
