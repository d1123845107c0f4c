"""Prompts as tokens: where the subject ends, which tokens are the object, and how likely a model finds it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.backbone.token_numbers import token_numbers
from lightning_peft.editing.facts.fact import Fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"


@dataclass(frozen=True)
class Prompt:
    """A text that names a subject, and what may follow it.

    Args:
        template: the text, with `{}` for the subject and without a space at its end.
        subject: what stands there.
        object: what follows, joined by a space; nothing where only the next token is asked for.
        prefix: what comes before, as a sentence of its own.

    Example:
        >>> Prompt("{} is a city in", "Lyon", "Japan", "It rained").text
        'It rained. Lyon is a city in'
    """

    template: str
    subject: str
    object: str = ""
    prefix: str = ""

    @property
    def text(self) -> str:
        """All but the object."""
        return self._before + self.template.replace("{}", self.subject)

    @property
    def place(self) -> int:
        """The index in the text where the subject begins, or -1."""
        place = self.template.find("{}")
        return place if place < 0 else len(self._before) + place

    @property
    def _before(self) -> str:
        return f"{self.prefix}. " if self.prefix else ""


@dataclass(frozen=True)
class Rows:
    """Prompts as one batch, padded on the left.

    Args:
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 1 on real tokens.
        subject: `[B]`, the column of the subject's last token.
        begin: `[B]`, the column of its first.
        objects: bool `[B, T]`, the object's tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    subject: Tensor
    begin: Tensor
    objects: Tensor

    @property
    def keep(self) -> int:
        """The number of columns from the end that have a say in the object, or in the next token."""
        columns = self.objects.any(0).nonzero()[:, 0]
        return 1 if len(columns) == 0 else self.input_ids.shape[1] - int(columns[0]) + 1


def encode(tokenizer: Tokenizer, prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> Rows:
    """Encode prompts as one batch of tokens.

    A token is the object's where it reaches beyond the prompt, so that none is lost where a tokenizer joins the two.

    Args:
        tokenizer: a transformers tokenizer that tells where in the text its tokens stand (a fast one).
        prompts: what to encode.

    Raises:
        ValueError: a tokenizer that does not tell, a subject that is not in its prompt, an object without tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where in a text its tokens stand: load the fast tokenizer."
        )
    rows = [_encode(tokenizer, prompt) for prompt in prompts]
    width = max(len(ids) for ids, *_ in rows)
    shape = (len(rows), width)
    input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    objects = torch.zeros(shape, dtype=torch.bool)
    subject, begin = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.long)
    for i, (ids, first, last, count) in enumerate(rows):
        pad = width - len(ids)
        input_ids[i, pad:], mask[i, pad:] = torch.tensor(ids), 1
        begin[i], subject[i] = pad + first, pad + last
        objects[i, width - count :] = True
    return Rows(*(t.to(device) for t in (input_ids, mask, subject, begin, objects)))


def _encode(tokenizer: Tokenizer, prompt: Prompt) -> tuple[list[int], int, int, int]:
    """Return token ids, the subject's first and last token, and the number of the object's tokens."""
    place = prompt.place
    if place < 0 or not prompt.subject:
        raise ValueError(f"The subject {prompt.subject!r} is not in the prompt {prompt.template!r}: write {{}} for it.")
    text = f"{prompt.text} {prompt.object}" if prompt.object else prompt.text
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = [tuple(span) for span in encoded["offset_mapping"]]
    real = [i for i, (first, last) in enumerate(spans) if last > first]  # special tokens have no place in the text
    inside = [i for i in real if spans[i][1] > place and spans[i][0] < place + len(prompt.subject)]
    if not inside:
        raise ValueError(f"The tokenizer has no token for the subject {prompt.subject!r}.")
    count = sum(spans[i][1] > len(prompt.text) for i in real)
    if prompt.object and not count:
        raise ValueError(f"The tokenizer has no token for the object {prompt.object!r} of {prompt.text!r}.")
    return list(encoded["input_ids"])[: real[-1] + 1], inside[0], inside[-1], count


def next_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """Return the logits after each of the last `keep` columns, `[B, keep, vocabulary]`, in float32."""
    return last_logits(model, input_ids, attention_mask, keep).float()


def last_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """Return the logits after each of the last `keep` columns, `[B, keep, vocabulary]`, in the model's precision."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    accepted = inspect.signature(type(model).forward).parameters
    optional = {
        **token_numbers(model, attention_mask),
        "use_cache": False,
        "logits_to_keep": keep,
    }
    logits = getattr(model(**inputs, **{n: v for n, v in optional.items() if n in accepted}), "logits", None)
    if logits is None or logits.dim() != 3:
        raise ValueError(f"{type(model).__name__} does not predict tokens: give a causal language model.")
    return logits[:, -keep:]


def object_log_probs(model: nn.Module, rows: Rows, share: bool = True) -> Tensor:
    """Return the mean log-probability of each row's object tokens, in nats, `[B]`; `share` runs rows alike else once.

    The mean, not the sum, as the authors compare objects of different lengths (Meng et al. 2022, arXiv:2202.05262).
    """
    keep = rows.keep
    # nothing is asked after the last token, and without it objects of one token leave the same row twice
    seen = torch.where(rows.attention_mask.bool(), rows.input_ids, -1)[:, :-1]
    unique, back = seen.unique(dim=0, return_inverse=True) if share else (seen, slice(None))
    expected = next_logits(model, unique.clamp(min=0), (unique >= 0).long(), keep - 1).log_softmax(-1)[back]
    chosen = expected.gather(-1, rows.input_ids[:, 1 - keep :, None])[..., 0]
    mask = rows.objects[:, 1 - keep :]
    return (chosen * mask).sum(-1) / mask.sum(-1)


def with_object(fact: Fact, object: str, prefixes: Sequence[str] = ("",)) -> list[Prompt]:
    """Put the fact's own prompt behind each prefix, followed by an object, if there is one."""
    return [Prompt(fact.relation, fact.subject, object, prefix) for prefix in prefixes]


def random_prefixes(texts: Sequence[str], count: int, words: int = 6, seed: int = 0) -> list[str]:
    """Cut short excerpts out of random texts, to stand before a prompt so that a key does not depend on one context.

    The authors let the model write them; excerpts of the texts the covariance is read from cost nothing.

    Args:
        texts: any texts.
        count: how many; the empty prefix comes first and is not counted.
        words: how long each is.
        seed: of the choice.

    Example:
        >>> random_prefixes(["one two three"], 1, words=2)[0]
        ''
    """
    generator = torch.Generator().manual_seed(seed)
    long = [split for text in texts if len(split := text.split()) >= words]
    if count and not long:
        raise ValueError(f"No text has {words} words to take a prefix from: give longer texts, or no prefixes.")
    chosen = []
    for _ in range(count):
        split = long[int(torch.randint(len(long), (), generator=generator))]
        begin = int(torch.randint(len(split) - words + 1, (), generator=generator))
        chosen.append(" ".join(split[begin : begin + words]).rstrip(".,;:!?"))
    return ["", *chosen]
