"""Position ids are passed where a model counts from 0; RoBERTa and its kind number tokens themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CamembertConfig,
    Data2VecTextConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
)

from lightning_peft.backbone.token_numbers import numbers_from_zero
from lightning_peft.effects.predictions import Predictions
from lightning_peft.models import SequenceClassifier
from lightning_peft.packing.plain import score_plainly
from lightning_peft.testing.shrunk import shrunk_model

FROM_PADDING = {
    "roberta": RobertaConfig,
    "camembert": CamembertConfig,
    "xlm-roberta": XLMRobertaConfig,
    "data2vec-text": Data2VecTextConfig,
}
TEXTS = [[5, 9, 12, 7, 20, 33], [8, 6, 41]]


@pytest.fixture(params=FROM_PADDING)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    config = FROM_PADDING[request.param](
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        is_decoder=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def alone(model: nn.Module, text: list[int]) -> torch.Tensor:
    """Return log-probabilities as the model computes them by itself, `[T, V]`."""
    return model(input_ids=torch.tensor([text])).logits[0].float().log_softmax(-1)


@torch.no_grad()
def test_scores_are_what_the_model_says_by_itself(model: nn.Module) -> None:
    expected = [alone(model, text)[range(1, len(text) - 1), text[2:]].sum().item() for text in TEXTS]
    assert score_plainly(model, TEXTS, [1, 1]).tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_effects_on_text_are_measured_on_what_the_model_says_by_itself(model: nn.Module) -> None:
    ids, mask = torch.tensor([TEXTS[0], [*TEXTS[1], 1, 1, 1]]), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    predicted = Predictions(model, ids, mask).logprobs(torch.tensor([0, 1]), torch.tensor([4, 1]))
    expected = torch.stack([alone(model, TEXTS[0])[4], alone(model, TEXTS[1])[1]])
    torch.testing.assert_close(predicted.float(), expected, atol=1e-5, rtol=0)


def test_models_that_count_from_zero_are_told_so_that_padding_on_the_left_changes_nothing() -> None:
    assert numbers_from_zero(shrunk_model(LlamaForCausalLM, "llama"))
    assert numbers_from_zero(shrunk_model(GPT2LMHeadModel, "gpt2"))


def test_a_classifier_reads_what_roberta_says_by_itself(tmp_path: Path, tiny_tokenizer: Any) -> None:
    shrunk_model(RobertaModel, "roberta").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    module = SequenceClassifier(str(tmp_path), num_labels=2).eval()
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        logits = module({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        expected = module.head(module.backbone(input_ids=ids).last_hidden_state.mean(1))
    torch.testing.assert_close(logits, expected)
