"""Prompt learning: virtual tokens, or keys and values of a past, before the tokens of every call.

peft's `PeftModel` does the work, around the backbone but not in its place: the backbone's own `forward` and `generate`
ask it, and it calls the backbone's original ones. Its prompt encoder is a child of the backbone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.embeddings import input_embeddings
from lightning_peft.backbone.modules import STATE, state_tensors
from lightning_peft.backbone.peft_private import adapters_in, keep_default_config, whole_wrapper
from lightning_peft.stack.injection.injection import Injection, forget_state, take_out
from lightning_peft.stack.injection.own_forward import task_of
from lightning_peft.stack.injection.prompt_forward import PastForward, PromptForward, unchanged

_SAVED = "prompt_embeddings"  # what peft reads from a folder: the prompt itself
_ENCODER = "prompt_encoder."  # before the key of what it comes from, which peft leaves alone
_NAMES = {"embedding.weight": _SAVED, "prefix_task_cols": "prefix_task_cols", "prefix_task_rows": "prefix_task_rows"}


class PromptInjection(Injection):
    """A prompt encoder and the way its prompt gets into the backbone's calls: see `PromptForward`."""

    calls: type[PromptForward] = PromptForward
    changes_every_block = True
    networked = False  # the prompt is computed by a network

    @classmethod
    def check(cls, backbone: nn.Module, config: Any, name: str, others: list[Injection], computed: bool) -> None:
        kind, model = type(config).__name__, type(backbone).__name__
        needed = "past_key_values" if cls.calls.past else "inputs_embeds"
        if not hasattr(backbone, "config") or needed not in inspect.signature(backbone.forward).parameters:
            raise ValueError(f"{kind} needs a transformers model that takes {needed}, and {model} does not.")
        if cls.calls.past and not backbone.can_generate():  # type: ignore[operator]
            raise ValueError(f"{kind} gives a model a past, and {model}, which does not generate, has no use for one.")
        if not config.num_virtual_tokens:
            raise ValueError(f"{kind} needs num_virtual_tokens, a positive number.")
        if computed:
            raise ValueError(f"{kind} is trained, and cannot be an edit.")
        cls.check_others(config, others, computed)

    def check_below(self, config: Any, computed: bool) -> None:
        if computed:
            raise ValueError(
                f"{type(config).__name__} is an edit at positions of tokens, which {type(self.config).__name__} moves: "
                "edit a backbone without a prompt."
            )

    @classmethod
    def clean_up(cls, backbone: nn.Module, config: Any, name: str) -> None:
        forget_state(backbone, name)

    def _task(self, backbone: nn.Module) -> str:
        return task_of(backbone)

    def _build(self) -> Any:
        from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        base = list(self.backbone.parameters())
        model: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[str(self.task_type)](self.backbone, self.config, self.name)
        for parameter in base:
            parameter.requires_grad_(False)
        if (table := input_embeddings(self.backbone)) is not None:
            model.word_embeddings = table  # peft guesses by size, and misses one that an adapter wraps
        keep_default_config(model, self.config)
        return model

    def _state(self) -> dict[str, nn.Module]:
        return {"prompt": _Prompt(self.tuner, self.name)}

    def layers(self) -> Iterator[Any]:
        return iter(())

    def keys(self) -> dict[str, str]:
        whole = whole_wrapper()

        inner = f"{STATE}.{self.name}.prompt."
        names: dict[str, Any] = {name: name for name in state_tensors(self.backbone)}
        simple = inner + _SAVED not in names
        keys = {_key(name.removeprefix(inner), simple): name for name in names if name.startswith(inner)}
        for prefix, module in self.backbone.named_modules():  # heads saved whole
            if isinstance(module, whole) and self.name in adapters_in(module):
                members = {name.removeprefix(f"{prefix}."): name for name in names if name.startswith(f"{prefix}.")}
                saved = module.adapter_state_dict(self.name, members)  # type: ignore[call-arg]
                keys |= {f"base_model.{prefix}.{key}": name for key, name in saved.items()}
        return keys

    def spread(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Complete saved tensors by those of the encoders, which follow from the prompt that peft saves."""
        encoder, prompt = self.tuner.prompt_encoder[self.name], tensors.get(_SAVED)
        if prompt is None or any(key.startswith(_ENCODER) for key in tensors):
            return tensors
        if hasattr(encoder, "trainable_embedding"):  # cartridge
            frozen = encoder.num_frozen_tokens
            parts = {
                "trainable_embedding": prompt[frozen:],
                **({"frozen_embedding": prompt[:frozen]} if frozen else {}),
            }
        elif hasattr(encoder, "delta_embedding"):  # CPT
            parts = {"embedding.weight": prompt, "delta_embedding.weight": torch.zeros_like(prompt)}
        else:
            return tensors
        return {**tensors, **{_ENCODER + name: value for name, value in parts.items()}}

    def places(self) -> list[str]:
        return ["past" if self.calls.past else "inputs"]

    @classmethod
    def is_final(cls, config: Any, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether there is a prompt without its network: it is then trained further by itself."""
        networked = cls.networked or getattr(config, "prefix_projection", False)
        return networked and not any(key.startswith(_ENCODER) for key in tensors)

    def check_merge(self) -> None:
        raise self.cannot_merge()

    def take_out(self) -> None:
        self.switch(False)
        take_out(self.backbone, (), self.name)
        forget_state(self.backbone, self.name)


class EncodedPromptInjection(PromptInjection):
    """A prompt that a network gives."""

    networked = True


class PastInjection(PromptInjection):
    """A prompt that stands among the keys and values of a past."""

    calls = PastForward


class _Prompt(nn.Module):
    """A prompt encoder; where the prompt is not simply its embedding, the state has the prompt too.

    Args:
        model: the `PeftModel`.
        name: the adapter's name.
    """

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.encoder = model.prompt_encoder[name]
        self._model, self._name = (model,), name  # in a tuple, so that it does not become a child

    @property
    def virtual_tokens(self) -> int:
        """The places that the prompt takes of the backbone's context window."""
        (model,) = self._model
        return model.peft_config[self._name].num_virtual_tokens

    @property
    def _computed(self) -> bool:
        (model,), names = self._model, {name for name, _ in self.encoder.named_parameters()}
        return not (names <= _NAMES.keys()) and not model.peft_config[self._name].inference_mode

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._computed:
            (model,), training = self._model, self.encoder.training
            self.encoder.eval()
            with unchanged(self.encoder):
                destination[prefix + _SAVED] = model.get_prompt_embedding_to_save(self._name)
            self.encoder.train(training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + _SAVED, None)  # it follows from the encoder
        super()._load_from_state_dict(state_dict, prefix, *args)


def _key(name: str, simple: bool) -> str:
    """Return the key in a folder of a tensor of `_Prompt`, whose embedding may simply be the prompt."""
    inner = name.removeprefix("encoder.")
    return name if name == _SAVED else _NAMES[inner] if simple else _ENCODER + inner
