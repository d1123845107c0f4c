"""Weight deltas: chosen parameters of a model trained as what is added to them, all entries or some."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.weight_deltas.config import WeightDeltasConfig
from lightning_peft.tuners.weight_deltas.layer import WeightDeltasLayer
from lightning_peft.tuners.weight_deltas.model import WeightDeltasModel

__all__ = ["WeightDeltasConfig", "WeightDeltasLayer", "WeightDeltasModel"]

register_method("weight_deltas", WeightDeltasConfig, WeightDeltasModel)
