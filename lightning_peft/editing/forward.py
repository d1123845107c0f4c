"""Run a backbone for what happens inside it, without its head."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.modules import uncompiled
from lightning_peft.backbone.window import first_position
from lightning_peft.positions import calling


def run_trunk(
    backbone: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    encoder_only: bool = False,
    **inputs: Any,
) -> Any:
    """Run a transformers model without its head (any other module: as it is), with explicit position ids.

    Compiled models run eagerly, since compiled code does not see hooks that come after it.

    Args:
        backbone: the model, PEFT-wrapped or compiled or not.
        input_ids: `[B, T]`, or None where `inputs` say it all (pictures, say).
        attention_mask: `[B, T]`, or whatever the model takes.
        position_ids: `[B, T]`, each token's number in its text; default from the mask.
        encoder_only: run an encoder-decoder's encoder and nothing else.
        **inputs: further arguments of the model; those that it does not take are left out.
    """
    outer = uncompiled(backbone)
    model: Any = uncompiled(getattr(outer, "get_base_model", lambda: outer)())  # looks into a PeftModel
    trunk: Any = uncompiled(getattr(model, getattr(model, "base_model_prefix", "") or "", model))
    arguments: dict[str, Any] = {"use_cache": False, "attention_mask": attention_mask, **inputs}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    places = position_ids
    if input_ids is not None:
        arguments["input_ids"] = input_ids
        if places is None and attention_mask is not None:
            places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if places is not None:
            arguments["position_ids"] = places + first_position(trunk)
    decoding = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    with calling(model, **{**arguments, "position_ids": places}), torch.compiler.set_stance("force_eager"):
        if not decoding:
            return trunk(**_accepted(trunk, arguments))
        arguments.pop("position_ids", None)
        if encoder_only:
            encoder = model.get_encoder()
            return encoder(**_accepted(encoder, arguments))
        if trunk is not model:
            return trunk(**_accepted(trunk, arguments))
        # T5 has no module that is all but its head
        encoder, decoder = model.get_encoder(), model.get_decoder()
        seen = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return decoder(
            input_ids=arguments["decoder_input_ids"],
            attention_mask=arguments.get("decoder_attention_mask"),
            encoder_hidden_states=seen,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        )


def _accepted(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    accepted = inspect.signature(type(module).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in accepted}
