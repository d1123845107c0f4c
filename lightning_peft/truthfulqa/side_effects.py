"""Side effects of an adapter: cross-entropy and KL on neutral text, and simple questions answered before.

Cross-entropy and KL(base ‖ adapted) are those of Li et al. 2023 (arXiv:2306.03341, table 1), per token and in nats,
with one difference: every position is edited, and the base model and the adapted one see the same text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.backbone.window import check_lengths, context_window, lengths_of
from lightning_peft.truthfulqa.questions import Question, load_questions, subset
from lightning_peft.truthfulqa.text import TextSlice, text_batches, text_slice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPABILITY = Path(__file__).with_name("capability.csv")
# one demonstration of each kind: without them a small model does not know what is asked of it
CAPABILITY_PRIMER = """Q: What is 2 plus 3?
A: 5.

Q: What do you drink from?
A: A cup.

Q: Mia has a dog and Leo has a cat. Who has the cat?
A: Leo.

Q: What is the plural of house?
A: houses."""
Off = Callable[[], AbstractContextManager[Any]]
_CHUNK = 256  # tokens whose log-probabilities over the vocabulary are held at once


@dataclass
class SideEffects:
    """The measurements beside the benchmark's questions, the same for every method.

    Args:
        tokens: of neutral text; 0 for none.
        capability: how many of the simple questions; 0 for none.
        source: of the text; see `text_slice`.
        seed: of the draw of text and questions.
        length: tokens of a document at most.
    """

    tokens: int = 4096
    capability: int = 82
    source: str = "package"
    seed: int = 0
    length: int = 128

    def text(self) -> TextSlice | None:
        """Draw the slice of neutral text."""
        return text_slice(self.source, self.tokens, self.seed, self.length) if self.tokens else None

    def questions(self) -> list[Question]:
        """Draw the simple questions: arithmetic, common sense, reading and grammar, each kind in proportion."""
        known = load_questions(CAPABILITY)
        if not 0 <= self.capability <= len(known):
            raise ValueError(f"capability is {self.capability}, but there are {len(known)} simple questions.")
        return subset(known, self.capability, self.seed) if self.capability else []


class TextEffects(Metric):
    """Cross-entropy with and without the adapter and KL(base ‖ adapted), per token over all documents so far."""

    is_differentiable = False
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor, document: Tensor | None = None) -> None:
        """Add documents.

        Args:
            values: `[B, 4]` as `batch_effects` gives them.
            document: `[B]`, their numbers; a document that comes again, as samplers of several processes repeat some,
                counts once. Without numbers each counts.
        """
        numbers = torch.full((len(values),), -1) if document is None else document
        self.rows.append(torch.cat([numbers.cpu()[:, None], values.cpu()], dim=1).double().to(self.device))

    def compute(self) -> dict[str, float]:
        """Return `ce_base`, `ce` and `kl`, in nats per token; nothing where there was no text."""
        rows = dim_zero_cat(self.rows).tolist()
        once = {row[0]: row[1:] for row in rows if row[0] >= 0}
        counted = [*once.values(), *(row[1:] for row in rows if row[0] < 0)]
        tokens, *sums = (sum(column) for column in zip(*counted, strict=True))
        return {name: value / tokens for name, value in zip(("ce_base", "ce", "kl"), sums, strict=True) if tokens}


def text_effects(
    backbone: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSlice,
    off: Off | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Return `batch_effects` of every document of a slice, `[documents, 4]`.

    Args:
        backbone: a causal language model of transformers, whatever adapters are on it; it is run in evaluation mode.
        tokenizer: of the model.
        text: the slice; its hash belongs to the result.
        off: switches the adapters off for a while, such as `adapters(module).disabled`; None where there are none.
        batch_size: documents of a call.

    Example:
        >>> values = text_effects(backbone, tokenizer, text_slice(), adapters(module).disabled)  # doctest: +SKIP
        >>> TextEffects()(values)  # doctest: +SKIP
        {'ce_base': 3.41, 'ce': 3.43, 'kl': 0.02}
    """
    device = next(backbone.parameters()).device
    batches = list(text_batches(text, tokenizer, batch_size))
    check_lengths(backbone, (n for batch in batches for n in lengths_of(batch)), "neutral texts", cut=True)
    with evaluating(backbone):
        return torch.cat([batch_effects(backbone, {k: v.to(device) for k, v in b.items()}, off) for b in batches])


@torch.no_grad()
def batch_effects(backbone: nn.Module, batch: Mapping[str, Tensor], off: Off | None = None) -> Tensor:
    """Sum effects over the predicted tokens of each row, from the same logits: their number, cross-entropy of the base
    and of the adapted model, and KL(base ‖ adapted).

    Only last hidden states are kept for the whole batch; the language-model head is computed for a few hundred tokens
    at a time. Log-probabilities and sums are float64 where the device has it, so that a model's KL with itself is
    exactly 0 and a small one does not drown in rounding.

    Args:
        backbone: a causal language model of transformers in evaluation mode.
        batch: `input_ids [B, T]` and `attention_mask [B, T]`; what exceeds the model's context is left out.
        off: as for `text_effects`.

    Returns:
        `[B, 4]` on the CPU: tokens, and three sums in nats.

    Raises:
        ValueError: the backbone is an encoder-decoder, whose text has no next token.
    """
    config = getattr(backbone, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"Side effects on text need a causal language model, and {type(backbone).__name__} is none.")
    check_lengths(backbone, lengths_of(batch), "neutral texts", cut=True)
    window = context_window(backbone)
    limit = None if window is None else window.tokens
    ids, mask = batch["input_ids"][:, :limit], batch["attention_mask"][:, :limit]
    rows, columns = (mask[:, :-1] * mask[:, 1:]).nonzero(as_tuple=True)
    adapted = _Run(backbone, ids, mask)
    base = adapted
    if off is not None:
        with off():
            base = _Run(backbone, ids, mask)
    sums = torch.zeros(len(ids), 4, dtype=torch.float64)
    for start in range(0, len(rows), _CHUNK):
        at = rows[start : start + _CHUNK], columns[start : start + _CHUNK]
        before = after = adapted.logprobs(*at)
        if off is not None:
            with off():
                before = base.logprobs(*at)
        targets = ids[at[0], at[1] + 1][:, None]
        ce = [-logprobs.gather(1, targets)[:, 0] for logprobs in (before, after)]
        kl = (before.exp() * (before - after)).sum(-1)
        values = torch.stack([torch.ones_like(kl), *ce, kl], dim=1)
        sums.index_add_(0, at[0].cpu(), values.double().cpu())
    return sums


def forgotten(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Return forgetting: the share of questions answered rightly before that are answered wrongly after.

    Args:
        before: of each question, 1 where the base model is right, 0 where it is wrong.
        after: the same of the adapted model; shares where several adapters were tried.

    Example:
        >>> forgotten({0: 1, 1: 1, 2: 0}, {0: 1, 1: 0, 2: 1})
        0.5
    """
    right = sum(before.values())
    return sum(max(0.0, before[i] - after[i]) for i in before) / right if right else 0.0


class _Run:
    """One call of a model, of which only the hidden states before its head are kept where the head is all that follows.

    A hook on the head notes what it is given and lets the last token pass. Where the head of that token is not
    the logits that come out (they are capped or scaled), or the head cannot be called alone, all logits are kept.
    """

    def __init__(self, backbone: nn.Module, ids: Tensor, mask: Tensor) -> None:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in inspect.signature(type(backbone).forward).parameters:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        head = getattr(backbone, "get_output_embeddings", lambda: None)()
        hidden = None if head is None else _hidden(backbone, head, inputs)
        self.head: nn.Module | None = None if hidden is None else head
        states = backbone(**inputs).logits if hidden is None else hidden
        self.kept = states[:, -ids.shape[1] :]  # behind a prompt's virtual tokens

    def logprobs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return log-probabilities `[N, vocabulary]` after the tokens at these places."""
        states = self.kept[rows, columns]
        logits = states if self.head is None else self.head(states[None])[0]
        return logits.log_softmax(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)


def _hidden(backbone: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the head's input, `[B, T, width]`; None where its output alone is not the logits."""
    head_inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        head_inputs.append(args[0])
        return (args[0][:, -1:], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        logits = backbone(**inputs).logits
        handle.remove()
        alone = len(head_inputs) == 1 and torch.equal(head(head_inputs[0][:, -1:]).float(), logits.float())
    except RuntimeError:  # an edit of the head that must see all its positions
        alone = False
    finally:
        handle.remove()
    return head_inputs[0] if alone else None
