"""A prompt in a model's calls, and out of their output again, which is that of the real tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.replaced import Handle, KeptAttribute, replaced
from lightning_peft.stack.injection.own_forward import OwnForward

_PREPARE = "prepare_inputs_for_generation"


class PromptForward(OwnForward):
    """Calls of the backbone with a prompt before their tokens.

    The arguments and the output of a call are those of real tokens: logits and hidden states are theirs alone, and
    `attention_mask`, `position_ids`, `token_type_ids`, `labels` and `logits_to_keep` count them alone. With
    `past_key_values` that hold something, the prompt is among them already.

    Args:
        backbone: the model.
        model: peft's `PeftModel` around it.
    """

    past = False  # whether the prompt is given as keys and values, and not as embeddings

    def __init__(self, backbone: nn.Module, model: Any) -> None:
        super().__init__(backbone, model)
        self.model, self.config = model, model.active_peft_config
        self.model._modules["base_model"] = _Unprompted(self)
        self._call: dict[str, Any] = {}
        self._generating = False

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names = inspect.signature(original).parameters
        kwargs = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if v is not None}
        if self._generating:
            return original(**kwargs)
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else kwargs.get("inputs_embeds")
        if tokens is None:  # an encoder has seen them, and the prompt
            return original(**kwargs)
        if _is_filled(kwargs.get("past_key_values")):
            return original(**self._shifted(kwargs))
        self._check_checkpointing()
        held_back = ("position_ids", "token_type_ids") if not self.past else ()
        self._call = {name: kwargs.pop(name) for name in held_back if name in kwargs}
        try:
            (encoder,) = self.model.prompt_encoder.values()
            with nullcontext() if torch.is_grad_enabled() else unchanged(encoder):
                output = self.model.forward(**kwargs)
        finally:
            self._call = {}
        return output if self.config.task_type == "SEQ_2_SEQ_LM" else self._real(output, tokens.shape[1])

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args or "inputs" in kwargs:
            kwargs["input_ids"] = args[0] if args else kwargs.pop("inputs")
        temporary: list[Handle] = [replaced(self.backbone, _PREPARE, self._prepared, instead=True)]
        if isinstance(inner := getattr(self.backbone, "model", None), nn.Module):
            temporary.append(KeptAttribute(inner, "generation_config"))  # peft sets it, and lets it be
        self._generating = True
        try:
            (encoder,) = self.model.prompt_encoder.values()
            with unchanged(encoder):
                return self.model.generate(**kwargs)
        finally:
            self._generating = False
            for handle in temporary:
                handle.remove()

    def inner(self, **kwargs: Any) -> Any:
        """Call the backbone for `PeftModel`, after completing the arguments that it left out."""
        count = self.config.num_virtual_tokens
        if (positions := self._call.get("position_ids")) is not None:
            prompt = torch.arange(count, device=positions.device).expand(len(positions), -1)
            kwargs["position_ids"] = torch.cat((prompt, positions + count), dim=1)
        if (types := self._call.get("token_type_ids")) is not None:
            kwargs["token_type_ids"] = nn.functional.pad(types, (count, 0))
        embeds, labels, keep = (kwargs.get(name) for name in ("inputs_embeds", "labels", "logits_to_keep"))
        if isinstance(embeds, Tensor) and isinstance(labels, Tensor) and self.config.task_type != "SEQ_2_SEQ_LM":
            missing = embeds.shape[1] - labels.shape[-1]  # for some tasks peft has padded them itself
            if labels.dim() == 2 and missing == count:
                kwargs["labels"] = nn.functional.pad(labels, (count, 0), value=-100)
        if isinstance(keep, Tensor) and not self.past:
            kwargs["logits_to_keep"] = torch.where(keep < 0, keep, keep + count)
        return self._replaced["forward"].original(**{k: v for k, v in self._packed(kwargs).items() if v is not None})

    def inner_generate(self, **kwargs: Any) -> Any:
        """Generate for `PeftModel`."""
        return self._replaced["generate"].original(**self._packed(kwargs))

    def _packed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return an encoder's arguments with pads on the left put before the prompt.

        Such models count positions themselves, pads too, and the prompt must not be further from the tokens for them.
        """
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if self.config.task_type != "SEQ_2_SEQ_LM" or embeds is None or mask is None or mask.shape != embeds.shape[:2]:
            return kwargs
        count, place = self.config.num_virtual_tokens, torch.arange(mask.shape[1], device=mask.device)
        pads = (mask[:, count:].cumsum(1) == 0).sum(1, keepdim=True)  # [B, 1], those before the first token
        order = torch.where(place < pads, place + count, torch.where(place < pads + count, place - pads, place))
        whole = order.unsqueeze(-1).expand_as(embeds)
        return {**kwargs, "inputs_embeds": embeds.gather(1, whole), "attention_mask": mask.gather(1, order)}

    def _shifted(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call that continues from a past with the prompt in it."""
        count, shifted = self.config.num_virtual_tokens, dict(kwargs)
        if isinstance(mask := kwargs.get("attention_mask"), Tensor) and mask.dim() == 2:
            shifted["attention_mask"] = nn.functional.pad(mask, (count, 0), value=1)
        if (positions := kwargs.get("position_ids")) is not None:
            shifted["position_ids"] = positions + count
        return shifted

    def _prepared(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a step of generation, with the positions that peft leaves out: pads have none.

        They are right before the call, for hooks on the backbone see them.
        """
        inputs = self.model.prepare_inputs_for_generation(*args, **kwargs)
        mask, embeds = inputs.get("attention_mask"), inputs.get("inputs_embeds")
        tokens = inputs.get("input_ids") if embeds is None else embeds
        takes = "position_ids" in inspect.signature(self.backbone.forward).parameters
        if not takes or mask is None or mask.dim() != 2 or tokens is None:
            return inputs
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return {**inputs, "position_ids": positions[:, -tokens.shape[1] :]}

    def _real(self, output: Any, length: int) -> Any:
        """Return the output without the virtual tokens."""
        count = self.config.num_virtual_tokens

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(item) for item in value)
            if isinstance(value, Tensor) and value.dim() == 3 and length < value.shape[1] <= length + count:
                return value[:, -length:]
            return value

        if self.past:
            return output
        if isinstance(output, tuple):
            return cut(output)
        for name in ("logits", "last_hidden_state", "hidden_states"):
            if getattr(output, name, None) is not None:
                output[name] = cut(output[name])
        return output

    def _check_checkpointing(self) -> None:
        """Refuse checkpointing of activations, in which transformers drops a past, and so the prompt in it."""
        if not self.past or not torch.is_grad_enabled():
            return
        if any(m.training and getattr(m, "gradient_checkpointing", False) for m in self.backbone.modules()):
            raise ValueError(
                f"{type(self.config).__name__} gives the model a past, which checkpointing drops: turn that off."
            )


class PastForward(PromptForward):
    """Calls with a prompt among the keys and values of a past."""

    past = True


class _Unprompted:
    """The backbone as `PeftModel` sees it: a call runs its original forward, whose hooks have run already."""

    def __init__(self, owner: PromptForward) -> None:
        object.__setattr__(self, "owner", owner)

    def __call__(self, **kwargs: Any) -> Any:
        return self.owner.inner(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "owner" or name.startswith("__"):  # not there yet, while copied or unpickled
            raise AttributeError(name)
        if name == "generate":
            return self.owner.inner_generate
        replaced = self.owner._replaced.get(name)
        return getattr(self.owner.backbone, name) if replaced is None else replaced.original

    def __setattr__(self, name: str, value: Any) -> None:
        if name != _PREPARE:  # peft's own is called by the owner's
            setattr(self.owner.backbone, name, value)


@contextmanager
def unchanged(encoder: nn.Module) -> Iterator[None]:
    """Restore an encoder's weights afterwards: CPT projects its own in every call, not only in training."""
    before = [(parameter, parameter.data) for parameter in encoder.parameters()]
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def _is_filled(past: Any) -> bool:
    if past is None:
        return False
    return bool(past.get_seq_length()) if hasattr(past, "get_seq_length") else len(past) > 0
