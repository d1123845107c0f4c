"""Singular-value tuning: a weight whose singular values are trained and whose singular vectors stay."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.singular_values.config import SingularValuesConfig
from lightning_peft.tuners.singular_values.layer import SingularValuesLayer
from lightning_peft.tuners.singular_values.model import SingularValuesModel

__all__ = ["SingularValuesConfig", "SingularValuesLayer", "SingularValuesModel"]

register_method("singular_values", SingularValuesConfig, SingularValuesModel)
