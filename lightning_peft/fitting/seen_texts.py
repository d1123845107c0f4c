"""Texts that an edit reads under both labels, which leave it nothing to tell apart."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_peft.editing.ranks import rank_and_count


class SeenTexts:
    """Which labels each text was read under."""

    def __init__(self) -> None:
        self._labels: dict[tuple[int, ...], int] = {}  # 0, 1, or 2 for both

    def note(self, input_ids: Tensor, attention_mask: Tensor | None, label: Tensor) -> None:
        """Note a batch's texts.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, or None where all tokens count.
            label: `[B]`, 0 or 1.
        """
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for tokens, counts, value in zip(input_ids.tolist(), real.tolist(), label.tolist(), strict=True):
            text = tuple(token for token, count in zip(tokens, counts, strict=True) if count)
            self._labels[text] = value if self._labels.get(text, value) == value else 2

    def check(self, method: str) -> None:
        """Refuse texts that all were read under both labels, and warn of some.

        Args:
            method: the name of the method that read them.

        Raises:
            ValueError: each text was. (Of several processes, which have to go on together, each warns.)
        """
        both, total = sum(label == 2 for label in self._labels.values()), len(self._labels)
        if both and both == total and rank_and_count()[1] == 1:
            texts = "one text" if total == 1 else f"the same {total} texts"
            raise ValueError(
                f"{method} read {texts} under label 1 and under label 0, so that there is nothing to tell apart: check "
                "how texts and labels are put into batches, and whether texts were cut."
            )
        if both:
            warnings.warn(
                f"{method} read {both} of {total} texts under label 1 and under label 0, which blurs what tells the "
                "two apart: give each text one label.",
                stacklevel=2,
            )
