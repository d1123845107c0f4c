"""The tuner that puts head offsets into a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.positions import track, untrack
from lightning_peft.tuners.head_offsets.config import HeadOffsetsConfig
from lightning_peft.tuners.head_offsets.layer import HeadOffsetsLayer
from lightning_peft.tuners.tuner import Tuner


class HeadOffsetsModel(Tuner[HeadOffsetsConfig, HeadOffsetsLayer]):
    """Wrap attention output projections in `HeadOffsetsLayer`; see `HeadOffsetsConfig`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.head_offsets import HeadOffsetsConfig
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> config = HeadOffsetsConfig(heads={"model.layers.0.self_attn.o_proj": [0, 2]}, head_dim=8)
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        16
    """

    prefix: str = "head_offsets"
    tuner_layer_cls = HeadOffsetsLayer
    changes_weights = False  # merged, they are a bias, which is not quantised

    def _check_config(self, config: HeadOffsetsConfig) -> None:
        if config.target_modules is None or config.head_dim is None:
            raise ValueError(
                "HeadOffsetsConfig needs target_modules (or heads) and head_dim; "
                "lightning_peft.editing.head_offsets_config(head_sites(model)) finds them."
            )
        # peft is content when one target matches; a head that is not there must not be lost without a word
        names = {name for name, _ in self.model.named_modules()}
        for name in config.heads or ():
            if name not in names:
                raise ValueError(f"The model has no module {name!r}, whose heads the adapter edits.")

    def _adapt(
        self, config: HeadOffsetsConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        if config.heads is not None and key not in config.heads:
            return  # peft matches the ends of names; heads are given by full names
        if isinstance(target, HeadOffsetsLayer):
            target.follow(track(self.model))
            target.update_layer(adapter_name, config, key)
            return
        setattr(parent, name, HeadOffsetsLayer(target, adapter_name, config, key, track(self.model)))

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self._layers():
            layer.check_merge(list(self.peft_config))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unload: Any = super()._unload_and_optionally_merge
        model = unload(*args, **kwargs)
        untrack(self.model)
        return model
