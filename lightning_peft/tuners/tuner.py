"""The base of the tuners: peft's, whose hooks it gives the types of one method's configuration and layers."""

from __future__ import annotations

from typing import Generic, TypeVar, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

C = TypeVar("C", bound=PeftConfig)
L = TypeVar("L", bound=BaseTunerLayer)


class Tuner(BaseTuner, Generic[C, L]):
    """Put layers of type L into a model, as configurations of type C say.

    peft declares its hooks for every configuration, and calls them with a tuner's own.
    """

    tuner_layer_cls: type[L]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft's own annotation

    def _check_config(self, config: C) -> None:
        """Raise `ValueError` unless the configuration fits the model."""

    def _adapt(self, config: C, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, key: str) -> None:
        """Give `target`, the child of `parent` called `name`, in the model `key`, one more adapter."""
        raise NotImplementedError(f"{type(self).__name__} replaces no module.")

    def _layers(self) -> list[L]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        self._check_config(cast("C", peft_config))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._adapt(cast("C", peft_config), adapter_name, target, target_name, parent, current_key)
