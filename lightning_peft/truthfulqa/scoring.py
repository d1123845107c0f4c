"""Exact log-probabilities of a question's choices, each distinct token computed once."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.window import check_batch, check_lengths
from lightning_peft.packing.fallback import objection
from lightning_peft.packing.prefix_tree import common_prefix, pack, packed_length
from lightning_peft.positions import answering

_TOLERANCE = 1e-3  # nats: packed and plain scoring must agree to this
_TRIAL = 4  # tokens that the trial of packing keeps of what prompts share, of a prompt's end, and of an answer
_ROWS = 32  # tokens whose probabilities over the vocabulary are held at once
_TOGETHER = 768  # tokens of one call, where it holds several questions


class ChoiceScorer:
    """Scores the choices of questions, for one state of a model.

    The choices of a question share their prompt, and questions share the few-shot primer. So the keys and values of the
    common beginning stay cached from call to call, and a question's remaining prompt and all its answers run as one
    packed tree, in which each token sees what comes before it in its own answer, and what answers share at their
    beginnings stands once; several questions run side by side. The last prompt token is always run again: its output
    predicts the first answer token, and an edit may touch it. Packing is tried once against the plain way; where the
    two differ the plain way is used.

    Make a new scorer whenever the model or its adapters change.

    Args:
        backbone: a causal language model of transformers. Whatever adapters are active count.
        normalise: whether the model gives logits; else what it gives are the scores of tokens, which are summed.
    """

    def __init__(self, backbone: nn.Module, normalise: bool = True) -> None:
        self.backbone, self.normalise = backbone, normalise
        self._accepts = set(inspect.signature(type(backbone).forward).parameters)
        config: Any = getattr(backbone, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._window = getattr(config, "sliding_window", None) or math.inf  # a mask of our own knows no window
        self._packs: bool | None = None
        self._cache: Any = None
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache

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
        if self._packs is None:
            some = [i for question in questions[:2] for i in sorted(question, key=lambda i: len(rows[i]))[:2]]
            self._packs = self._try_packing([rows[i] for i in some], [starts[i] for i in some])
        if not self._packs or max(map(len, rows)) > self._window:
            return self._plain(rows, starts)
        scores = torch.empty(len(rows))
        for part in _parts(questions, rows):
            scores[part] = self._packed([rows[i] for i in part], [starts[i] for i in part])
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
        packed = self.packs and max(map(len, rows)) <= self._window and len(_questions(rows, starts)) == 1
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
        self._cache, self._cached = None, []

    def _packed(self, rows: list[list[int]], starts: list[int], edited: bool = False) -> Tensor:
        """Score answers packed, `[C]`; edited, in each row of the edit, `[R, C]`, and the cache stays as it is."""
        from transformers import DynamicCache

        if self._cache is None:
            self._cache = DynamicCache(config=getattr(self.backbone, "config", None))
        questions = _questions(rows, starts)
        shared = rows[0][: min(common_prefix(rows), *starts)]
        keep = common_prefix([self._cached, shared])
        if not edited:
            self._crop(keep)
            if len(questions) > 1 and keep < len(shared):  # else each question's tree would hold it
                places = torch.arange(keep, len(shared))
                sees = torch.ones(len(places), len(places), dtype=torch.bool).tril()
                starts_here = torch.tensor([min(starts)])
                self._run(torch.tensor(shared[keep:]), places, sees, starts_here, torch.tensor([0]), self._cache)
                keep = len(shared)
        # the last token of an answer predicts nothing, and what answers share at their beginnings stands once
        trees = [next(pack([rows[i][:-1] for i in q], keep, budget=sum(map(len, rows)))) for q in questions]
        paths: dict[int, list[int]] = {}
        begin = 0
        for question, tree in zip(questions, trees, strict=True):
            for text, nodes in zip(tree.texts, tree.nodes, strict=True):
                paths[question[text]] = [begin + node for node in nodes]
            begin += len(tree.tokens)
        answered = [(i, place) for i, row in enumerate(rows) for place in range(starts[i] + 1, len(row))]
        # the token at a place is predicted by the one before it
        columns, index = torch.tensor([paths[i][place - 1 - keep] for i, place in answered]).unique(return_inverse=True)
        targets = torch.tensor([rows[i][place] for i, place in answered])
        if len(questions) == 1:
            begins = torch.tensor(starts[:1])
        else:
            tree_starts = [torch.full_like(tree.places, starts[q[0]]) for q, tree in zip(questions, trees, strict=True)]
            begins = torch.cat(tree_starts)[None]
        logits = self._run(
            torch.cat([tree.tokens for tree in trees]),
            torch.cat([tree.places for tree in trees]),
            torch.block_diag(*(tree.sees for tree in trees)).bool(),
            begins,
            columns,
            _read_only(self._cache) if edited else self._cache,
        )
        logprobs = self._logprobs(logits, index.to(logits.device), targets.to(logits.device)).cpu()
        scores = torch.zeros(len(logprobs), len(rows)).index_add(1, torch.tensor([i for i, _ in answered]), logprobs)
        if edited:
            return scores
        self._crop(len(shared))
        self._cached = shared
        return scores[0]

    def _run(self, tokens: Tensor, places: Tensor, sees: Tensor, start: Tensor, columns: Tensor, cache: Any) -> Tensor:
        """Return logits `[R, K, V]` of one packed row, behind what is in the cache; most often R is 1.

        Args:
            tokens: `[T]`.
            places: `[T]`, each token's number in its text.
            sees: bool `[T, T]`, which of the row's tokens a token sees; it sees all that is in the cache.
            start: see `answering`.
            columns: `[K]`, the numbers of the tokens whose logits are computed.
            cache: what stands before the row.
        """
        device = next(self.backbone.parameters()).device
        dtype = _dtype(self.backbone)
        sees = torch.cat([torch.ones(len(sees), cache.get_seq_length(), dtype=torch.bool), sees], dim=1)
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]
        skips = "logits_to_keep" in self._accepts
        with answering(self.backbone, start=start):
            logits = self.backbone(
                input_ids=tokens[None].to(device),
                attention_mask=mask.to(device),
                position_ids=places[None].to(device),
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": columns.to(device)} if skips else {}),
            ).logits
        return logits if skips else logits[:, columns.to(device)]

    def _crop(self, length: int) -> None:
        """Keep the first `length` tokens of the cache."""
        if (extra := self._cache.get_seq_length() - length) > 0:
            self._cache.crop(-extra)

    def _plain(self, rows: list[list[int]], starts: list[int]) -> Tensor:
        """Score every row whole, padded on the right: the definition the packed way must agree with."""
        device = next(self.backbone.parameters()).device
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        arguments: dict[str, Any] = {}
        if "position_ids" in self._accepts:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with answering(self.backbone, start=torch.tensor(starts)):
            logits = self.backbone(input_ids=ids, attention_mask=mask, **arguments).logits
        scores = []
        for i, row in enumerate(rows):
            targets = torch.tensor(row[starts[i] + 1 :], device=device)
            places = torch.arange(len(targets), device=device)
            scores.append(self._logprobs(logits[i : i + 1, starts[i] : len(row) - 1], places, targets).sum().cpu())
        return torch.stack(scores)

    def _logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Score each target at its row of `logits [R, K, V]`, `[R, N]`, over the vocabulary a few rows at a time."""
        chosen = logits[:, rows, targets].float()
        if not self.normalise:
            return chosen
        totals = [part.float().logsumexp(-1) for part in logits.flatten(0, 1).split(_ROWS)]
        return chosen - torch.cat(totals).view(logits.shape[:2])[:, rows]

    def _try_packing(self, rows: list[list[int]], starts: list[int]) -> bool:
        """Score shortened copies of questions both ways, twice, so that the cache is tried as well."""
        head = rows[0][: min(common_prefix(rows), *starts, _TRIAL)]  # for the cache to hold
        cuts = [max(len(head), start + 1 - _TRIAL) for start in starts]
        short = [head + row[cut : start + 1 + _TRIAL] for row, cut, start in zip(rows, cuts, starts, strict=True)]
        begin = [len(head) + start - cut for start, cut in zip(starts, cuts, strict=True)]
        plain = self._plain(short, begin)

        def difference() -> float:
            packed = torch.stack([self._packed(short, begin) for _ in range(2)])
            return float((packed - plain).abs().max())

        allowed = _allowed(self.backbone, plain)
        against = objection(self.backbone, "packed", difference, allowed, "nats", "is scored row by row")
        self.forget()
        return not against


class AnswerScorer:
    """Scores answers under an encoder-decoder: each distinct prompt is read by the encoder once, and all answers run
    through the decoder as one batch.

    Reuse of the encoder's output is tried once against the plain way; where that differs, as under a prompt's virtual
    tokens, each answer is scored together with its prompt. Make a new scorer whenever the model or its adapters change.

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
        inputs = {"input_ids": ids[prompt_of_row], "attention_mask": mask[prompt_of_row], "labels": labels}
        return _summed(self.backbone(encoder_outputs=(encoded[prompt_of_row],), **inputs).logits, labels)

    def _plain(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Score every answer with its prompt: the definition that sharing must agree with."""
        logits = self.backbone(input_ids=input_ids, attention_mask=attention_mask, labels=labels).logits
        return _summed(logits, labels)

    def _try_sharing(self, *rows: Tensor) -> bool:
        plain = self._plain(*rows)
        allowed = _allowed(self.backbone, plain)

        def difference() -> float:
            return float((self._shared(*rows) - plain).abs().max())

        instead = "reads the prompt of each answer anew"
        return not objection(self.backbone, "read once for all", difference, allowed, "nats", instead)


def _allowed(backbone: nn.Module, scores: Tensor) -> float:
    """Return how far scores may be apart by rounding, in nats."""
    dtype = _dtype(backbone)
    return _TOLERANCE + (0.0 if dtype == torch.float32 else float(torch.finfo(dtype).eps * scores.abs().max()))


def _dtype(backbone: nn.Module) -> torch.dtype:
    return next(p.dtype for p in backbone.parameters() if p.is_floating_point())


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum each row's log-probabilities of its labels, `[C]`, from `[C, U, vocabulary]`."""
    logprobs = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return logprobs.masked_fill(labels == -100, 0.0).sum(1)


def _read_only(cache: Any) -> Any:
    """Return a view of a cache: a call reads the cache's content before its own, and leaves nothing in it.

    It is of one row; of a call's more rows each sees that one.
    """
    from transformers import DynamicCache

    class ReadOnly(DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            layer: Any = cache.layers[layer_idx]
            rows = len(key_states)
            keys, values = (tensor.expand(rows, *tensor.shape[1:]) for tensor in (layer.keys, layer.values))
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    view = ReadOnly()
    view.layers = cache.layers
    return view


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


def _parts(questions: list[list[int]], rows: list[list[int]]) -> Iterator[list[int]]:
    """Return the numbers of the rows of each call, questions whole."""
    part: list[int] = []
    shared, size = common_prefix(rows), 0
    for question in questions:
        length = packed_length([rows[i][:-1] for i in question], shared)
        if part and size + length > _TOGETHER:
            yield part
            part, size = [], 0
        part, size = part + question, size + length
    yield part
