"""Reference trustable decoding: labels by the nearest neighbours among stored hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_peft.backbone.layers import layer_sites
from lightning_peft.editing.collect import capture_texts
from lightning_peft.editing.early_exit import find_early_exit

_ROWS = 256  # queries whose distances are held at once


class RTD:
    """A nearest-neighbour classifier of hidden states (Shi et al. 2024, arXiv:2409.20181), in scikit-learn's manner.

    The `k` stored states nearest to a state, by Euclidean distance d, each vote for their label with weight
    `softmax(-d / temperature)`, the softmax over these k. With several heads the state is cut into as many pieces of
    equal width, each of which finds its own neighbours; their distances count `heads` times, and the votes are averaged
    (the authors sum them, which is the same up to the factor).

    Args:
        k: neighbours; all where fewer are stored.
        temperature: in units of distance; which is good depends on the model.
        heads: pieces.
        squared: take d², as the authors' code does, whose index gives squared distances; their temperatures (160 to
            5000) are of that kind. The neighbours are the same.

    Attributes:
        classes_: the labels, ascending, `[C]`.

    Example:
        >>> rtd = RTD(k=2, temperature=1.0).fit(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([1, 0, 0]))
        >>> rtd.predict_proba(torch.tensor([[0.0], [3.0]])).round(decimals=3).tolist()
        [[0.26899999380111694, 0.7310000061988831], [1.0, 0.0]]
    """

    def __init__(self, k: int = 32, temperature: float = 1.0, heads: int = 1, squared: bool = False) -> None:
        if k < 1 or heads < 1 or not temperature > 0:
            raise ValueError(
                f"k and heads must be at least 1 and temperature above 0, got {k}, {heads} and {temperature}."
            )
        self.k, self.temperature, self.heads, self.squared = k, temperature, heads, squared

    def fit(self, states: Tensor, labels: Tensor) -> RTD:
        """Store labelled states.

        Args:
            states: `[N, width]`.
            labels: integers `[N]`.

        Raises:
            ValueError: nothing to store, numbers that do not match, a width that heads do not divide, or states that
                are not finite.
        """
        if states.dim() != 2 or len(states) == 0 or len(states) != len(labels):
            raise ValueError(
                f"States must be [N, width], with N labels; got {tuple(states.shape)} and {len(labels)} labels."
            )
        if states.shape[1] % self.heads:
            raise ValueError(f"{self.heads} heads do not divide states of width {states.shape[1]}.")
        if not states.isfinite().all():
            raise ValueError("Some states are not finite, so no distance to them is.")
        self.classes_, index = labels.unique(return_inverse=True)
        self._labels = nn.functional.one_hot(index, len(self.classes_)).float()
        self._pieces = self._cut(states)
        return self

    def predict_proba(self, states: Tensor) -> Tensor:
        """Return the share of votes of each of `classes_`, `[M, C]`, of states `[M, width]`."""
        return torch.cat([self._votes(part) for part in states.split(_ROWS)]) if len(states) else states[:, :0]

    def predict(self, states: Tensor) -> Tensor:
        """Return the label with most votes, `[M]`; of equal ones the smallest."""
        return self.classes_[self.predict_proba(states).argmax(-1)]

    def distances(self, states: Tensor) -> Tensor:
        """Return the distances that count, of each head's nearest first, `[heads, M, k]`."""
        return torch.cat([self._nearest(part)[0] for part in states.split(_ROWS)], dim=1)

    def _cut(self, states: Tensor) -> Tensor:
        """Cut states into one piece a head, `[heads, N, width / heads]`."""
        return states.float().reshape(len(states), self.heads, -1).transpose(0, 1)

    def _nearest(self, states: Tensor) -> tuple[Tensor, Tensor]:
        # by matrix products, a stored state would not be at distance 0 from itself
        apart = torch.cdist(self._cut(states), self._pieces, compute_mode="donot_use_mm_for_euclid_dist")
        nearest, index = apart.topk(min(self.k, len(self._labels)), largest=False)
        return self.heads * (nearest.square() if self.squared else nearest), index

    def _votes(self, states: Tensor) -> Tensor:
        nearest, index = self._nearest(states)
        weights = (-nearest / self.temperature).softmax(-1)
        return (weights[..., None] * self._labels[index]).sum(-2).mean(0)


@torch.no_grad()
def final_states(backbone: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Read the language-model head's input at the last token of each text, `[N, width]` in float32 on the CPU.

    Args:
        backbone: a causal language model of transformers; whatever adapters are active count.
        sequences: token ids, one list a text; what texts share is computed once.

    Raises:
        ValueError: as `find_early_exit` and `capture_texts`.
    """
    way_out = find_early_exit(backbone)
    stream = capture_texts(backbone, [layer_sites(backbone)[-1]], sequences).values[:, 0]
    parameter = next(way_out.head.parameters())
    return way_out.state(stream.to(parameter)).float().cpu()
