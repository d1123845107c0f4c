"""The model type `lightning-peft` of lm-evaluation-harness: its `hf` with adapters on, edits beginning at answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lightning_peft.backbone.window import context_window
from lightning_peft.harness.adapters import Chosen, choose, put_on
from lightning_peft.harness.response_cache import check_cache
from lightning_peft.positions import answering, plain_text

if TYPE_CHECKING:
    from lm_eval.api.model import CacheHook
    from transformers import PreTrainedModel

NAME = "lightning-peft"
# the two texts, and their tokens: context and continuation
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Starts = dict[tuple[int, ...], int]


@register_model(NAME)
class AdaptedLM(HFLM):
    """A model of transformers with a saved adapter, or a stack of them, for the tasks of lm-evaluation-harness.

    Prompts, batches, caches and chat templates are those of the harness's `hf`, and so are the numbers of models
    without an edit. An edit of answers begins at the last token of the context of each request that scores a
    continuation, and of the prompt of each that generates. A request that scores a whole text (`loglikelihood_rolling`)
    has no prompt: every token is edited, as on all plain text.

    Args:
        pretrained: the base model's folder or its name on the hub, or the model itself; default: the one that the
            adapter names. Without an adapter it may be any model, such as a baked or a merged one.
        adapter: a folder that `load_adapter` reads: an edit, a tuned adapter, or a stack; compressed or not.
        scale: the dial: 1 as saved, 0 equal to the base bit for bit, negative reversed.
        positions: which tokens edits act on, in place of those they were saved with; see `lightning_peft.tokens`.
        strict_base: refuse an adapter made for another base model, instead of warning once.
        device: default: a GPU where there is one.
        peft: another name for `adapter`, as `hf` calls it.
        **options: as of `hf`: `dtype`, `batch_size`, `max_length`, `tokenizer`, `logits_cache`, …

    Raises:
        AdapterError: the adapter cannot be read, or is for another base model.
        ValueError: both `adapter` and `peft`, no folder there, no such base, or a scale that is no number.

    Example:
        >>> import lm_eval, lightning_peft.harness
        >>> given = {"adapter": "edit", "scale": 0.5}
        >>> lm_eval.simple_evaluate("lightning-peft", given, tasks=["arc_easy"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        adapter: str | None = None,
        scale: float = 1.0,
        positions: str | None = None,
        strict_base: bool = True,
        device: str | None = None,
        peft: str | None = None,
        **options: Any,
    ) -> None:
        self.chosen: Chosen = choose(pretrained, adapter, peft, scale, positions)
        self._starts: Starts | None = None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(self.chosen.base, device=device, **options)
        if self.chosen.adapter is not None:
            put_on(self.model, self.chosen, strict_base)

    @property
    def max_length(self) -> int:
        """The number of tokens that the model reads at once, beside a prompt's virtual tokens."""
        length: int = super().max_length
        window = context_window(self.model)
        return length if window is None else min(length, window.tokens)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results about the model, and which adapter was on it."""
        return {**super().get_model_info(), **self.chosen.describe()}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take a cache of responses, unless it holds those of another model, adapter, scale or positions."""
        if cache_hook.dbdict is not None:
            check_cache(cache_hook.dbdict, {**self.chosen.describe(), "dtype": str(self.model.dtype)})
        super().set_cache_hook(cache_hook)

    def _get_config(self, pretrained: str, **options: Any) -> None:
        try:
            super()._get_config(pretrained, **options)
        except OSError as error:
            raise ValueError(
                f"{pretrained} is neither a folder with a transformers config.json nor a model that is reached on the "
                "hub."
            ) from error

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        whole_texts = all(texts is None for texts, _, _ in requests)
        if whole_texts or self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        answers: dict[int, tuple[float, bool]] = {}
        for numbers, starts in self._rounds(requests):
            with self._knowing(starts):
                some = super()._loglikelihood_tokens([requests[i] for i in numbers], disable_tqdm, override_bs)
            answers.update(zip(numbers, some, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _rounds(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], Starts]]:
        """Yield requests by number, and where the answers begin in the rows that they become.

        Requests of the same tokens whose answers begin elsewhere come in different rounds. An edit of answers computes
        another thing for each, where the harness would compute one for both; and without edits too it reads the scores
        of the shorter answer at the tokens where the longer begins (lm_eval 0.4.13). It is rare that there is more than
        one round.
        """
        left = [(number, *self._row(*request[1:])) for number, request in enumerate(requests)]
        while left:
            starts: Starts = {}
            fits = [starts.setdefault(row, start) == start for _, row, start in left]
            yield [number for (number, _, _), fit in zip(left, fits, strict=True) if fit], starts
            left = [entry for entry, fit in zip(left, fits, strict=True) if not fit]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], int]:
        """Return the tokens of a request's row, as the harness cuts them, and the number of its last context token."""
        tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
        return _unpadded(tokens), len(tokens) - len(continuation)

    @contextmanager
    def _knowing(self, starts: Starts | None) -> Iterator[None]:
        before, self._starts = self._starts, starts
        try:
            yield
        finally:
            self._starts = before

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        with self._knowing(None):  # what it tries are no requests
            return super()._detect_batch_size(requests, pos)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._starts is None:
            with plain_text(self.model):
                return super()._model_call(inps, attn_mask, labels)
        starts = torch.tensor([self._starts[_unpadded(row)] for row in inps.tolist()])
        with answering(self.model, start=starts):
            return super()._model_call(inps, attn_mask, labels)


def _unpadded(tokens: list[int]) -> tuple[int, ...]:
    """Return a row without the zeros at its end, with which the harness pads."""
    end = len(tokens)
    while end and tokens[end - 1] == 0:
        end -= 1
    return tuple(tokens[:end])
