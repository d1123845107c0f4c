"""Cross-entropy and KL of a causal language model and one of its adapters on texts, by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_peft.backbone.embeddings import input_embeddings
from lightning_peft.backbone.find_backbone import is_lightning_module
from lightning_peft.effects.slices import TextSlice
from lightning_peft.effects.switches import adapted
from lightning_peft.effects.text_sums import Off, effects_of
from lightning_peft.effects.token_batches import padding_of, token_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = TextSlice | Iterable[str] | Iterable[Sequence[int]] | Iterable[Tensor]
_CE, _KL = 2, 3  # columns of `batch_effects`


@dataclass(frozen=True)
class PerToken:
    """A value per token of some texts, in nats.

    Args:
        mean: over all predicted tokens of all texts.
        by_text: of each text, over its own.
        tokens: how many were predicted in each text: all but the first and those beyond the model's window.

    Example:
        >>> PerToken.from_sums([20.0, 6.0], [10, 2])
        PerToken(mean=2.1666666666666665, by_text=(2.0, 3.0), tokens=(10, 2))
        >>> float(PerToken.from_sums([20.0, 6.0], [10, 2])) > 2
        True
    """

    mean: float
    by_text: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def from_sums(cls, sums: Sequence[float], tokens: Sequence[int]) -> PerToken:
        """Return the value of texts whose sums over tokens are given."""
        by_text = tuple(total / count for total, count in zip(sums, tokens, strict=True))
        return cls(sum(sums) / sum(tokens), by_text, tuple(tokens))

    def __float__(self) -> float:
        return self.mean


def kl(
    model: nn.Module,
    adapter: str | Path | None,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = 8,
) -> PerToken:
    """Return KL(base ‖ adapted) of a causal language model's next-token distributions, in nats per token.

    The base is the model without this adapter, whatever else is on it. Every position of a text is one of an answer to
    edits limited to answers. Afterwards the model is as it was, also on an exception; it is run in evaluation mode.

    Args:
        model: a causal language model of transformers, or one of your own whose call gives `logits [B, T, vocabulary]`.
        adapter: the name of an adapter on the model, which is switched on for this if it is off; a folder that
            `load_adapter` reads; or None for all adapters that are on.
        texts: strings, rows of tokens, or a slice of neutral text (`text_slice`). What exceeds the model's context
            window is left out, with a warning.
        tokenizer: the model's, where the texts are strings.
        batch_size: texts of a call.

    Raises:
        ValueError: no adapter is on, adapters are merged into the weights, the texts are none, hold a token that the
            model does not have or have less than two, strings come without a tokenizer, or the model is an
            encoder-decoder.
        AdapterError: the folder cannot be read, or is for another base model.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_peft import save_adapter
        >>> from lightning_peft.editing import head_offsets_config, head_sites
        >>> from lightning_peft.stack.stack import stack_of
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> stack = stack_of(model)
        >>> part = stack.add(head_offsets_config(head_sites(model), [(0, 1)]), "edit", computed=True)
        >>> for tensor in stack.tensors(part).values():
        ...     _ = tensor.fill_(1.0)
        >>> texts = [[3, 4, 5, 6], [7, 8, 9]]
        >>> on_model = kl(model, "edit", texts)
        >>> on_model.mean > 0, on_model.tokens
        (True, (3, 2))
        >>> folder = save_adapter(model, tempfile.mkdtemp())
        >>> stack.remove("edit")
        >>> kl(model, folder, texts) == on_model
        True
    """
    _check_model(model)
    with adapted(model, adapter) as off:
        return _measured(model, texts, tokenizer, off, _KL, batch_size)


def cross_entropy(
    model: nn.Module,
    adapter: str | Path | None,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = 8,
) -> PerToken:
    """Return the cross-entropy of a causal language model with an adapter, in nats per token.

    Args:
        model, adapter, texts, tokenizer, batch_size: as of `kl`; with None the model is measured as it is, and may have
            no adapter.

    Raises:
        ValueError, AdapterError: as `kl`.

    Example:
        >>> import math, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> _ = torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely as any other
        >>> math.isclose(float(cross_entropy(model, None, [[3, 4, 5, 6], [7, 8]])), math.log(40), rel_tol=1e-6)
        True
    """
    _check_model(model)
    with nullcontext() if adapter is None else adapted(model, adapter):
        return _measured(model, texts, tokenizer, None, _CE, batch_size)


def _check_model(model: nn.Module) -> None:
    if is_lightning_module(model):
        raise ValueError(f"{type(model).__name__} is a LightningModule: give the language model in it.")


def _measured(
    model: nn.Module,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase | None,
    off: Off | None,
    column: int,
    batch_size: int,
) -> PerToken:
    rows = _rows(model, texts, tokenizer)
    padding = 0 if tokenizer is None else padding_of(tokenizer)
    values = effects_of(model, token_batches(rows, padding, batch_size), off)
    return PerToken.from_sums(values[:, column].tolist(), [int(count) for count in values[:, 0]])


def _rows(model: nn.Module, texts: Texts, tokenizer: PreTrainedTokenizerBase | None) -> list[Sequence[int]]:
    """Return the tokens of each text, after checking that they can be measured."""
    given = list(texts.documents if isinstance(texts, TextSlice) else texts)
    if not given or isinstance(texts, str) or any(not isinstance(text, str | Sequence | Tensor) for text in given):
        raise ValueError(f"Texts are a list of strings, or of lists of tokens, one at least; got {str(texts)[:60]!r}.")
    rows: list[Sequence[int]] = []
    for text in given:
        if not isinstance(text, str):
            rows.append([int(token) for token in text])
        elif tokenizer is None:
            raise ValueError("The texts are strings: give the model's tokenizer as well, or lists of tokens.")
        else:
            rows.append(tokenizer(text)["input_ids"])
    _check_rows(model, rows)
    return rows


def _check_rows(model: nn.Module, rows: Sequence[Sequence[int]]) -> None:
    known = getattr(input_embeddings(model), "num_embeddings", None)
    for number, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"Text {number} has fewer than 2 tokens, and nothing predicts the first: leave it out.")
        if known is not None and not 0 <= min(row) <= max(row) < known:
            token = next(token for token in row if not 0 <= token < known)
            raise ValueError(f"Text {number} has token {token}, but the model has {known}: is it another's tokenizer?")
