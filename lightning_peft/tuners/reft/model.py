"""The tuner that puts ReFT into a model."""

from __future__ import annotations

import re

from peft import PeftConfig
from torch import nn

from lightning_peft.backbone.modules import standalone_name
from lightning_peft.backbone.peft_private import set_active
from lightning_peft.positions import track
from lightning_peft.tuners.reft.config import ReftConfig
from lightning_peft.tuners.reft.layer import ATTRIBUTE, ReftLayer
from lightning_peft.tuners.tuner import Tuner


class ReftModel(Tuner[ReftConfig, ReftLayer]):
    """Give modules a `ReftLayer` each; see `ReftConfig`. No module is replaced and no name changes.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft import get_peft_model
        >>> from lightning_peft.tuners.reft import ReftConfig
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> config = ReftConfig(target_modules=["model.layers.1"], width=32, r=2)
        >>> sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)
        130
    """

    # with the child's name before it, so that what peft strips off a key is all that follows the module's name
    prefix: str = f"{ATTRIBUTE}.reft_"
    child = ATTRIBUTE  # what stands between a module's name and its tensors'
    tuner_layer_cls = ReftLayer
    changes_weights = False

    def _check_config(self, config: ReftConfig) -> None:
        if not config.target_modules or config.width is None:
            raise ValueError(
                "ReftConfig needs target_modules and width; lightning_peft.backbone.layers.layer_sites(model) has the "
                "blocks by name, with their width."
            )

    def _check_target_module_exists(  # type: ignore[override]  # static in peft
        self, peft_config: PeftConfig, key: str
    ) -> bool | re.Match[str] | None:
        assert isinstance(peft_config, ReftConfig)
        targets = peft_config.target_modules
        if isinstance(targets, list | set) and key not in targets:
            # a module's full name means that module, and not another whose name ends alike
            names = {name for name, _ in self.model.named_modules()}
            if not any(key.endswith(f".{target}") for target in targets if target not in names):
                return False
        return super()._check_target_module_exists(peft_config, key)

    def _adapt(
        self, config: ReftConfig, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str
    ) -> None:
        if type(target).forward is nn.Module.forward:
            raise ValueError(
                f"{key} is a {type(target).__name__}, which is never called and gives nothing to edit: name a module "
                "in it."
            )
        layer = target._modules.get(ATTRIBUTE) or ReftLayer(target, standalone_name(self.model, key), track(self.model))
        assert isinstance(layer, ReftLayer)
        layer.update_layer(adapter_name, config)
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # peft warns of tied embeddings; their weight is not touched here

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        pass

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "ReFT maps what a block gives, at chosen tokens, and no weight of the block computes that: keep the "
            "adapter beside its base."
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:  # so peft says, whose own returns the model
        if merge:
            self._check_merge_allowed()
        for layer in self._layers():
            for adapter in list(layer.configs):
                set_active(layer, [])
                layer.delete_adapter(adapter)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
