"""The head's input is read without making logits of all tokens, and only where the head alone makes the logits."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LANGUAGE_MODELS, VOCABULARY, tiny
from torch import Tensor, nn
from windowed_models import PACKED

from lightning_peft.backbone.accepted_arguments import accepted_arguments
from lightning_peft.backbone.head_input import head_input

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_head_of_its_input_is_the_logits(kind: str) -> None:
    model = tiny(kind)
    head, rows = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, args, output: rows.append(output.shape[1]))
    with torch.no_grad():
        states = head_input(model, head, {"input_ids": IDS})
        assert states is not None and set(rows) == {1}, "no logits of all tokens were made"
        torch.testing.assert_close(head(states), model(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["gemma2", "cohere2"])
def test_where_logits_are_capped_or_scaled_there_is_none(kind: str) -> None:
    model = PACKED[kind]()
    with torch.no_grad():
        assert head_input(model, model.get_output_embeddings(), {"input_ids": IDS}) is None
        assert model(input_ids=IDS).logits.shape[1] == IDS.shape[1], "the hook is off again"


def test_where_the_head_must_see_all_tokens_there_is_none() -> None:
    model = tiny("llama")

    def all_tokens(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1] != IDS.shape[1]:
            raise RuntimeError("an edit of all tokens")

    model.lm_head.register_forward_pre_hook(all_tokens)
    with torch.no_grad():
        assert head_input(model, model.lm_head, {"input_ids": IDS}) is None


def test_a_wrapped_models_own_arguments_are_known() -> None:
    import peft

    wrapped = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert "logits_to_keep" in accepted_arguments(wrapped) & accepted_arguments(tiny("llama"))
