"""Exact log-probabilities of choices behind their prompts, each distinct token computed once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.window import check_lengths
from lightning_peft.packing.attention import attention_of
from lightning_peft.packing.fallback import give_up, objection, rounding
from lightning_peft.packing.logprobs import target_logprobs
from lightning_peft.packing.packed_call import Beginning, float_dtype, packed_logits, read_only
from lightning_peft.packing.plain import score_plainly
from lightning_peft.packing.prefix_tree import Packed, common_prefix, pack, packed_length

_TRIAL = 4  # tokens that the trial of packing keeps of what prompts share, of a prompt's end, and of an answer
_TOGETHER = 768  # tokens of one call, where it holds several prompts


class ChoiceScorer:
    """Scores the choices of prompts (questions, say), for one state of a model.

    The choices of a question share their prompt, and prompts often share a beginning. So the keys and values of the
    common beginning stay cached from call to call, and a question's remaining prompt and all its answers run as one
    packed tree, in which each token sees what comes before it in its own answer, and what answers share at their
    beginnings stands once; several questions run side by side. The last prompt token is always run again: its output
    predicts the first answer token, and an edit may touch it.

    In layers with a sliding window or chunks a token sees no further back in its own text than it would there. Packing
    is tried once against the plain way, and again with the first text that is longer than such a window; where the two
    differ the plain way is used, with a warning. A packed call makes logits for at most 768 tokens, or for one
    question's answers; the plain way is bounded as `score_plainly` says.

    Make a new scorer whenever the model or its adapters change.

    Args:
        backbone: a causal language model of transformers. Whatever adapters are active count.
        normalise: whether the model gives logits; else what it gives are the scores of tokens, which are summed.
    """

    def __init__(self, backbone: nn.Module, normalise: bool = True) -> None:
        self.backbone, self.normalise = backbone, normalise
        self._attention = attention_of(backbone)
        self._packs: bool | None = None
        self._packs_windows: bool | None = None  # the same of texts that are longer than a window
        self._beginning: Beginning | None = None

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Sum of the answer tokens' log-probabilities, in nats, for each row.

        Args:
            input_ids: `[C, T]`, padded on either side; the choices of one question or of several.
            attention_mask: `[C, T]`.
            labels: `[C, T]`, the token where it belongs to the answer, -100 elsewhere.

        Returns:
            `[C]` float32 on the CPU.

        Raises:
            ValueError: a row without prompt or without answer, or one longer than the model can read.
        """
        rows, starts = _rows(input_ids, attention_mask, labels)
        check_lengths(self.backbone, map(len, rows), "choices with their prompts")
        questions = _questions(rows, starts)
        if not self._can_pack(questions, rows, starts):
            return self._plain(rows, starts)
        scores = torch.empty(len(rows))
        for part in _parts(questions, rows, self._attention.longest_row):
            some = [rows[i] for i in part], [starts[i] for i in part]
            scores[part] = self._packed(*some) if self._fits(*some) else self._plain(*some)
        return scores

    @torch.no_grad()
    def score_edited(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        edits: Callable[[bool], Iterable[AbstractContextManager[Any]]],
    ) -> tuple[Tensor, list[Tensor]]:
        """Score one question as the model is, and under edits that touch no token before the last prompt token.

        What comes before that token is the same under all of them and stays in the cache, which the edits read only.

        Args:
            input_ids, attention_mask, labels: as `score`.
            edits: gives the edits, each of which is entered around one call. It is told whether the call has one row,
                of which an edit may then make several, each differently edited.

        Returns:
            `[C]` without an edit; for each edit `[R, C]`, the scores of its rows.

        Raises:
            ValueError: as `score`.
        """
        plain = self.score(input_ids, attention_mask, labels)
        rows, starts = _rows(input_ids, attention_mask, labels)
        questions = _questions(rows, starts)
        packed = len(questions) == 1 and self._can_pack(questions, rows, starts) and self._fits(rows, starts)
        edited_scores = []
        for edit in edits(packed):
            with edit:
                scores = self._packed(rows, starts, edited=True) if packed else self._plain(rows, starts)
                edited_scores.append(scores if packed else scores[None])
        return plain, edited_scores

    @property
    def packs(self) -> bool:
        """True where a question's answers run as one row; known once a question is scored."""
        return bool(self._packs)

    def forget(self) -> None:
        """Empty the cache, so that what comes next does not depend on what was scored before, to the last bit."""
        self._beginning = None

    def _packed(self, rows: list[list[int]], starts: list[int], edited: bool = False) -> Tensor:
        """Score answers packed, `[C]`; edited, in each row of the edit, `[R, C]`, and the cache stays as it is."""
        beginning = self._beginning = self._beginning or Beginning(self.backbone)
        questions = _questions(rows, starts)
        shared = rows[0][: min(common_prefix(rows), *starts)]
        keep = common_prefix([beginning.tokens, shared])
        if not edited:
            beginning.crop(keep)
            if len(questions) > 1 and keep < len(shared):  # else each question's tree would hold it
                self._extend(beginning, shared, keep, min(starts))
                keep = len(shared)
        # the last token of an answer predicts nothing, and what answers share at their beginnings stands once
        trees = [next(pack([rows[i][:-1] for i in q], keep, budget=sum(map(len, rows)))) for q in questions]
        paths = _paths(questions, trees)
        answered = [(i, place) for i, row in enumerate(rows) for place in range(starts[i] + 1, len(row))]
        # the token at a place is predicted by the one before it
        columns, index = torch.tensor([paths[i][place - 1 - keep] for i, place in answered]).unique(return_inverse=True)
        targets = torch.tensor([rows[i][place] for i, place in answered])
        if len(questions) == 1:
            begins = torch.tensor(starts[:1])
        else:
            tree_starts = [torch.full_like(tree.places, starts[q[0]]) for q, tree in zip(questions, trees, strict=True)]
            begins = torch.cat(tree_starts)[None]
        logits = packed_logits(
            self.backbone,
            torch.cat([tree.tokens for tree in trees]),
            torch.cat([tree.places for tree in trees]),
            torch.block_diag(*(tree.sees for tree in trees)).bool(),
            begins,
            columns,
            read_only(beginning.cache) if edited else beginning.cache,
        )
        logprobs = target_logprobs(logits, index.to(logits.device), targets.to(logits.device), self.normalise).cpu()
        scores = torch.zeros(len(logprobs), len(rows)).index_add(1, torch.tensor([i for i, _ in answered]), logprobs)
        if edited:
            return scores
        beginning.crop(len(shared))
        beginning.tokens = shared
        return scores[0]

    def _extend(self, beginning: Beginning, shared: list[int], keep: int, start: int) -> None:
        """Run the rest of a shared beginning, of which the first `keep` tokens are cached."""
        places = torch.arange(keep, len(shared))
        sees = torch.ones(len(places), len(places), dtype=torch.bool).tril()
        tokens, first = torch.tensor(shared[keep:]), torch.tensor([start])
        packed_logits(self.backbone, tokens, places, sees, first, torch.tensor([0]), beginning.cache)

    def _plain(self, rows: list[list[int]], starts: list[int]) -> Tensor:
        return score_plainly(self.backbone, rows, starts, self.normalise)

    def _fits(self, rows: list[list[int]], starts: list[int]) -> bool:
        """Return whether a call on these rows is short enough, with what is cached before it, to be exact."""
        limit = self._attention.longest_row
        if limit == math.inf:
            return True
        shared = min(common_prefix(rows), *starts)
        of_questions = ([rows[i][:-1] for i in question] for question in _questions(rows, starts))
        fits = shared + sum(packed_length(texts, shared) for texts in of_questions) <= limit
        if not fits:
            reason = "it counts the tokens of a call there, whatever position ids it is given"
            give_up(self.backbone, f"scores what takes more than {limit:,} tokens packed row by row", reason)
        return fits

    def _can_pack(self, questions: list[list[int]], rows: list[list[int]], starts: list[int]) -> bool:
        """Return whether texts of this length can be packed, found out with these where it is not known yet."""
        if self._packs is None:
            some = [i for question in questions[:2] for i in sorted(question, key=lambda i: len(rows[i]))[:2]]
            self._packs = self._try_packing([rows[i] for i in some], [starts[i] for i in some])
        longest = max(map(len, rows)) - 1  # an answer's last token is not run
        if not self._packs or self._rotates_differently(longest):
            return False
        if longest <= self._attention.whole:
            return True
        if self._packs_windows is None:
            by_length = sorted(questions, key=lambda question: -max(len(rows[i]) for i in question))
            some = [i for question in by_length[:2] for i in sorted(question, key=lambda i: -len(rows[i]))[:2]]
            tried = [rows[i] for i in some], [starts[i] for i in some]
            if not self._fits(*tried):
                return False
            self._packs_windows = self._agrees(*tried, "scores texts longer than its window row by row")
        return self._packs_windows

    def _rotates_differently(self, longest: int) -> bool:
        limit = self._attention.longest_text
        if longest > limit:
            reason = "its positions are encoded otherwise there"
            give_up(self.backbone, f"scores texts of more than {limit:,} tokens row by row", reason)
        return longest > limit

    def _try_packing(self, rows: list[list[int]], starts: list[int]) -> bool:
        """Try packing on shortened copies of questions."""
        head = rows[0][: min(common_prefix(rows), *starts, _TRIAL)]  # for the cache to hold
        cuts = [max(len(head), start + 1 - _TRIAL) for start in starts]
        short = [head + row[cut : start + 1 + _TRIAL] for row, cut, start in zip(rows, cuts, starts, strict=True)]
        begin = [len(head) + start - cut for start, cut in zip(starts, cuts, strict=True)]
        return self._agrees(short, begin, "is scored row by row")

    def _agrees(self, rows: list[list[int]], starts: list[int], instead: str) -> bool:
        """Score questions both ways, packed twice, so that the cache is tried as well."""
        plain = self._plain(rows, starts)

        def difference() -> float:
            packed = torch.stack([self._packed(rows, starts) for _ in range(2)])
            return float((packed - plain).abs().max())

        allowed = rounding(plain, float_dtype(self.backbone))
        against = objection(self.backbone, "packed", difference, allowed, "nats", instead)
        self.forget()
        return not against


def _paths(questions: list[list[int]], trees: list[Packed]) -> dict[int, list[int]]:
    """Return for each row, by number, where in the call its tokens stand."""
    paths: dict[int, list[int]] = {}
    begin = 0
    for question, tree in zip(questions, trees, strict=True):
        for text, nodes in zip(tree.texts, tree.nodes, strict=True):
            paths[question[text]] = [begin + node for node in nodes]
        begin += len(tree.tokens)
    return paths


def _rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[list[list[int]], list[int]]:
    """Return unpadded token lists and, for each, the index of its last prompt token."""
    rows, starts = [], []
    for ids, mask, label in zip(input_ids.cpu(), attention_mask.cpu().bool(), labels.cpu(), strict=True):
        answered = (label[mask] != -100).nonzero().flatten()
        if len(answered) == 0 or int(answered[0]) == 0:
            raise ValueError("Every row needs a prompt and an answer: labels that begin after the first token.")
        rows.append(ids[mask].tolist())
        starts.append(int(answered[0]) - 1)
    return rows, starts


def _questions(rows: list[list[int]], starts: list[int]) -> list[list[int]]:
    """Return the numbers of the rows of each prompt."""
    rows_by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        rows_by_prompt[tuple(row[: start + 1])].append(i)
    return list(rows_by_prompt.values())


def _parts(questions: list[list[int]], rows: list[list[int]], longest_row: float) -> Iterator[list[int]]:
    """Yield the numbers of the rows of each call, questions whole; `longest_row` counts what is cached too."""
    part: list[int] = []
    shared, size = common_prefix(rows), 0
    together = min(_TOGETHER, longest_row - shared)
    for question in questions:
        length = packed_length([rows[i][:-1] for i in question], shared)
        if part and size + length > together:
            yield part
            part, size = [], 0
        part, size = part + question, size + length
    yield part
