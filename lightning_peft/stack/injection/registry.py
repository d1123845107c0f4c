"""The table of classes that put peft's methods on a backbone, by peft's type."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_peft.moved.names import keep_old_names
from lightning_peft.stack.injection.adaption_prompt import AdaptionInjection
from lightning_peft.stack.injection.injection import Injection
from lightning_peft.stack.injection.mixture import MixtureInjection
from lightning_peft.stack.injection.own_forward import Auxiliary, Tasks
from lightning_peft.stack.injection.prompt_learning import EncodedPromptInjection, PastInjection, PromptInjection


class AdaLoraInjection(Injection):
    """AdaLoRA, whose pruned directions are zero: without them tensors would have other shapes."""

    def _saved_config(self) -> Any:
        config = super()._saved_config()
        config.rank_pattern = None
        return config


class PlacesInjection(Injection):
    """LoRTA, which finds where in its tensor each matrix stands: without the model nothing else could tell."""

    def kept_config(self, config: Any) -> Any:
        config = super().kept_config(config)
        config.places = copy.deepcopy(self.config.places)
        return config


class VBLoraInjection(Injection):
    """VB-LoRA, saved in a form that can be trained further."""

    def _saved_config(self) -> Any:
        config = super()._saved_config()
        config.save_only_topk_weights = False
        return config


class ShiraInjection(Injection):
    """SHiRA, which draws the weights it adapts at random and keeps them in a plain dictionary: they become state."""

    def _build(self) -> Any:
        from peft.tuners._buffer_dict import BufferDict

        tuner = super()._build()
        for module in list(self.backbone.modules()):
            if isinstance(indices := module.__dict__.get("shira_indices"), dict):
                del module.__dict__["shira_indices"]
                module.shira_indices = BufferDict(indices, persistent=True)
        return tuner


class TasksInjection(Injection):
    """Poly: see `Tasks`."""

    calls = Tasks


class AuxiliaryInjection(Injection):
    """ShadowPEFT: see `Auxiliary`."""

    calls = Auxiliary


class OnesInjection(Injection):
    """Trained factors, which start at one."""

    start = 1.0


class ZerosInjection(Injection):
    """Trained terms, which start at zero."""

    start = 0.0


class CopiesInjection(Injection):
    """Trained copies of layers."""

    trains_copies = True


class MasksInjection(Injection):
    """Masks of weights, of which a folder holds the bits, without the scores that they were trained by."""

    @classmethod
    def is_final(cls, config: Any, tensors: Mapping[str, Tensor]) -> bool:
        return bool(config.packed)

    def count_trained(self, tensors: Mapping[str, Tensor]) -> int:
        # a score for each weight, of which a byte has eight
        bits = sum(8 * tensor.numel() for key, tensor in tensors.items() if ".weight_mask_bits" in key)
        return bits + super().count_trained(tensors)


_INJECTIONS: dict[str, type[Injection]] = {
    "ADALORA": AdaLoraInjection,
    "ADAPTION_PROMPT": AdaptionInjection,
    "CARTRIDGE": PastInjection,
    "HEAD_OFFSETS": ZerosInjection,
    "IA3": OnesInjection,
    "LAYER_OFFSETS": ZerosInjection,
    "LN_TUNING": CopiesInjection,
    "LORTA": PlacesInjection,
    "POLY": TasksInjection,
    "PREFIX_TUNING": PastInjection,
    "P_TUNING": EncodedPromptInjection,
    "SHADOW": AuxiliaryInjection,
    "SHIRA": ShiraInjection,
    "VBLORA": VBLoraInjection,
    "WEIGHT_MASKS": MasksInjection,
    "XLORA": MixtureInjection,
}


def injection_for(config: Any) -> type[Injection]:
    """Return the class that puts a method on a backbone, given its configuration."""
    default = PromptInjection if config.is_prompt_learning else Injection
    return _INJECTIONS.get(str(getattr(config.peft_type, "value", config.peft_type)), default)


def register_injection(peft_type: str, injection: type[Injection]) -> None:
    """Let a method of one's own be put on backbones by a class of one's own.

    Args:
        peft_type: the member of `peft.PeftType`; one that is here already gets the new class.
        injection: the class; `Injection` itself serves every tuner that wraps modules in place, and need not be named.

    Example:
        >>> from lightning_peft.stack.injection.injection import Injection
        >>> class Mine(Injection):
        ...     start = 0.0
        >>> register_injection("MINE", Mine)
    """
    _INJECTIONS[str(getattr(peft_type, "value", peft_type))] = injection


keep_old_names(__name__)
