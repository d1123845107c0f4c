"""X-LoRA (arXiv:2402.07148): trained LoRA adapters from other folders, mixed for each token by a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_peft.backbone.peft_private import activate, during_call
from lightning_peft.stack.injection.injection import Injection, forget_state, take_out
from lightning_peft.stack.injection.own_forward import OwnForward


class _Mixed(OwnForward):
    """Run each call twice: once on the base, for the classifier to see, and once with the experts mixed."""

    def __init__(self, backbone: nn.Module, tuner: Any) -> None:
        super().__init__(backbone, tuner)
        self._inside = False

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return original(*args, **kwargs)
        flags = [(p, p.requires_grad) for p in self.backbone.parameters()]
        self._inside = True
        try:
            with during_call(self.tuner):
                return self.backbone(*args, **kwargs)  # peft's hook stands before the backbone's own call
        finally:
            self._inside = False
            for parameter, flag in flags:  # peft turns experts on again by a switch that also lets them be trained
                parameter.requires_grad_(flag)


class MixtureInjection(Injection):
    """An X-LoRA classifier, which is the adapter, and the LoRA experts that its configuration names by folder."""

    calls = _Mixed

    @classmethod
    def check(cls, backbone: nn.Module, config: Any, name: str, others: list[Injection], computed: bool) -> None:
        model_config = getattr(backbone, "config", None)
        if model_config is None or getattr(model_config, "use_cache", False):
            raise ValueError("XLoraConfig needs a transformers model whose config has use_cache=False.")
        if not config.adapters:
            raise ValueError("XLoraConfig needs adapters, a folder of a LoRA adapter for each name.")
        if config.use_trainable_adapters:
            raise ValueError(
                "XLoraConfig with use_trainable_adapters would train adapters that it does not save: train the "
                "classifier alone."
            )
        if others:
            raise ValueError("XLoraConfig mixes adapters of its own, so it must be a backbone's only adapter.")

    def check_below(self, config: Any, computed: bool) -> None:
        raise ValueError(f"{type(config).__name__} cannot be put on X-LoRA, which mixes adapters of its own.")

    @classmethod
    def clean_up(cls, backbone: nn.Module, config: Any, name: str) -> None:
        _take_experts_out(backbone, config, name)

    def _state(self) -> dict[str, nn.Module]:
        return {"internal_xlora_classifier": self.tuner.internal_xlora_classifier}

    def layers(self) -> Iterator[Any]:
        return iter(())  # experts are not scaled or merged by themselves

    def places(self) -> list[str]:
        return ["experts"]

    def check_merge(self) -> None:
        raise self.cannot_merge()

    def switch(self, on: bool) -> None:
        super().switch(on)
        self.tuner.disabled = not on
        for layer in _experts(self.backbone):
            activate(layer, [str(number) for number in range(len(self.config.adapters))] if on else [])

    def take_out(self) -> None:
        super().switch(False)
        _take_experts_out(self.backbone, self.config, self.name)


def _experts(backbone: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in backbone.modules() if isinstance(module, LoraLayer))


def _take_experts_out(backbone: nn.Module, config: Any, name: str) -> None:
    from peft.tuners.lora import LoraLayer

    for number in range(len(config.adapters)):
        take_out(backbone, LoraLayer, str(number))
    forget_state(backbone, name)
