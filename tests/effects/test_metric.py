"""Effects on text are put together over documents, batches and processes."""

from __future__ import annotations

import torch

from lightning_peft.effects import TextEffects


def test_all_documents_together_weigh_by_their_tokens() -> None:
    metric = TextEffects()
    metric.update(torch.tensor([[10.0, 20, 30, 5]]))
    metric.update(torch.tensor([[30.0, 20, 50, 3]]))
    assert metric.compute() == {"ce_base": 1.0, "ce": 2.0, "kl": 0.2}
    metric.reset()
    metric.update(torch.zeros(1, 4))
    assert metric.compute() == {}


def test_a_document_that_a_sampler_repeats_counts_once() -> None:
    metric = TextEffects()
    metric.update(torch.tensor([[10.0, 20, 30, 5], [30.0, 20, 50, 3]]), torch.tensor([0, 1]))
    metric.update(torch.tensor([[10.0, 20, 30, 5]]), torch.tensor([0]))
    assert metric.compute() == {"ce_base": 1.0, "ce": 2.0, "kl": 0.2}
