"""Exact log-probabilities of a question's choices, each distinct token computed once."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.positions import answering

_TOLERANCE = 1e-3  # nats: packed and plain scoring must agree to this
_TRIAL_CONTEXT = 16  # prompt tokens kept in the trial of packing


class ChoiceScorer:
    """Scores the choices of one question after another, for one state of a model.

    The choices of a question share their prompt, and questions share the few-shot primer. So the keys and values of
    the common beginning stay cached from call to call, and a question's remaining prompt and all its answers run as
    one packed row, in which each answer sees the prompt and itself. The last prompt token is always run again: its
    output predicts the first answer token, and an edit may touch it. Whether a model can be packed is tried once
    against the plain way; where the two differ the plain way is used.

    Make a new scorer whenever the model or its adapters change.

    Args:
        backbone: a causal language model of transformers. Whatever adapters are active count.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self._accepts = set(inspect.signature(type(backbone).forward).parameters)
        self._packs: bool | None = None
        self._cache: Any = None
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Sum of the answer tokens' log-probabilities, in nats, for each row.

        Args:
            input_ids: `[C, T]`, padded on either side.
            attention_mask: `[C, T]`.
            labels: `[C, T]`, the token where it belongs to the answer, -100 elsewhere.

        Returns:
            `[C]` float32 on the CPU.

        Raises:
            ValueError: a row without prompt or without answer.
        """
        rows, starts = _rows(input_ids, attention_mask, labels)
        if len(set(starts)) > 1:  # no common boundary between prompt and answers
            return self._plain(rows, starts)
        if self._packs is None:
            self._packs = self._try_packing(rows, starts[0])
        return self._packed(rows, starts[0]) if self._packs else self._plain(rows, starts)

    def _packed(self, rows: list[list[int]], start: int) -> Tensor:
        from transformers import DynamicCache

        shared = _common_prefix(rows)
        keep = min(len(_common_prefix([self._cached, shared])), start)
        if self._cache is None:
            self._cache = DynamicCache(config=getattr(self.backbone, "config", None))
        self._crop(keep)
        tokens = shared[keep:]
        positions = list(range(keep, len(shared)))
        owner = [-1] * len(tokens)  # -1: the shared prompt, else the row
        place: list[list[int]] = []  # where each row's own tokens stand in the packed row
        for i, row in enumerate(rows):
            own = row[len(shared) :]
            place.append(list(range(len(tokens), len(tokens) + len(own))))
            tokens = tokens + own
            positions += range(len(shared), len(row))
            owner += [i] * len(own)

        # the token at `position` of row i is predicted by the one before it
        wanted, targets, belongs = [], [], []
        for i, row in enumerate(rows):
            for position in range(start + 1, len(row)):
                before = position - 1
                wanted.append(before - keep if before < len(shared) else place[i][before - len(shared)])
                targets.append(row[position])
                belongs.append(i)
        device = next(self.backbone.parameters()).device
        kept, index = torch.tensor(wanted).unique(return_inverse=True)
        arguments: dict[str, Any] = {}
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = kept.to(device)
        with answering(self.backbone, start=torch.tensor([start])):
            logits = self.backbone(
                input_ids=torch.tensor([tokens], device=device),
                attention_mask=self._packed_mask(owner, keep).to(device),
                position_ids=torch.tensor([positions], device=device),
                past_key_values=self._cache,
                use_cache=True,
                **arguments,
            ).logits[0]
        if "logits_to_keep" not in self._accepts:
            logits = logits[kept.to(device)]
        self._crop(start)
        self._cached = shared[:start]
        logprobs = logits.float().log_softmax(-1)[index.to(device), torch.tensor(targets, device=device)].cpu()
        return torch.zeros(len(rows)).index_add(0, torch.tensor(belongs), logprobs)

    def _crop(self, length: int) -> None:
        """Keep the first `length` tokens of the cache."""
        if (extra := self._cache.get_seq_length() - length) > 0:
            self._cache.crop(-extra)

    def _packed_mask(self, owner: list[int], keep: int) -> Tensor:
        """Additive attention mask `[1, 1, T, keep + T]`: a token sees the cache, the shared prompt and its own row."""
        of = torch.tensor(owner)
        earlier = torch.ones(len(owner), len(owner)).tril().bool()
        seen = earlier & ((of[None, :] == -1) | (of[None, :] == of[:, None]))
        seen = torch.cat([torch.ones(len(owner), keep, dtype=torch.bool), seen], dim=1)
        dtype = next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]

    def _plain(self, rows: list[list[int]], starts: list[int]) -> Tensor:
        """Every row whole, padded on the right: the definition the packed way must agree with."""
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
            predicted = logits[i, starts[i] : len(row) - 1].float().log_softmax(-1)
            targets = torch.tensor(row[starts[i] + 1 :], device=device)
            scores.append(predicted.gather(1, targets[:, None]).sum().cpu())
        return torch.stack(scores)

    def _try_packing(self, rows: list[list[int]], start: int) -> bool:
        """Score a shortened copy of the question both ways, twice, so that the cache is tried as well."""
        cut = max(0, start - _TRIAL_CONTEXT)
        short, begin = [row[cut:] for row in rows], start - cut
        plain = self._plain(short, [begin] * len(short))
        try:
            packed = [self._packed(short, begin) for _ in range(2)]
            difference = max(float((p - plain).abs().max()) for p in packed)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            difference, reason = float("inf"), f"it raises {type(error).__name__}"
        else:
            reason = f"it differs by {difference:.1e} nats"
        finally:
            self._cache, self._cached = None, []
        dtype = next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())
        allowed = (
            _TOLERANCE if dtype == torch.float32 else _TOLERANCE + float(torch.finfo(dtype).eps * plain.abs().max())
        )
        if difference <= allowed:
            return True
        warnings.warn(f"{type(self.backbone).__name__} is scored row by row: packed, {reason}.", stacklevel=2)
        return False


def _rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[list[list[int]], list[int]]:
    """Unpadded token lists and, for each, the index of its last prompt token."""
    rows, starts = [], []
    for ids, mask, label in zip(input_ids.cpu(), attention_mask.cpu().bool(), labels.cpu(), strict=True):
        answered = (label[mask] != -100).nonzero().flatten()
        if len(answered) == 0 or int(answered[0]) == 0:
            raise ValueError("Every row needs a prompt and an answer: labels that begin after the first token.")
        rows.append(ids[mask].tolist())
        starts.append(int(answered[0]) - 1)
    return rows, starts


def _common_prefix(rows: list[list[int]]) -> list[int]:
    """The longest beginning that all token lists share."""
    first, last = min(rows), max(rows)  # in lexicographic order the two extremes differ the earliest
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
