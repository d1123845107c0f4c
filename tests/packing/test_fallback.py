"""A faster way is given up where the model refuses it, with the reason; an error of our own is never taken for that."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

from lightning_peft.editing import capture_tokens, head_sites
from lightning_peft.packing.answers import AnswerScorer
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.packing.fallback import give_up, objection

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]])
LABELS = IDS.masked_fill(torch.arange(4) < 2, -100)


class Strict(nn.Module):
    """Takes tokens and a mask of two dimensions, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("llama")
        self.config = self.model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise IndexError("too many indices of the mask")
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


class LayerOfOurs(nn.Module):
    """Stands for a layer of an adapter."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def scored(model: nn.Module) -> Tensor:
    return ChoiceScorer(model).score(IDS, torch.ones_like(IDS), LABELS)


@pytest.mark.parametrize(
    ("distance", "reason"), [(1e-6, ""), (0.5, "packed, it differs by 5.0e-01 nats"), (math.nan, "nan")]
)
def test_what_differs_by_more_than_rounding_is_not_taken(distance: float, reason: str) -> None:
    found = objection(nn.Identity(), "packed", lambda: distance, 1e-3, "nats")
    assert reason in found and bool(found) == bool(reason)


def test_a_model_that_refuses_the_call_is_scored_plainly_with_the_reason() -> None:
    model = Strict()
    with pytest.warns(UserWarning, match=r"^Strict is scored row by row: packed, it raises TypeError: .*position_ids"):
        refused = scored(model)
    torch.testing.assert_close(refused, scored(model.model))


@pytest.mark.parametrize("error", [AttributeError("x"), TypeError("x"), IndexError("x"), KeyError("x")])
def test_a_bug_in_our_way_of_calling_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise error

    monkeypatch.setattr("lightning_peft.packing.choices.packed_logits", broken)
    with pytest.raises(type(error)):
        scored(tiny("llama"))


@pytest.mark.parametrize(
    ("error", "refuses"), [(TypeError("x"), False), (AttributeError("x"), False), (ValueError("of shapes"), True)]
)
def test_what_a_layer_of_ours_raises_inside_the_model_must_be_meant(
    error: Exception, refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(LayerOfOurs(error))
    monkeypatch.setattr("lightning_peft.packing.fallback._OWN", __name__.split(".")[0])
    if refuses:
        assert objection(model, "packed", lambda: model(IDS), 1.0, "nats") == "packed, it raises ValueError: of shapes"
    else:
        with pytest.raises(type(error)):
            objection(model, "packed", lambda: model(IDS), 1.0, "nats")


def test_a_state_space_model_is_scored_plainly_with_the_reason() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4, "pad_token_id": 0}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    with pytest.warns(UserWarning, match=r"^MambaForCausalLM is scored row by row: packed, it (raises|differs)"):
        found = scored(model)
    logprobs = model(input_ids=IDS).logits.log_softmax(-1)[:, 1:-1]
    torch.testing.assert_close(found, logprobs.gather(2, IDS[:, 2:, None]).sum((1, 2)).detach(), atol=1e-4, rtol=1e-4)


def test_an_encoder_that_cannot_be_read_once_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("t5")
    plain = AnswerScorer(model)._plain(IDS, torch.ones_like(IDS), IDS)

    def forgetful(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if kwargs.get("encoder_outputs") is not None:
            raise NotImplementedError("encoder_outputs")
        return args, kwargs

    model.register_forward_pre_hook(forgetful, with_kwargs=True)
    with pytest.warns(UserWarning, match=r"reads the prompt of each answer anew: read once for all, it raises NotImpl"):
        found = AnswerScorer(model).score(IDS, torch.ones_like(IDS), IDS)
    torch.testing.assert_close(found, plain.detach())


def test_texts_that_cannot_be_packed_are_said_to_be_read_one_by_one() -> None:
    model = tiny("llama")

    def no_masks(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs["attention_mask"].dim() != 2:
            raise RuntimeError("a mask of 4 dimensions")

    model.model.register_forward_pre_hook(no_masks, with_kwargs=True)
    texts = [[5, 6, 7, 8], [5, 6, 9]]
    with pytest.warns(UserWarning, match=r"^LlamaForCausalLM reads texts one by one: packed, it raises RuntimeError"):
        capture_tokens(model, head_sites(model), texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a model
        capture_tokens(model, head_sites(model), texts)


def test_each_model_and_each_way_is_warned_of_once() -> None:
    def count(do: Callable[[], None]) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            do()
        return len(caught)

    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert [
        count(lambda m=m, way=way: give_up(m, way, "it must"))
        for m, way in ((one, "walks"), (one, "walks"), (one, "swims"), (other, "walks"))
    ] == [1, 0, 1, 1]
