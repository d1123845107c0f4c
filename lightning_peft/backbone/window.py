"""The number of tokens that a model can read at once, found by structure, and texts that have more."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_peft.backbone.embeddings import input_embeddings

# as configurations call the number of positions
_LIMITS = ("max_position_embeddings", "n_positions", "max_encoder_position_embeddings", "max_seq_len")
_SPARE = 8  # rows at most that a table of positions has beyond the window: OPT and BART have 2


class ContextWindowError(ValueError):
    """Texts are longer than a model can read."""


class ContextWindowWarning(UserWarning):
    """Texts are longer than a model was trained for, or what they have beyond the window is left out."""


@dataclass(frozen=True)
class Window:
    """The number of tokens that a model can read.

    Args:
        tokens: their number.
        fixed: whether there is nothing beyond, as with a table of positions; a rotary model computes something for any
            number of tokens, but was trained for these.
    """

    tokens: int
    fixed: bool


_known: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Window | None]] = WeakKeyDictionary()
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def context_window(backbone: nn.Module) -> Window | None:
    """Return the context window of a model of transformers, in tokens; of an encoder-decoder that of its encoder.

    A table with a row for each position, learnt or not, ends where its rows do (fewer, where the first are padding's).
    Without a table, but with rotary embeddings, the configuration says how many positions the model was trained for; a
    scaling of these counts. A sliding window is none: tokens beyond it are read, if not by every layer. The virtual
    tokens of a prompt on the model take their places.

    Returns:
        None where there is no limit (relative positions, ALiBi, states), or where it is not known.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> context_window(GPT2LMHeadModel(GPT2Config(n_positions=96, n_embd=8, n_layer=1, n_head=1, vocab_size=40)))
        Window(tokens=96, fixed=True)
    """
    config = _text_config(backbone)
    if (limit := _limit(config)) is None:
        return None
    signature = limit, sum(len(child._modules) for child in backbone.children())  # adapters come as children's children
    if backbone not in _known or _known[backbone][0] != signature:
        window = _window(backbone, config, limit)
        prompt = sum(getattr(module, "virtual_tokens", 0) for module in backbone.modules())
        _known[backbone] = signature, window and replace(window, tokens=window.tokens - prompt)
    return _known[backbone][1]


def exceeding(backbone: nn.Module, lengths: Iterable[int], what: str) -> str | None:
    """Say in half a sentence how many texts are longer than the model's window; None where none is.

    Args:
        backbone: as `context_window`.
        lengths: of the texts, in tokens, with those that will be written after them.
        what: the texts are, in the plural.
    """
    window = context_window(backbone)
    if window is None:
        return None
    lengths = list(lengths)
    longer = [length for length in lengths if length > window.tokens]
    if not longer:
        return None
    reads = f"{type(backbone).__name__} {'can read' if window.fixed else 'was trained for'}"
    counted = f"{len(longer):,} of {len(lengths):,} {what}"
    return f"{counted} are longer than the {window.tokens:,} tokens that {reads}; the longest has {max(longer):,}"


def check_lengths(
    backbone: nn.Module, lengths: Iterable[int], what: str, cut: bool = False, whole: bool = False
) -> None:
    """Raise where texts are longer than a model can read; warn, once, where it was not trained for so many tokens.

    Args:
        backbone, lengths, what: as `exceeding`.
        cut: whether the texts are cut at the window, so that a warning will do.
        whole: whether these are all texts of their kind; a part is warned of only where nothing was said before.

    Raises:
        ContextWindowError: the model has no positions for so many tokens.
    """
    if (sentence := exceeding(backbone, lengths, what)) is None:
        return
    window = context_window(backbone)
    if window is not None and window.fixed and not cut:
        raise ContextWindowError(
            f"{sentence}: shorten them, or have fewer demonstrations before them (few_shot, or fit_window, which "
            "leaves out as many as need be)."
        )
    warned = _warned.setdefault(backbone, set())
    if what not in warned and (whole or not warned):
        warned.add(what)
        beyond = "what is beyond is left out" if cut else "what it computes beyond is not to be relied on"
        warnings.warn(f"{sentence}: {beyond}.", ContextWindowWarning, stacklevel=3)


def check_batch(backbone: nn.Module, batch: Mapping[str, Any], what: str = "texts of a batch") -> None:
    """Check the rows of a batch, as `check_lengths`; costs next to nothing where the batch is narrow enough."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    window = context_window(backbone)
    if window is not None and ids.shape[1] > window.tokens:
        check_lengths(backbone, lengths_of(batch), what)


def lengths_of(item: Any) -> list[int]:
    """Return the lengths of an example's or a batch's texts, with the tokens to be written after them but the last.

    Args:
        item: a mapping with `input_ids` (a list, `[T]` or `[B, T]`), perhaps `attention_mask`, and `max_new_tokens`.
    """
    if not isinstance(item, Mapping) or "input_ids" not in item:
        return []
    ids, mask = item["input_ids"], item.get("attention_mask")
    written = max(0, int(item.get("max_new_tokens", 1)) - 1)  # the last one is not read again
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        return [len(ids) + written]
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return [int(length) + written for length in mask.sum(-1).tolist()]
    return [ids.shape[1] + written] * len(ids)


def loaded(loaders: Any) -> Iterator[Any]:
    """Yield the examples or batches of data loaders over lists, which are in memory; none of other data.

    Args:
        loaders: a DataLoader, or lists or mappings of them, or what Lightning combines them to.
    """
    loaders = getattr(loaders, "iterables", loaders)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from loaded(loader)
    elif isinstance(items := getattr(loaders, "dataset", None), list | tuple):
        yield from items


def check_loaded(backbone: nn.Module, loaders: Any, what: str) -> None:
    """Check all texts of data loaders before the first batch, as `check_lengths`; see `loaded`."""
    items = [item for item in loaded(loaders) if isinstance(item, Mapping)]
    texts = [item for item in items if "document" not in item]
    documents = [item for item in items if "document" in item]
    check_lengths(backbone, (n for item in texts for n in lengths_of(item)), what, whole=True)
    neutral = (n for item in documents for n in lengths_of(item))
    check_lengths(backbone, neutral, "neutral texts", cut=True, whole=True)


def first_position(backbone: nn.Module) -> int:
    """Return the position id of a text's first token: behind padding's, where a table of positions has a row for it."""
    config = _text_config(backbone)
    paddings = [table.padding_idx for table in _tables(backbone, backbone, _limit(config))]
    return next((padding + 1 for padding in paddings if padding is not None), 0)


def _window(backbone: nn.Module, config: Any, limit: int) -> Window | None:
    model: Any = backbone
    part: nn.Module = model
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        part = model.get_encoder()
    tables = _tables(part, backbone, limit)
    if tables or _has_rows(part, limit):
        sizes = [table.num_embeddings - table.padding_idx - 1 for table in tables if table.padding_idx is not None]
        return Window(min([limit, *sizes]), fixed=True)
    if not _rotates(part):  # MPT makes its slopes for so many tokens and no more
        return Window(limit, fixed=True) if getattr(config, "max_seq_len", None) == limit else None
    if getattr(config, "alibi", False):
        return None
    return Window(_scaled(limit, getattr(config, "rope_parameters", None)), fixed=False)


def _tables(part: nn.Module, backbone: nn.Module, limit: int | None) -> list[nn.Embedding]:
    """Return the tables of positions: embeddings other than of tokens, with about as many rows as positions."""
    if limit is None or not getattr(_text_config(backbone), "position_biased_input", True):  # else relative alone
        return []
    tokens = input_embeddings(backbone)
    embeddings = [module for module in part.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    return [table for table in embeddings if limit <= table.num_embeddings <= limit + _SPARE]


def _has_rows(part: nn.Module, limit: int) -> bool:
    """Return whether a module holds a computed table of positions, as GPT-J and CTRL do."""
    held = (value for module in part.modules() for value in (*module.buffers(recurse=False), *vars(module).values()))
    return any(isinstance(v, Tensor) and v.dim() == 2 and v.is_floating_point() and len(v) == limit for v in held)


def _rotates(part: nn.Module) -> bool:
    """Return whether a model rotates by frequencies, which are a buffer, or one for each kind of layer."""
    names = (name for module in part.modules() for name in (*vars(module), *module._buffers))
    return any(name.endswith("inv_freq") for name in names)


def _scaled(limit: int, rope: Any) -> int:
    """Return the positions of a rotary model whose rotation is scaled for more than it was first trained for."""
    parts = rope.values() if isinstance(rope, Mapping) and "rope_type" not in rope else [rope]
    sizes = [limit]
    for part in parts:
        if isinstance(part, Mapping) and part.get("factor"):
            before = part.get("original_max_position_embeddings")
            if before is None and part.get("rope_type") in ("linear", "dynamic", "yarn"):
                before = limit
            sizes.append(int(part["factor"] * (before or 0)))
    return max(sizes)


def _text_config(backbone: nn.Module) -> Any:
    config: Any = getattr(backbone, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _limit(config: Any) -> int | None:
    values = (getattr(config, name, None) for name in _LIMITS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
