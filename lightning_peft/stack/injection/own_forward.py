"""Methods that act on the call of the backbone itself, not only inside its modules.

`PeftModel` would wrap the backbone for them. Here the backbone keeps its class and its place: its `forward` and
`generate` are replaced on the instance while the adapter is on, and are its own again while it is off.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.peft_private import during_call, forget_call, tasks_of_call
from lightning_peft.per_thread import Turn
from lightning_peft.replaced import ReplacedMethod, replaced

_METHODS = ("forward", "generate")


class OwnForward:
    """The action of one adapter around the backbone's `forward` and `generate`; subclasses define it.

    Args:
        backbone: the model; nothing is changed before `switch(True)`.
        tuner: peft's tuner on it, or `PeftModel` around it.
    """

    def __init__(self, backbone: nn.Module, tuner: Any) -> None:
        self.backbone, self.tuner = backbone, tuner
        self._replaced: dict[str, ReplacedMethod] = {}
        self._turn = Turn()  # peft keeps what belongs to one call on the model, so threads call it in turn

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the backbone's `forward`, which is `original`, and act around it."""
        return original(*args, **kwargs)

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the backbone's `generate`, which is `original`, and act around it."""
        return original(*args, **kwargs)

    def switch(self, on: bool) -> None:
        """Put the replacements on the backbone, or take them off."""
        if on and not self._replaced:
            names = [name for name in _METHODS if hasattr(self.backbone, name)]
            self._replaced = {name: replaced(self.backbone, name, partial(self._in_turn, name)) for name in names}
        elif not on:
            for method in self._replaced.values():
                method.remove()
            self._replaced = {}

    def _in_turn(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return getattr(self, name)(original, *args, **kwargs)


def _argument(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a call's value for one of a function's arguments, by name or by place."""
    return kwargs[name] if name in kwargs else inspect.signature(function).bind_partial(*args).arguments.get(name)


class Tasks(OwnForward):
    """Poly: `task_ids` `[B]` of a call choose the mixture of skills in every adapted layer."""

    def forward(self, original: Callable[..., Any], *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        with tasks_of_call(self.tuner, task_ids):
            return original(*args, **kwargs)

    generate = forward


class Invocation(OwnForward):
    """Activated LoRA: the adapter acts from the invocation tokens of each row on, wherever they stand last."""

    def __init__(self, backbone: nn.Module, tuner: Any) -> None:
        super().__init__(backbone, tuner)
        self._prompt: tuple[list[int | None], int] | None = None  # while generating: where to begin, and its length
        self._warned = False

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = _argument("input_ids", original, args, kwargs)
        if ids is None:
            return original(*args, **kwargs)
        if self._prompt is None:
            offsets = self._find(ids)
            self._check_invoked(offsets)
        else:  # counted from the end, which moves where there is no cache; beams repeat rows
            prompt_offsets, length = self._prompt
            further, times = max(ids.shape[1] - length, 0), len(ids) // len(prompt_offsets)
            offsets = [None if o is None else o + further for o in prompt_offsets for _ in range(times)]
        with during_call(self.tuner, alora_offsets=offsets):
            return original(*args, **kwargs)

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else _argument("inputs", original, args, kwargs)
        self._prompt = None if ids is None else (self._find(ids), ids.shape[1])
        try:
            return original(*args, **kwargs)
        finally:
            self._prompt = None

    def _check_invoked(self, offsets: list[int | None]) -> None:
        """Warn, once, of a batch that is trained on and in which nothing acts: its loss is the base's and falls not."""
        if torch.is_grad_enabled() and not self._warned and all(offset is None for offset in offsets):
            (adapter,) = self.tuner.active_adapters
            invocation = self.tuner.peft_config[adapter].alora_invocation_tokens
            self._warned = True
            warnings.warn(
                f"No row of a batch holds the invocation tokens {invocation} one after another, so adapter {adapter!r} "
                "acts in none and learns nothing of it: let the tokens stand before what is to be answered.",
                stacklevel=2,
            )

    def _find(self, ids: Tensor) -> list[int | None]:
        """Return for each row how many tokens from the end the adapter begins to act; None where nothing invokes it."""
        from peft.tuners.lora.variants import calculate_alora_offsets

        (adapter,) = self.tuner.active_adapters
        return list(calculate_alora_offsets(self.tuner.peft_config, adapter, ids))


class Auxiliary(OwnForward):
    """ShadowPEFT: the shadow network's own loss is added to the loss that the backbone computes from `labels`."""

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        labels, weight = kwargs.get("labels"), self.tuner.peft_config[self.tuner.active_adapters[0]]
        if labels is not None and getattr(output, "loss", None) is not None and weight.auxiliary_loss_weight > 0:
            loss = self.tuner.shadow_auxiliary_loss(labels, attention_mask=kwargs.get("attention_mask"))
            if loss is not None:
                output.loss = output.loss + weight.auxiliary_loss_weight * loss
        forget_call(self.tuner)
        return output


def task_of(backbone: Any) -> str:
    """Return peft's name for a model's task, which decides how `PeftModel` calls it."""
    from transformers.models.auto import modeling_auto as auto

    heads = {
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    }
    for task, names in heads.items():
        if names.get(backbone.config.model_type) == type(backbone).__name__:
            return task
    if not backbone.can_generate():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if backbone.config.is_encoder_decoder else "CAUSAL_LM"
