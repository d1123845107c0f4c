"""Exact log-probabilities of answers under an encoder-decoder, each distinct prompt read once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_peft.backbone.window import check_batch
from lightning_peft.packing import logprobs
from lightning_peft.packing.fallback import objection, rounding
from lightning_peft.packing.logprobs import label_logprobs, vocabulary
from lightning_peft.packing.packed_call import float_dtype


class AnswerScorer:
    """Scores answers under an encoder-decoder: each distinct prompt is read by the encoder once, and all answers run
    through the decoder as one batch.

    Reuse of the encoder's output is tried once against the plain way; where that differs, as under a prompt's virtual
    tokens, each answer is scored together with its prompt. Of logits at most 2^26 are held at once, or those of one
    answer, besides copies of 32 tokens'. Make a new scorer whenever the model or its adapters change.

    Args:
        backbone: an encoder-decoder language model of transformers. Whatever adapters are active count.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self._shares: bool | None = None

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Sum of the answer tokens' log-probabilities, in nats, for each row.

        Args:
            input_ids: `[C, T]`, the prompts.
            attention_mask: `[C, T]`.
            labels: `[C, U]`, the answers, -100 where padded, on the right.

        Returns:
            `[C]` float32 on the CPU.

        Raises:
            ValueError: a row without answer, or a prompt longer than the model can read.
        """
        check_batch(self.backbone, {"input_ids": input_ids, "attention_mask": attention_mask}, "prompts")
        if not (labels[:, :1] != -100).all():
            raise ValueError("Every row needs an answer, which begins with its first label.")
        if self._shares is None:
            self._shares = self._try_sharing(input_ids[:2], attention_mask[:2], labels[:2])
        score = self._shared if self._shares else self._plain
        return score(input_ids, attention_mask, labels).cpu()

    def _shared(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        prompts, prompt_of_row = torch.cat([input_ids, attention_mask], 1).unique(dim=0, return_inverse=True)
        ids, mask = prompts.chunk(2, dim=1)
        # by way of the model's own call, as edits of tokens need it; a token is enough for its decoder
        first = torch.full_like(ids[:, :1], int(labels[0, 0]))
        encoded = self.backbone(input_ids=ids, attention_mask=mask, labels=first).encoder_last_hidden_state
        scores = []
        for part in self._parts(labels):
            prompt = prompt_of_row[part]
            inputs = {"input_ids": ids[prompt], "attention_mask": mask[prompt], "labels": labels[part]}
            logits = self.backbone(encoder_outputs=(encoded[prompt],), **inputs).logits
            scores.append(label_logprobs(logits, labels[part]))
        return torch.cat(scores)

    def _plain(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Score every answer with its prompt: the definition that sharing must agree with."""
        scores = []
        for part in self._parts(labels):
            inputs = {"input_ids": input_ids[part], "attention_mask": attention_mask[part], "labels": labels[part]}
            scores.append(label_logprobs(self.backbone(**inputs).logits, labels[part]))
        return torch.cat(scores)

    def _parts(self, labels: Tensor) -> Iterator[slice]:
        """Yield the rows of each call of the decoder."""
        rows = max(1, logprobs.LOGITS // (labels.shape[1] * vocabulary(self.backbone)))
        yield from (slice(begin, begin + rows) for begin in range(0, len(labels), rows))

    def _try_sharing(self, *rows: Tensor) -> bool:
        plain = self._plain(*rows)
        allowed = rounding(plain, float_dtype(self.backbone))

        def difference() -> float:
            return float((self._shared(*rows) - plain).abs().max())

        instead = "reads the prompt of each answer anew"
        return not objection(self.backbone, "read once for all", difference, allowed, "nats", instead)
