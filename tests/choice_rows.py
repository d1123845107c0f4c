"""Questions of random tokens with their choices, and the scores that they have by definition."""

from __future__ import annotations

import torch
from tiny_models import VOCABULARY
from torch import Tensor, nn

PRIMER = [5, 9, 11, 3, 7, 8, 12, 30, 31, 9, 9, 4]


def question(seed: int, answers: tuple[int, ...] = (3, 1, 5, 2)) -> tuple[list[list[int]], int]:
    """Rows that share a primer and a question, with random answers of the given lengths; and the prompt's length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    prompt = PRIMER + draw(6)
    return [prompt + draw(n) for n in answers], len(prompt)


def batch(rows: list[list[int]], prompt: int, side: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask, labels = [], [], []
    for row in rows:
        pad = width - len(row)
        label = [-100] * prompt + row[prompt:]
        columns = ((row, 0), ([1] * len(row), 0), (label, -100))
        padded = [c + [v] * pad if side == "right" else [v] * pad + c for c, v in columns]
        for out, column in zip((ids, mask, labels), padded, strict=True):
            out.append(column)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def definition(model: nn.Module, row: list[int], prompt: int) -> float:
    """One row alone, without any cache or padding."""
    with torch.no_grad():
        labels = torch.tensor([[-100] * prompt + row[prompt:]])
        # the labels tell an edit where the answer begins; the loss itself is not used
        logits = model(input_ids=torch.tensor([row]), labels=labels).logits[0].log_softmax(-1)
    return float(sum(logits[t - 1, row[t]] for t in range(prompt, len(row))))
