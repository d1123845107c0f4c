"""Steering and scoring as one writes them by hand, with hooks, knowing nothing of the package.

A vector is added to a block's output, or to what goes into an attention's output projection, from the last prompt token
on. The first call of `generate` is the prompt; later ones have one token, or, without a cache, prompt and all that came
after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Vectors:
    """What is added: by module name a vector as wide as its output, or as its input where `to_input`."""

    by_module: Mapping[str, Tensor]
    to_input: bool


@contextmanager
def steered(model: nn.Module, vectors: Vectors | None, start: int | None = None) -> Iterator[None]:
    """Add the vectors from token `start` on; by default from the last token of the first call on."""
    handles = []
    for name, vector in (vectors.by_module if vectors else {}).items():
        module = model.get_submodule(name)
        add = _Adder(vector, start)
        if vectors is not None and vectors.to_input:
            handles.append(module.register_forward_pre_hook(add.to_input))
        else:
            handles.append(module.register_forward_hook(add.to_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Adder:
    def __init__(self, vector: Tensor, start: int | None) -> None:
        self.vector, self.start = vector, start

    def _add(self, x: Tensor) -> Tensor:
        if self.start is None:
            self.start = x.shape[1] - 1
        x = x.clone()
        x[:, self.start if x.shape[1] > self.start else 0 :] += self.vector
        return x

    def to_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._add(args[0]), *args[1:])

    def to_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (self._add(output[0]), *output[1:]) if isinstance(output, tuple) else self._add(output)


@dataclass(frozen=True)
class Written:
    """What a model wrote greedily: `tokens [B, N]`, and the logits it chose them by, `[B, N, V]`."""

    tokens: Tensor
    logits: Tensor


@torch.no_grad()
def write(model: Any, inputs: Mapping[str, Tensor], use_cache: bool, tokens: int) -> Written:
    """Let a model write, by its own `generate`."""
    made = model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Written(made.sequences[:, -tokens:], torch.stack(made.logits, dim=1).float())


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of one call, `[B, T, V]`."""
    made: Tensor = model(**inputs).logits.float()
    return made


def answer_logprobs(
    model: Any, rows: Sequence[Sequence[int]], prompts: Sequence[int], vectors: Vectors | None
) -> Tensor:
    """Return the sum of the log-probabilities of each row's tokens behind its prompt, each row in a call of its own."""
    sums = []
    for row, prompt in zip(rows, prompts, strict=True):
        ids = torch.tensor([row])
        with steered(model, vectors, prompt - 1):
            scores = logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).log_softmax(-1)
        sums.append(sum(float(scores[0, place - 1, row[place]]) for place in range(prompt, len(row))))
    return torch.tensor(sums)
