"""Greedy texts, many prompts at a time, the same as one by one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.accepted_arguments import accepted_arguments
from lightning_peft.backbone.token_numbers import numbers_from_zero
from lightning_peft.backbone.window import check_lengths, lengths_of
from lightning_peft.packing.attention import attention_of
from lightning_peft.packing.fallback import give_up, objection
from lightning_peft.packing.packed_call import float_dtype, growing_cache
from lightning_peft.packing.prefix_tree import common_prefix
from lightning_peft.positions import answering

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedTokenizerBase

_TOLERANCE = 1e-3  # of logits: a shared beginning must leave the first new token's as they are, to this
_NEVER = torch.iinfo(torch.long).max
_LEFT = 8  # tokens at least that every prompt keeps of its own
_BEGINNINGS = ("decoder_start_token_id", "forced_bos_token_id")  # an encoder-decoder's, which are no choice
_INSTEAD = "answers from whole prompts"


class GreedyWriter:
    """Writes greedily after batches of prompts, for one state of a model.

    The prompts' common beginning is computed once and its keys and values are kept for all batches. The first batch
    shows whether the model allows it; where it does not, each prompt is computed whole. A row stops as soon as its text
    has ended, and where the beginning is shared it leaves the batch soon after. Sampling, penalties and other settings
    of the model's own `generation_config` do not count.

    Make a new writer whenever the model or its adapters change.

    Args:
        backbone: a causal language model of transformers. Whatever adapters are active count.
        tokenizer: the model's.
        ends: tokens that end a text beside the model's own, such as the one that ends a turn of a chat.
    """

    def __init__(self, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()) -> None:
        self.backbone, self.tokenizer, self.ends = backbone, tokenizer, ends
        self._attention = attention_of(backbone)
        self._prefix: list[int] | None = None  # None: not tried yet; empty: nothing is shared
        self._cache: Any = None

    @torch.no_grad()
    def write(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        is_finished: Callable[[str], bool] = lambda text: False,
        max_new_tokens: int = 50,
    ) -> list[str]:
        """Return what the model writes after each prompt.

        Args:
            input_ids: `[B, T]`, padded on the left.
            attention_mask: `[B, T]`.
            is_finished: whether a text is at its end, asked after each token, with the text so far; a text also ends at
                the model's end token.
            max_new_tokens: where it stops at the latest.

        Raises:
            ContextWindowError: a prompt and a text of that length are longer than the model can read.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "max_new_tokens": max_new_tokens}
        check_lengths(self.backbone, lengths_of(batch), "prompts with their answers")
        device = next(self.backbone.parameters()).device
        ids, mask = input_ids.to(device), attention_mask.to(device)
        if self._prefix is None:
            self._prefix = self._share(ids, mask)
        cache = None
        if self._prefix and _begin_with(self._prefix, ids, mask) and self._rotates_alike(mask, max_new_tokens):
            cache = self._behind_padding(mask)
        written = self._written(ids, mask, cache, is_finished, max_new_tokens)
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def _rotates_alike(self, mask: Tensor, max_new_tokens: int) -> bool:
        """Return whether the beginning's keys are the same in texts of this length."""
        limit = self._attention.longest_text
        alike = int(mask.sum(-1).max()) + max_new_tokens <= limit
        if not alike:
            give_up(
                self.backbone, _INSTEAD, f"in texts of more than {limit:,} tokens its positions are encoded otherwise"
            )
        return alike

    def _written(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: DynamicCache | None,
        is_finished: Callable[[str], bool],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Generate new tokens of each row. Where the cache is ours, rows that have ended leave the batch."""
        from transformers import StoppingCriteriaList

        backbone: Any = self.backbone
        prompt, start = ids.shape[1], mask.sum(-1) - 1
        rows = torch.arange(len(ids), device=ids.device)
        tokens_by_row: list[list[int]] = [[] for _ in rows]
        while True:
            options = {} if cache is None else {"past_key_values": cache}
            left = prompt + max_new_tokens - ids.shape[1]
            with settings_of_generation(self.backbone, self.tokenizer, left, self.ends) as ends:
                # rows leave a quarter of the batch at a time: to take any out copies the cache, as a step does too
                stop = _TextEnds(self.tokenizer, prompt, is_finished, ends, 0 if cache is None else len(rows) * 3 // 4)
                # the prompt ended where it did, whatever of the text `generate` is given with it
                with nullcontext() if cache is None else answering(self.backbone, start=start[rows]):
                    ids = backbone.generate(
                        input_ids=ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([stop]), **options
                    )
            ended = stop.ended.clamp(max=prompt + max_new_tokens)
            for row, tokens, end in zip(rows.tolist(), ids.tolist(), ended.tolist(), strict=True):
                tokens_by_row[row] = tokens[prompt:end]
            going = (ended > ids.shape[1]).nonzero().flatten().to(ids.device)
            if cache is None or not len(going):
                return tokens_by_row
            rows, ids = rows[going], ids[going]
            mask = nn.functional.pad(mask[going], (0, ids.shape[1] - mask.shape[1]), value=1)
            cache.batch_select_indices(going)

    def _share(self, ids: Tensor, mask: Tensor) -> list[int]:
        """Return the beginning to share, empty where the model does not allow it."""
        from transformers.cache_utils import DynamicLayer

        rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        prefix = rows[0][: max(0, min(common_prefix(rows), min(map(len, rows)) - _LEFT))]
        if len(rows) < 2 or len(prefix) < _LEFT:
            return []
        real = mask.sum(-1)
        two = torch.stack([real.argmin(), real.argmax()])  # the most and the least padded show what there is to see
        ids, mask = ids[two], mask[two]
        whole = self._first_logits(ids, mask)

        def difference() -> float:
            self._cache = self._computed(prefix)
            if any(type(layer) is not DynamicLayer for layer in self._cache.layers):
                return math.inf  # a state cannot be put behind padding, whether or not there is any in this batch
            return float((self._first_logits(ids, mask, self._behind_padding(mask), len(prefix)) - whole).abs().max())

        dtype = float_dtype(self.backbone)
        allowed = _TOLERANCE if dtype == torch.float32 else 64 * torch.finfo(dtype).eps
        if objection(self.backbone, "with the primer shared", difference, allowed, "in a logit", _INSTEAD):
            self._cache = None
            return []
        return prefix

    def _computed(self, prefix: list[int]) -> DynamicCache:
        """Return the keys and values of a beginning."""
        cache = growing_cache(self.backbone)
        ids = torch.tensor([prefix], device=next(self.backbone.parameters()).device)
        options = {"logits_to_keep": 1} if "logits_to_keep" in accepted_arguments(self.backbone) else {}
        # no answer begins in it
        with answering(self.backbone, start=torch.tensor([_NEVER])):
            self.backbone(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        return cache

    def _behind_padding(self, mask: Tensor) -> DynamicCache:
        """Return the beginning's cache for rows that are padded on the left: in each it stands behind the padding.

        So windows reach as far back as without a cache. What padding pushes out at the end is run again, in columns
        that would otherwise hold the padding.

        Args:
            mask: `[B, T]`, of the whole prompts.
        """
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(mask))
        pads = (mask == 0).sum(-1)
        for layer in cache.layers:
            if layer.keys is None or layer.values is None:  # one that uses another layer's
                continue
            layer.keys, layer.values = _moved_back(layer.keys, pads), _moved_back(layer.values, pads)
        return cache

    def _first_logits(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None, cached: int = 0) -> Tensor:
        """Return the logits of the first new token, `[B, vocabulary]`."""
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        arguments: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache}
        accepted = accepted_arguments(self.backbone)
        if numbers_from_zero(self.backbone):
            arguments["position_ids"] = positions[:, cached:]
        if "logits_to_keep" in accepted:
            arguments["logits_to_keep"] = 1
        with answering(self.backbone, start=positions[:, -1]):
            return self.backbone(input_ids=ids[:, cached:], **arguments).logits[:, -1].float()


class _TextEnds:
    """Stops each row at its text's end, and all when few enough go on; a stopping criterion of transformers.

    Args:
        tokenizer: the model's.
        prompt: columns of the prompt.
        is_finished: whether a text is at its end.
        ends: tokens that end any text.
        few: rows that may be left over.

    `ended [B]` says at how many columns, prompt included, each row was found to have ended; `_NEVER` where it has not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: int,
        is_finished: Callable[[str], bool],
        ends: list[int],
        few: int = 0,
    ) -> None:
        self.tokenizer, self.prompt, self.is_finished, self.ends, self.few = tokenizer, prompt, is_finished, ends, few
        self.ended = torch.empty(0, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        if not len(self.ended):
            self.ended = torch.full((len(input_ids),), _NEVER)
        new = input_ids[:, self.prompt :].tolist()
        for i in (self.ended == _NEVER).nonzero().flatten().tolist():
            if new[i][-1] in self.ends or self.is_finished(str(self.tokenizer.decode(new[i]))):
                self.ended[i] = input_ids.shape[1]
        has_ended = self.ended != _NEVER
        return (has_ended | (int((~has_ended).sum()) <= self.few)).to(input_ids.device)


@contextmanager
def settings_of_generation(
    backbone: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    ends: Sequence[int] = (),
    **sampling: Any,
) -> Iterator[list[int]]:
    """Replace the model's `generation_config`, from which a call takes the settings that it leaves open.

    Args:
        backbone: a model of transformers that generates.
        tokenizer: the model's.
        max_new_tokens: of each text.
        ends: tokens that end a text beside the model's own.
        **sampling: settings of transformers' `GenerationConfig` besides; without any, generation is greedy.

    Yields:
        The tokens that end a text.
    """
    from transformers import GenerationConfig

    outer: Any = backbone.generation_config
    end: Any = _first(getattr(outer, "eos_token_id", None), tokenizer.eos_token_id)
    if more := [token for token in ends if token not in (end if isinstance(end, list) else [end])]:
        end = [*(end if isinstance(end, list) else [] if end is None else [end]), *more]
    pad = _first(tokenizer.pad_token_id, end[0] if isinstance(end, list) else end, 0)
    begins = {name: token for name in _BEGINNINGS if (token := getattr(outer, name, None)) is not None}
    plain = GenerationConfig(
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=pad,
        **{"do_sample": False, **begins, **sampling},
    )
    # where peft wraps a model, the one or the other of the two counts, as the kind of wrapper is
    owners: list[Any] = [model for model in backbone.modules() if vars(model).get("generation_config") is outer]
    for model in owners:
        model.generation_config = plain
    try:
        yield end if isinstance(end, list) else [end]
    finally:
        for model in owners:
            model.generation_config = outer


def _begin_with(prefix: list[int], ids: Tensor, mask: Tensor) -> bool:
    """Return whether every row, padded on the left, begins with a prefix and goes on after it."""
    rows = (row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True))
    return all(len(row) > len(prefix) and row[: len(prefix)] == prefix for row in rows)


def _moved_back(states: Tensor, pads: Tensor) -> Tensor:
    """Move each row of `states [B, heads, T, width]` back by its number of `pads [B]`; zeros come before it."""
    if not pads.any():
        return states
    places = torch.arange(states.shape[2], device=states.device) - pads.to(states.device)[:, None]
    moved = states.gather(2, places.clamp(min=0)[:, None, :, None].expand_as(states))
    return moved.masked_fill((places < 0)[:, None, :, None], 0)


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)
