"""The tuner that puts prefixes into the attentions of a transformers model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lightning_peft.backbone.modules import base_modules
from lightning_peft.backbone.parts import attentions
from lightning_peft.backbone.projections import projections
from lightning_peft.backbone.structure import blocks, matrix_shape
from lightning_peft.tuners.prefix.attention import check_attention, detach
from lightning_peft.tuners.prefix.config import PrefixConfig
from lightning_peft.tuners.prefix.layer import PrefixLayer
from lightning_peft.tuners.targets import default_blocks
from lightning_peft.tuners.tuner import Tuner

_NUMBERS = re.compile(r"\d+")


class PrefixModel(Tuner[PrefixConfig, PrefixLayer]):
    """Wrap query projections in `PrefixLayer`; see `PrefixConfig`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.prefix import PrefixConfig
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, num_key_value_heads=2, vocab_size=40))
        >>> config = PrefixConfig(target_modules=["q_proj"], length=5)
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        161
    """

    prefix: str = "prefix_"
    tuner_layer_cls = PrefixLayer

    def _check_config(self, config: PrefixConfig) -> None:
        if config.target_modules is None:
            parts = attentions(self.model, default_blocks(config))
            config.target_modules = [projections(part).query for part in parts]

    def _adapt(
        self, config: PrefixConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        check_attention(key.rpartition(".")[0], parent)
        widths = self._widths(key, parent)
        layer = target if isinstance(target, PrefixLayer) else PrefixLayer(target, adapter_name, parent)
        biased = self._biased(key.rpartition(".")[0]) if config.count_positions else None
        layer.update_layer(adapter_name, config, *widths, biased=biased)
        setattr(parent, name, layer)

    def _biased(self, attention: str) -> nn.Module | None:
        """Return the attention of the same name in another block that has the biases of all; None where none has."""
        same = [
            module for name, module in base_modules(self.model) if _NUMBERS.sub("", name) == _NUMBERS.sub("", attention)
        ]
        return next((module for module in same if getattr(module, "has_relative_attention_bias", False)), None)

    def _widths(self, target: str, attention: nn.Module) -> tuple[int, int]:
        """Return the widths of all keys and of all values in the attention whose queries `target` gives."""
        named = dict(base_modules(self.model))
        span = next((s for b in blocks(self.model) for s in b.attention if target in s.matrices), None)
        if span is None:
            raise ValueError(f"{target} stands in no attention of a block, so no prefix can go there.")
        known = projections(span)
        if target != known.query:
            raise ValueError(f"A prefix goes to the matrix that gives the queries: {known.query} instead of {target}.")
        if known.key and known.value:
            return matrix_shape(named[known.key])[1], matrix_shape(named[known.value])[1]
        config: Any = attention.config
        heads = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        size, rest = divmod(matrix_shape(named[target])[1], heads + 2 * keys)
        if rest:
            raise ValueError(
                f"{target} gives {matrix_shape(named[target])[1]} features, not queries, keys and values of {heads} "
                f"and {keys} heads, so it is not known how wide a prefix must be."
            )
        return keys * size, keys * size

    def _check_merge_allowed(self) -> None:
        raise ValueError("A prefix is seen by the softmax of every query and cannot be written into the weights.")

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = self._layers()
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for layer in layers:
            detach(layer._attention[0], layer)
        return model
