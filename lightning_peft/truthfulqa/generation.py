"""Greedy answers, many questions at a time, the same as one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.backbone.window import check_lengths, lengths_of
from lightning_peft.packing.fallback import objection
from lightning_peft.packing.prefix_tree import common_prefix
from lightning_peft.positions import answering
from lightning_peft.truthfulqa.arguments import accepted_arguments
from lightning_peft.truthfulqa.presets import Ending, Prompting, cut_answer, is_finished

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedTokenizerBase

    from lightning_peft.truthfulqa.questions import Question

_TOLERANCE = 1e-3  # of logits: a shared beginning must leave the first new token's as they are, to this
_NEVER = torch.iinfo(torch.long).max
_LEFT = 8  # tokens at least that every prompt keeps of its own


class Answer(NamedTuple):
    """A model's answer (a tuple: Lightning moves what `predict_step` returns, and refuses frozen dataclasses).

    Args:
        question_id: as in the release.
        text: the answer as it is judged.
        raw: all that the model wrote.
    """

    question_id: int
    text: str
    raw: str


def encode_prompts(
    questions: Sequence[Question], prompting: Prompting, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[dict[str, Any]]:
    """Encode prompts in batches of like length, padded on the left: the shortest first, whatever the questions' order.

    Returns:
        Dicts with `input_ids [B, T]`, `attention_mask [B, T]`, `group [B]` (the question's id), `prompt_end [B]` (the
        position id of the last prompt token), and `ending` and `max_new_tokens` of the prompting.
    """
    rows = sorted(
        ((prompting.encode(tokenizer, q.text), q.id) for q in questions), key=lambda row: (len(row[0]), row[1])
    )
    pad = _first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    batches: list[dict[str, Any]] = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        width = len(part[-1][0])
        batches.append(
            {
                "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in part]),
                "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in part]),
                "group": torch.tensor([number for _, number in part]),
                "prompt_end": torch.tensor([len(ids) - 1 for ids, _ in part]),
                "ending": prompting.ending,
                "max_new_tokens": prompting.max_new_tokens,
            }
        )
    return batches


class AnswerGenerator:
    """Answers batches of prompts greedily, for one state of a model.

    The prompts' common beginning, the primer, is computed once and its keys and values are kept for all batches. The
    first batch shows whether the model allows it; where it does not, each prompt is computed whole. A row stops as soon
    as its answer has ended, and where the primer is shared it leaves the batch soon after. Sampling, penalties and
    other settings of the model's own `generation_config` do not count.

    Make a new generator whenever the model or its adapters change.

    Args:
        backbone: a causal language model of transformers. Whatever adapters are active count.
        tokenizer: the model's.
    """

    def __init__(self, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        self._prefix: list[int] | None = None  # None: not tried yet; empty: nothing is shared
        self._cache: Any = None

    @torch.no_grad()
    def answer(self, batch: dict[str, Any]) -> list[Answer]:
        """Answer one batch of `encode_prompts`."""
        ending: Ending = batch["ending"]
        texts = self.write(batch["input_ids"], batch["attention_mask"], ending, batch["max_new_tokens"])
        return [
            Answer(number, cut_answer(text, ending), text)
            for number, text in zip(batch["group"].tolist(), texts, strict=True)
        ]

    @torch.no_grad()
    def write(
        self, input_ids: Tensor, attention_mask: Tensor, ending: Ending = "paragraph", max_new_tokens: int = 50
    ) -> list[str]:
        """Return what the model writes after each prompt.

        Args:
            input_ids: `[B, T]`, padded on the left.
            attention_mask: `[B, T]`.
            ending: where an answer ends, and writing stops.
            max_new_tokens: where it stops at the latest.

        Raises:
            ContextWindowError: a prompt and an answer of that length are longer than the model can read.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "max_new_tokens": max_new_tokens}
        check_lengths(self.backbone, lengths_of(batch), "prompts with their answers")
        device = next(self.backbone.parameters()).device
        ids, mask = input_ids.to(device), attention_mask.to(device)
        if self._prefix is None:
            self._prefix = self._share(ids, mask)
        cache = None
        if self._prefix and (moved := _move_padding(ids, mask, self._prefix)) is not None:
            ids, mask = moved
            cache = self._repeated(len(ids))
        written = self._written(ids, mask, cache, ending, max_new_tokens)
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def _written(
        self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, ending: Ending, max_new_tokens: int
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
            with _greedily(self.backbone, self.tokenizer, left) as ends:
                # rows leave a quarter of the batch at a time: to take any out copies the cache, as a step does too
                stop = _AnswerEnds(self.tokenizer, prompt, ending, ends, 0 if cache is None else len(rows) * 3 // 4)
                # the prompt ended where it did, whatever of the answer `generate` is given with it
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
            moved = _move_padding(ids, mask, prefix)
            assert moved is not None
            return float((self._first_logits(*moved, self._repeated(2), len(prefix)) - whole).abs().max())

        dtype = next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())
        allowed = _TOLERANCE if dtype == torch.float32 else 64 * torch.finfo(dtype).eps
        instead = "answers from whole prompts"
        if objection(self.backbone, "with the primer shared", difference, allowed, "in a logit", instead):
            self._cache = None
            return []
        return prefix

    def _computed(self, prefix: list[int]) -> DynamicCache:
        from transformers import DynamicCache

        cache = DynamicCache(config=getattr(self.backbone, "config", None))
        ids = torch.tensor([prefix], device=next(self.backbone.parameters()).device)
        # no answer begins in it
        with answering(self.backbone, start=torch.tensor([_NEVER])):
            self.backbone(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache

    def _repeated(self, rows: int) -> DynamicCache:
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def _first_logits(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None, cached: int = 0) -> Tensor:
        """Return the logits of the first new token, `[B, vocabulary]`."""
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        arguments: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache}
        accepted = accepted_arguments(self.backbone)
        if "position_ids" in accepted:
            arguments["position_ids"] = positions[:, cached:]
        if "logits_to_keep" in accepted:
            arguments["logits_to_keep"] = 1
        with answering(self.backbone, start=positions[:, -1]):
            return self.backbone(input_ids=ids[:, cached:], **arguments).logits[:, -1].float()


class _AnswerEnds:
    """Stops each row at its answer's end, and all when few enough go on; a stopping criterion of transformers.

    Args:
        tokenizer: the model's.
        prompt: columns of the prompt.
        ending: where an answer ends.
        ends: tokens that end any text.
        few: rows that may be left over.

    `ended [B]` says at how many columns, prompt included, each row was found to have ended; `_NEVER` where it has not.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: int, ending: Ending, ends: list[int], few: int = 0
    ) -> None:
        self.tokenizer, self.prompt, self.ending, self.ends, self.few = tokenizer, prompt, ending, ends, few
        self.ended = torch.empty(0, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        if not len(self.ended):
            self.ended = torch.full((len(input_ids),), _NEVER)
        new = input_ids[:, self.prompt :].tolist()
        for i in (self.ended == _NEVER).nonzero().flatten().tolist():
            if new[i][-1] in self.ends or is_finished(str(self.tokenizer.decode(new[i])), self.ending):
                self.ended[i] = input_ids.shape[1]
        has_ended = self.ended != _NEVER
        return (has_ended | (int((~has_ended).sum()) <= self.few)).to(input_ids.device)


@contextmanager
def _greedily(backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[list[int]]:
    """Replace the model's `generation_config`, from which a call takes the settings that it leaves open.

    Yields:
        The tokens that end a text.
    """
    from transformers import GenerationConfig

    outer: Any = backbone.generation_config
    end = _first(getattr(outer, "eos_token_id", None), tokenizer.eos_token_id)
    pad = _first(tokenizer.pad_token_id, end[0] if isinstance(end, list) else end, 0)
    plain = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad
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


def _move_padding(ids: Tensor, mask: Tensor, prefix: list[int]) -> tuple[Tensor, Tensor] | None:
    """Move padding from before the shared beginning to after it; None where a row does not begin with it."""
    start = torch.tensor(prefix, device=ids.device)
    moved = ids.clone()
    moved_mask = mask.clone()
    for i, real in enumerate(mask.sum(-1).tolist()):
        row = ids[i, ids.shape[1] - real :]
        if real <= len(prefix) or not torch.equal(row[: len(prefix)], start):
            return None
        pads = ids.shape[1] - real
        moved[i] = torch.cat([start, ids[i, :pads], row[len(prefix) :]])
        moved_mask[i, : len(prefix)] = 1
        moved_mask[i, len(prefix) : len(prefix) + pads] = 0
    return moved, moved_mask


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)
