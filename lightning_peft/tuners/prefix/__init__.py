"""Trained keys and values that stand before those of the tokens in chosen attentions of a transformers model."""

from lightning_peft.stack.registration import register_method
from lightning_peft.tuners.prefix.config import PrefixConfig
from lightning_peft.tuners.prefix.layer import PrefixLayer
from lightning_peft.tuners.prefix.model import PrefixModel

__all__ = ["PrefixConfig", "PrefixLayer", "PrefixModel"]

register_method("attention_prefix", PrefixConfig, PrefixModel)
