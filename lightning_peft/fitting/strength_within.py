"""The largest strength of an adapter within a budget of KL on neutral text."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.backbone.window import check_lengths, context_window, lengths_of
from lightning_peft.effects.predictions import Predictions
from lightning_peft.effects.slices import TextSettings, document_hash
from lightning_peft.effects.token_batches import padding_of, token_batches
from lightning_peft.fitting.lower_blocks import LowerBlocks, blocks_below
from lightning_peft.fitting.strength_search import chosen, largest_within
from lightning_peft.packing.fallback import objection
from lightning_peft.positions import plain_text
from lightning_peft.stack.stack import AdapterStack, adapters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = TextSettings | Sequence[str] | Sequence[Sequence[int]]
DEFAULT_TEXT = TextSettings(tokens=1024)
_CHUNK = 256  # tokens whose log-probabilities over the vocabulary are held at once, as in `effects`
_KEPT_BYTES = 2**29  # of the base's log-probabilities; beyond, its head is run again each time
_TOLERANCE = 0.05  # of the budget
_ROUNDING = 1e-3  # by which states may differ where lower blocks are left out, of the largest


@dataclass(frozen=True)
class StrengthWithin:
    """A strength within a budget of KL(base ‖ adapted) on text, and how it was found.

    Args:
        scale: the strength, as a share of the one that was asked for; 1 where that is within the budget.
        kl: at this strength, in nats a token.
        budget: that was given.
        tried: the strengths that were tried, in ascending order, and their KL.
        tokens: predicted tokens of the texts.
        sha256: of the texts.
        tolerance: the share of the budget within which the search ended.
    """

    scale: float
    kl: float
    budget: float
    tried: tuple[tuple[float, float], ...]
    tokens: int
    sha256: str
    tolerance: float = _TOLERANCE

    @property
    def monotone(self) -> bool:
        """Whether KL rose with every strength that was tried."""
        values = [kl for _, kl in self.tried]
        return all(low <= high for low, high in itertools.pairwise(values))

    def record(self, asked: float) -> dict[str, Any]:
        """Return what an adapter's record holds of it, JSON-able; `asked` is the strength that was asked for."""
        return {
            "budget": self.budget,
            "asked": asked,
            "strength": asked * self.scale,
            "kl": self.kl,
            "tried": [[asked * scale, kl if math.isfinite(kl) else None] for scale, kl in self.tried],
            "monotone": self.monotone,
            "tolerance": self.tolerance,
            "tokens": self.tokens,
            "texts_sha256": self.sha256,
        }

    def sentence(self, name: str, asked: float) -> str:
        """Say what was found, in one sentence."""
        found = f"KL {self.kl:.3g} nats a token on {self.tokens} tokens of text"
        if self.scale == 1.0:
            return (
                f"Adapter {name!r} keeps the strength asked for, {asked:g}: at {found} it is within max_kl="
                f"{self.budget:g}, and a larger one might be too."
            )
        odd = "" if self.monotone else "; KL does not rise with strength throughout, and beyond it some were above"
        return f"Adapter {name!r} has strength {asked * self.scale:.4g} of the {asked:g} asked for, at {found}{odd}."


def check_max_kl(max_kl: float | None) -> None:
    """Refuse a budget that is no number above 0."""
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise ValueError(f"max_kl must be above 0, in nats a token, got {max_kl}.")


def check_measurable(backbone: nn.Module) -> None:
    """Refuse a budget of KL for a model on whose text there is none."""
    if getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"max_kl needs a causal language model, and {type(backbone).__name__} is an encoder-decoder: leave it out."
        )
    head = getattr(backbone, "get_output_embeddings", None)
    if callable(head) and head() is None:
        raise ValueError(
            f"max_kl needs a language model, and {type(backbone).__name__} has no head that predicts tokens: leave it "
            "out."
        )


def strength_within(
    model: nn.Module,
    max_kl: float,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | None = None,
    texts: Texts | None = None,
    *,
    batch_size: int = 8,
    share: Callable[[float], float] = float,
) -> StrengthWithin:
    """Find the largest strength of an adapter, up to the one it has, within a budget of KL(base ‖ adapted) on text.

    The base is the model without this adapter, whatever else is on it. It is run once; the blocks below the adapter
    are computed once too, where the model allows it. Which strengths are tried follows from the numbers alone, so the
    same model and texts give the same strength. Afterwards the model is as it was: `adapters(model).scale(found.scale)`
    takes the strength.

    Args:
        model: a causal language model, or a module that holds one, with adapters of this package.
        max_kl: the budget, in nats a token.
        tokenizer: the model's, where texts are strings.
        adapter: its name; default the only one.
        texts: strings, rows of tokens, or which of neutral text to draw; default 1,024 tokens of the package's.
        batch_size: texts of a call.
        share: called with each KL, returns the one to go by: in several processes that of one of them.

    Raises:
        ValueError: there is no such adapter, or it has no dial; no strength that was tried is within the budget; the
            model is no causal language model; the texts cannot be measured.

    Example:
        >>> from lightning_peft.testing.models import tiny
        >>> from lightning_peft import edit_caa
        >>> model, ids = tiny("llama"), {"A": [5, 6], "B": [7, 8, 9]}
        >>> _ = edit_caa(model, lambda texts: {"input_ids": [ids[t] for t in texts]}, ["A", "B"], [1, 0], [0, 0],
        ...              multiplier=1000.0)
        >>> found = strength_within(model, 0.1, texts=[[5, 6, 7, 8, 9]])
        >>> 0.09 < found.kl <= 0.1, found.scale < 1
        (True, True)
    """
    check_max_kl(max_kl)
    stack = adapters(model)
    if adapter is None and len(stack.parts) > 1:
        names = ", ".join(repr(part.name) for part in stack.parts)
        raise ValueError(f"The model has several adapters, {names}: name the one whose strength is meant.")
    part = stack.parts[0] if adapter is None else stack[adapter]
    check_measurable(stack.backbone)
    rows, sha256 = _rows(DEFAULT_TEXT if texts is None else texts, tokenizer)
    batches = list(token_batches(rows, 0 if tokenizer is None else padding_of(tokenizer), batch_size))
    with _as_it_was(stack, part.name), torch.no_grad(), plain_text(stack.backbone):
        measured = _Measured(stack, part.name, batches)
        asked = part.scale
        tried = largest_within(lambda scale: share(measured.kl(asked * scale)), max_kl, _TOLERANCE)
    scale = chosen(tried, max_kl)
    if not scale:
        least, value = next(iter(tried.items()))
        raise ValueError(
            f"No strength of adapter {part.name!r} is within max_kl={max_kl:g}: at {least:.2g} of the one asked for KL "
            f"is {value:.3g} nats a token already."
        )
    return StrengthWithin(scale, tried[scale], max_kl, tuple(tried.items()), measured.tokens, sha256)


@contextmanager
def _as_it_was(stack: AdapterStack, name: str) -> Iterator[None]:
    """Let an adapter act for a while, the model in evaluation mode; afterwards both are as they were."""
    part = stack[name]
    scale, enabled = part.scale, part.enabled
    try:
        with evaluating(stack.backbone):
            if not enabled:
                stack.enable(True, name)
            yield
    finally:
        if part.scaling:
            stack.scale(scale, name)
        if not enabled:
            stack.enable(False, name)


class _Measured:
    """KL of an adapter at any strength on some texts, of which the base is computed once.

    Args:
        stack: the adapters; the model in evaluation mode, without gradients.
        name: of the adapter.
        batches: `input_ids` and `attention_mask [B, T]`.
    """

    def __init__(self, stack: AdapterStack, name: str, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.stack, self.name, self.backbone = stack, name, stack.backbone
        check_lengths(self.backbone, [n for b in batches for n in lengths_of(b)], "neutral texts", cut=True)
        window, device = context_window(self.backbone), next(self.backbone.parameters()).device
        limit = None if window is None else window.tokens
        self.batches = [
            (b["input_ids"][:, :limit].to(device), b["attention_mask"][:, :limit].to(device)) for b in batches
        ]
        self.places = [(mask[:, :-1] * mask[:, 1:]).nonzero(as_tuple=True) for _, mask in self.batches]
        self.tokens = sum(len(rows) for rows, _ in self.places)
        self.lower = LowerBlocks(blocks_below(stack, name))
        self.outputs: list[list[Any]] = [[] for _ in batches]
        predicted = self._predicted(0)
        # what is larger than hidden states, logits of every token, is not kept
        self.base: list[Predictions | None] = [predicted if predicted.head is not None else None]
        for i in range(1, len(batches)):
            later = self._predicted(i)
            self.base.append(later if later.head is not None else None)
        if self.lower.below and not self._same_without_lower_blocks(predicted):
            self.outputs = [[] for _ in batches]
        self.logprobs: dict[tuple[int, int], Tensor] = {}
        self._left, self._keeping = _KEPT_BYTES, False

    def kl(self, strength: float) -> float:
        """Return KL(base ‖ adapted) at a strength of the adapter's dial, in nats a token."""
        self.stack.scale(strength, self.name)
        return sum(self._sum(i) for i in range(len(self.batches))) / self.tokens

    def _predicted(self, i: int) -> Predictions:
        """Run the base on a batch, and keep what its lower blocks give."""
        self.outputs[i].clear()
        with self.stack.disabled(self.name), self.lower.kept(self.outputs[i]):
            return Predictions(self.backbone, *self.batches[i])

    def _same_without_lower_blocks(self, whole: Predictions) -> bool:
        """Try on the first batch, after the others, whether what lies above needs only the lower blocks' output.

        Whatever else they leave behind is then another batch's.
        """

        def difference() -> float:
            with self.stack.disabled(self.name), self.lower.left_out(self.outputs[0]):
                again = Predictions(self.backbone, *self.batches[0])
            real = self.batches[0][1].bool()
            one, other = whole.kept[real].float(), again.kept[real].float()
            return float((one - other).abs().max() / one.abs().max().clamp(min=1e-9))

        return not objection(self.backbone, "with the lower blocks left out", difference, _ROUNDING, "of a state")

    def _sum(self, i: int) -> float:
        rows, columns = self.places[i]
        with self.lower.left_out(self.outputs[i]):
            adapted = Predictions(self.backbone, *self.batches[i])
        base = self.base[i]
        if base is None and (i, 0) not in self.logprobs:
            with self.stack.disabled(self.name), self.lower.left_out(self.outputs[i]):
                base = Predictions(self.backbone, *self.batches[i])
        total = 0.0
        for start in range(0, len(rows), _CHUNK):
            at = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
            before, after = self._base_logprobs(i, start, base, at), adapted.logprobs(*at)
            total += float((before.exp() * (before - after)).sum())
        return total

    def _base_logprobs(self, i: int, start: int, base: Predictions | None, at: tuple[Tensor, Tensor]) -> Tensor:
        """Return the base's log-probabilities of some tokens, kept as far as there is room for the whole batch's."""
        if (i, start) in self.logprobs:
            return self.logprobs[i, start]
        assert base is not None
        with self.stack.disabled(self.name):
            logprobs = base.logprobs(*at)
        if start == 0:
            size = logprobs.nbytes // len(logprobs) * len(self.places[i][0])
            self._keeping = size <= self._left
            self._left -= size if self._keeping else 0
        if self._keeping:
            self.logprobs[i, start] = logprobs
        return logprobs


def _rows(texts: Texts, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[Sequence[int]], str]:
    """Return the tokens of each text, and the hash of the texts, or of the tokens where only these are given."""
    given: list[str | Sequence[int]]
    if isinstance(texts, TextSettings):
        drawn = texts.text()
        given = [] if drawn is None else [*drawn.documents]
    else:
        given = [*texts]
    rows: list[Sequence[int]] = []
    for number, text in enumerate(given):
        if not isinstance(text, str):
            rows.append([int(token) for token in text])
        elif tokenizer is None:
            raise ValueError("KL is measured on text, and there is no tokenizer: give one, or texts as rows of tokens.")
        else:
            rows.append(tokenizer(text)["input_ids"])
        if len(rows[-1]) < 2:
            raise ValueError(f"Text {number} has fewer than 2 tokens, and nothing predicts the first: leave it out.")
    if not rows:
        raise ValueError("There is no text to measure KL on: give one at least.")
    return rows, document_hash(text if isinstance(text, str) else str(list(text)) for text in given)


def warn_of(found: StrengthWithin, name: str, asked: float) -> None:
    """Warn where a budget was not reached, or KL falls somewhere with strength."""
    if found.scale == 1.0 or not found.monotone:
        warnings.warn(found.sentence(name, asked), stacklevel=3)
