"""Many interventions measured together: what they share is computed once, and each is a row of a call."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite
from lightning_peft.editing.iti import HeadEdit
from lightning_peft.editing.row_offsets import RowOffsets, displacements
from lightning_peft.packing import logprobs
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.packing.fallback import objection
from lightning_peft.positions import plain_text

_TOLERANCE = 1e-3  # of the largest logit: rows together and alone must agree to this


class Grid:
    """Scores questions and text under many interventions on one model.

    The tokens before a question's last prompt token, the same under all of them, are computed once. For the rest,
    interventions with the same first edited layer run as rows of one call, which is one row up to that layer. A trial
    shows whether the model can make several rows of one; where it cannot, each intervention has a call of its own.

    Args:
        backbone: a causal language model of transformers in evaluation mode.
        sites: its `head_sites`.
        points: `(edit, alpha)` of each intervention.
        positions: which tokens are edited, a selection within `"answer"`.
        rows: interventions of one call.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sites: Sequence[HeadSite],
        points: Sequence[tuple[HeadEdit, float]],
        positions: str = "answer",
        rows: int = 7,
    ) -> None:
        self.backbone, self.sites, self.points, self.positions = backbone, sites, points, positions
        self._device = next(backbone.parameters()).device
        self._scorer = ChoiceScorer(backbone)
        self._made: dict[tuple[int, ...], RowOffsets] = {}
        self._alone = [[i] for i in range(len(points))]
        self._together = self._group(rows) if rows > 1 and self._rows_work() else self._alone

    def scores(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Tensor]:
        """Yield log-probabilities of the choices of one question after another, `[1 + points, C]`, the base first.

        They depend on these questions alone, whatever was scored before.

        Args:
            batches: `input_ids`, `attention_mask` and `labels [C, T]`, one unit each, as a `ChoiceTask` tests them.
        """
        self._scorer.forget()
        for batch in batches:
            yield self._score(batch["input_ids"], batch["attention_mask"], batch["labels"])

    def _score(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        calls: list[list[int]] = []

        def edits(one_row: bool) -> Iterator[RowOffsets]:
            calls.extend(self._together if one_row else self._alone)
            return map(self._edit, calls)

        base, edited = self._scorer.score_edited(ids, mask, labels, edits)
        scores = base.repeat(1 + len(self.points), 1)
        for call, rows in zip(calls, edited, strict=True):
            scores[[1 + i for i in call]] = rows
        return scores

    @torch.no_grad()
    def divergence(self, tokens: Tensor) -> Tensor:
        """Sum KL(base ‖ edited) of the next token after each of `tokens [T]` but the last: `[points]`, in nats.

        Without a prompt every position is one of an answer, and is edited. Of logits at most 2^26 are held at once, or
        those of one intervention on the text, beside the base's.
        """
        tokens = tokens[None].to(self._device)
        base = self.backbone(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        divergences = torch.zeros(len(self.points), dtype=torch.float64)
        together = max(1, logprobs.LOGITS // base.numel())  # rows of a call
        for call in (c[i : i + together] for c in self._together for i in range(0, len(c), together)):
            with self._edit(call), plain_text(self.backbone):
                logits = self.backbone(input_ids=tokens, use_cache=False).logits[:, :-1]
            for point, row in zip(call, logits, strict=True):
                edited = row.float().log_softmax(-1)
                divergences[point] = nn.functional.kl_div(edited, base, reduction="sum", log_target=True).double().cpu()
        return divergences

    def _edit(self, call: Sequence[int]) -> RowOffsets:
        if (key := tuple(call)) not in self._made:
            moved = displacements(self.sites, [self.points[i] for i in call])
            on_device = {name: rows.to(self._device) for name, rows in moved.items()}
            self._made[key] = RowOffsets(self.backbone, on_device, self.positions)
        return self._made[key]

    def _group(self, rows: int) -> list[list[int]]:
        """Group points of the same first edited layer into calls of like size, at most `rows` each."""
        by_first: dict[int, list[int]] = defaultdict(list)
        for i, (edit, _) in enumerate(self.points):
            by_first[min(layer for layer, _ in edit.heads)].append(i)
        calls = []
        for members in by_first.values():
            parts = -(-len(members) // rows)
            calls += [members[part::parts] for part in range(parts)]
        return calls

    @torch.no_grad()
    def _rows_work(self) -> bool:
        """Try two rows of one call against each alone, on a few tokens."""
        tokens = torch.arange(1, 9, device=self._device)[None]
        pair = [0, len(self.points) - 1]

        def logits(points: list[int]) -> Tensor:
            with self._edit(points), plain_text(self.backbone):
                return self.backbone(input_ids=tokens, use_cache=False).logits

        expected = torch.cat([logits([i]) for i in pair])
        allowed = max(_TOLERANCE, 8 * torch.finfo(expected.dtype).eps)

        def apart() -> float:
            together = logits(pair)
            if together.shape != expected.shape:  # rows are not made at all
                return math.inf
            return float((together - expected).abs().max() / expected.abs().max())

        instead = "runs each intervention in a call of its own"
        return not objection(self.backbone, "as rows of one call", apart, allowed, "of the largest logit", instead)
