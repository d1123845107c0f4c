"""What is written after many prompts is what is written after each alone, whatever the layers' windows are."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from windowed_models import PACKED, PLAIN

from lightning_peft.packing.generation import GreedyWriter

PRIMER = [5, 9, 11, 3, 7, 8, 12, 30, 31, 9, 9, 4]
NEW = 8


def prompts(lengths: tuple[int, ...] = (9, 14, 11, 14)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [PRIMER + torch.randint(3, 54, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
    return ids, torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])


def alone(model: nn.Module, row: list[int]) -> list[int]:
    """Greedy decoding by the definition: no cache, no padding, no batch."""
    written: list[int] = []
    while len(written) < NEW and (not written or written[-1] != 2):
        with torch.no_grad():
            written.append(int(model(input_ids=torch.tensor([row + written]), use_cache=False).logits[0, -1].argmax()))
    return written


def writer_of(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> GreedyWriter:
    model.generation_config = GenerationConfig()
    return GreedyWriter(model, tokenizer)


@pytest.mark.parametrize("kind", PACKED)
def test_windows_reach_as_far_back_behind_a_shared_beginning(
    kind: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, rows = PACKED[kind](), prompts()
    seen: list[int] = []
    writer = writer_of(model, tiny_tokenizer)
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # to share nothing would warn
        texts = writer.write(*padded(rows), max_new_tokens=NEW)
    assert writer._prefix == PRIMER
    assert min(seen[3:]) <= max(map(len, rows)) - len(PRIMER)
    assert texts == [tiny_tokenizer.decode(alone(model, row), skip_special_tokens=True) for row in rows]
    later = prompts((20, 10))
    assert writer.write(*padded(later), max_new_tokens=NEW) == [
        tiny_tokenizer.decode(alone(model, row), skip_special_tokens=True) for row in later
    ], "the kept beginning is that of the next batch too"


def test_a_beginning_shorter_than_the_padding_is_run_again(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = PACKED["mistral"](), prompts((9, 9 + 2 * len(PRIMER)))
    texts = writer_of(model, tiny_tokenizer).write(*padded(rows), max_new_tokens=NEW)
    assert texts == [tiny_tokenizer.decode(alone(model, row), skip_special_tokens=True) for row in rows]


def test_longer_texts_whose_rotation_is_another_are_written_from_whole_prompts(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    make: Callable[[], nn.Module] = PLAIN["longrope"][0]
    model, rows = make(), prompts((14, 14))
    with pytest.warns(UserWarning, match=r"answers from whole prompts: .*(it differs|encoded otherwise)"):
        texts = writer_of(model, tiny_tokenizer).write(*padded(rows), max_new_tokens=NEW)
    assert texts == [tiny_tokenizer.decode(alone(model, row), skip_special_tokens=True) for row in rows]


def test_a_text_ends_where_the_caller_says(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = PACKED["gemma2"](), prompts((9, 9))
    writer = writer_of(model, tiny_tokenizer)
    whole = writer.write(*padded(rows), max_new_tokens=NEW)
    end = {text[: len(text) // 2] for text in whole}
    texts = writer.write(*padded(rows), lambda text: any(text.startswith(part) for part in end), NEW)
    for text, full in zip(texts, whole, strict=True):
        assert full.startswith(text) and len(text) < len(full)
