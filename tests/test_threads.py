"""Several threads, or tasks, that call one edited model each get what they get alone."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_positions import edited
from tiny_models import LANGUAGE_MODELS
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from lightning_peft.positions import answering, track
from lightning_peft.testing.lockstep import in_lockstep

LENGTHS = (9, 5, 7, 3)


class Sampled(LogitsProcessor):
    """Draws the next token by a generator of its own: the largest after Gumbel noise."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores - torch.rand(scores.shape, generator=self.generator).log().neg().log()


def write(model: Any, prompt: Tensor, **options: Any) -> list[int]:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | options
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_threads_write_what_each_writes_alone(kind: str, use_cache: bool, tokens: Tensor) -> None:
    model, _ = edited(kind)

    def one(number: int) -> list[int]:
        return write(model, tokens[:1, : LENGTHS[number]], use_cache=use_cache)

    alone = [one(number) for number in range(4)]
    assert in_lockstep(model, one, threads=4) == alone


def test_threads_that_draw_by_generators_of_their_own_draw_what_each_draws_alone(tokens: Tensor) -> None:
    model, _ = edited("llama")

    def one(number: int) -> list[int]:
        drawing = LogitsProcessorList([Sampled(number)])
        return write(model, tokens[:1, : LENGTHS[number]], logits_processor=drawing)

    alone = [one(number) for number in range(4)]
    assert in_lockstep(model, one, threads=4) == alone
    assert alone[0] != write(model, tokens[:1])


def test_two_models_in_two_threads_do_not_meet(tokens: Tensor) -> None:
    models = [edited("llama")[0], edited("llama", "generated")[0]]

    def one(number: int) -> list[int]:
        return write(models[number], tokens[:1, : LENGTHS[number]])

    alone = [one(0), one(1)]
    with ThreadPoolExecutor(2) as pool:
        assert [list(written) for written in pool.map(one, (0, 1))] == alone


def test_what_one_thread_says_of_its_answers_is_not_heard_in_another(tokens: Tensor) -> None:
    model, _ = edited("llama")

    def plain() -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens).logits

    expected = plain()
    with answering(model, start=torch.tensor([6, 6, 6])), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(plain).result(), expected) and not torch.equal(plain(), expected)


def test_tasks_that_take_turns_keep_their_answers_apart(tokens: Tensor) -> None:
    model, _ = edited("llama")

    def logits() -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens).logits

    async def task(start: int) -> tuple[Tensor, Tensor]:
        with answering(model, start=torch.full((3,), start)):
            await asyncio.sleep(0)  # the other says where its answers begin
            return logits(), await asyncio.to_thread(logits)

    async def both() -> Any:
        return await asyncio.gather(task(2), task(6))

    for start, found in zip((2, 6), asyncio.run(both()), strict=True):
        with answering(model, start=torch.full((3,), start)):
            assert all(torch.equal(one, logits()) for one in found)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    trained = [p for n, p in model.named_parameters() if "head_offsets" in n]
    return list(torch.autograd.grad(loss, trained))


def trained_answers() -> Any:
    model, _ = edited("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("head_offsets" in name)
    return model.train()


def loss_of(model: Any, tokens: Tensor, start: int) -> Tensor:
    with answering(model, start=torch.full((len(tokens),), start)):
        return model(input_ids=tokens).logits.square().mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_run_again_see_their_own_call_whatever_thread_runs_them(reentrant: bool, tokens: Tensor) -> None:
    model = trained_answers()
    calls = [(tokens[:2, :7], 2), (tokens, 5)]
    expected = [gradients(model, loss_of(model, *call)) for call in calls]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()

    def backward(loss: Tensor) -> list[Tensor]:
        model_parameters = [p for n, p in model.named_parameters() if "head_offsets" in n]
        with lock:
            model.zero_grad()
            loss.backward()
            return [p.grad.clone() for p in model_parameters]

    lock = threading.Lock()
    losses = [loss_of(model, *call) for call in calls]
    with ThreadPoolExecutor(2) as pool:
        for found, right in zip(pool.map(backward, losses), expected, strict=True):
            torch.testing.assert_close(found, right)
    assert not track(model).running.recalled


def test_backward_passes_of_two_threads_at_a_time_do_not_meet(tokens: Tensor) -> None:
    model = trained_answers()
    calls = [(tokens[:2, :7], 2), (tokens, 5)]
    expected = [gradients(model, loss_of(model, *call)) for call in calls]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found: Any = in_lockstep(model, lambda number: gradients(model, loss_of(model, *calls[number])))
    torch.testing.assert_close(found, expected)


def test_copies_and_pickles_of_an_edited_model_carry_nothing_of_a_call(tokens: Tensor) -> None:
    model, _ = edited("llama")
    with answering(model, start=torch.tensor([6, 6, 6])):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        with torch.no_grad():
            assert torch.equal(twin(input_ids=tokens).logits, model(input_ids=tokens).logits)
        assert write(twin, tokens[:1]) == write(model, tokens[:1])


def test_a_compiled_model_hears_where_answers_begin_without_a_break(tokens: Tensor) -> None:
    model, _ = edited("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for start in (2, 6):
        with torch.no_grad(), answering(model, start=torch.full((3,), start)):
            torch.testing.assert_close(compiled(input_ids=tokens).logits, model(input_ids=tokens).logits)
