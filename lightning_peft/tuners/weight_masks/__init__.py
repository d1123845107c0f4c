"""Weight masks: frozen weights of which a learned part is 0, W ∘ M; one bit an entry when saved."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.weight_masks.config import WeightMasksConfig
from lightning_peft.tuners.weight_masks.layer import WeightMasksLayer
from lightning_peft.tuners.weight_masks.model import WeightMasksModel

__all__ = ["WeightMasksConfig", "WeightMasksLayer", "WeightMasksModel"]

register_method("weight_masks", WeightMasksConfig, WeightMasksModel)
