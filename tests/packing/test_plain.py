"""The plain way is the definition, and the logits that it holds at once are bounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from choice_rows import definition, question
from tiny_models import LANGUAGE_MODELS, VOCABULARY, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from windowed_models import PACKED, PLAIN

from lightning_peft.packing import logprobs, plain
from lightning_peft.packing.answers import AnswerScorer
from lightning_peft.packing.plain import score_plainly

WORDS = 5000
BOUND = 8 * WORDS  # numbers of logits, in place of 2^26


class Largest(TorchDispatchMode):
    """Notes the most numbers of a tensor that any operation makes, of those that have a vocabulary's columns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for made in output if isinstance(output, tuple | list) else (output,):
            if isinstance(made, Tensor) and made.dim() and made.shape[-1] == WORDS:
                self.numbers = max(self.numbers, made.numel())
        return output


class Bare(nn.Module):
    """A model that takes no `logits_to_keep`; with a cap on its logits, which its head knows nothing of."""

    def __init__(self, cap: bool) -> None:
        super().__init__()
        self.model, self.cap = wide(), cap
        self.config = self.model.config

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        if self.cap:
            output.logits = output.logits.tanh()
        return output


def wide() -> Any:
    """A model with many words, whose logits outweigh all else that it makes."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": WORDS}
    t: Any = transformers
    return t.LlamaForCausalLM(t.LlamaConfig(num_attention_heads=1, **sizes)).eval()


def texts(questions: int) -> tuple[list[list[int]], list[int]]:
    rows, starts = [], []
    for seed in range(questions):
        new, prompt = question(seed)
        rows += new
        starts += [prompt - 1] * len(new)
    return rows, starts


@contextmanager
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Largest]:
    monkeypatch.setattr(logprobs, "LOGITS", BOUND)
    monkeypatch.setattr(logprobs, "TOKENS", 4)
    with torch.no_grad(), Largest() as largest:
        yield largest


@pytest.mark.parametrize("kind", [*LANGUAGE_MODELS, *PACKED, "gpt_neo", "longrope"])
@pytest.mark.parametrize("together", [1, 4096])
def test_the_plain_way_is_the_definition(kind: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = PACKED.get(kind) or (PLAIN[kind][0] if kind in PLAIN else lambda: tiny(kind))
    model, (rows, starts) = make(), texts(2)
    monkeypatch.setattr(plain, "TOKENS", together)
    expected = torch.tensor([definition(model, row, start + 1) for row, start in zip(rows, starts, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(score_plainly(model, rows, starts), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cap", [False, True])
def test_a_model_that_keeps_no_columns_is_scored_by_its_definition(cap: bool) -> None:
    model, (rows, starts) = Bare(cap), texts(1)
    expected = torch.tensor([definition(model, row, start + 1) for row, start in zip(rows, starts, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(score_plainly(model, rows, starts), expected, atol=1e-4, rtol=0)


def test_logits_are_those_of_answers_and_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, starts = texts(6)
    answer = max(len(row) - 1 - start for row, start in zip(rows, starts, strict=True))
    model = wide()
    with bounded(monkeypatch) as largest:
        score_plainly(model, rows, starts)
    assert 0 < largest.numbers <= max(BOUND, answer * WORDS) < sum(map(len, rows)) * WORDS / 20
    with bounded(monkeypatch) as largest:
        score_plainly(model, [[*rows[0], *[7] * 20]], starts[:1])  # one long answer is held whole
    assert largest.numbers == (len(rows[0]) + 19 - starts[0]) * WORDS


def test_a_head_that_can_be_called_alone_gives_a_few_tokens_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (rows, starts) = Bare(cap=False), texts(6)
    with bounded(monkeypatch) as largest:
        score_plainly(model, rows, starts)
    assert 0 < largest.numbers <= BOUND < sum(map(len, rows)) * WORDS / 10


def test_where_neither_is_possible_rows_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (rows, starts) = Bare(cap=True), texts(6)
    with bounded(monkeypatch) as largest:
        score_plainly(model, rows, starts)
    assert largest.numbers <= max(BOUND, max(map(len, rows)) * WORDS)


def test_an_encoder_decoders_answers_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    t: Any = transformers
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 8, "num_layers": 1, "num_heads": 1, "vocab_size": WORDS}
    model = t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0, **sizes)).eval()
    ids = torch.randint(3, VOCABULARY, (12, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, VOCABULARY, (12, 3), generator=torch.Generator().manual_seed(1))
    whole = AnswerScorer(model).score(ids, torch.ones_like(ids), labels)
    with bounded(monkeypatch) as largest:
        scores = AnswerScorer(model).score(ids, torch.ones_like(ids), labels)
    torch.testing.assert_close(scores, whole, atol=1e-5, rtol=0)
    assert 0 < largest.numbers <= max(BOUND, len(ids) * WORDS)  # the encoder's call makes a token a prompt
