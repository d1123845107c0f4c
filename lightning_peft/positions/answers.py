"""Saying where the answers of calls begin, to the tracked models in a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_peft.positions.tracking import Positions, tracked
from lightning_peft.prompt_end import mentions_answers, prompt_end, token_labels


def note_batch(noted: list[Positions], module: nn.Module, batch: Any) -> list[Positions]:
    """Let a module's tracked models know where the answers of a batch begin, for the calls to come.

    Args:
        noted: what the last call returned; these forget their batch.
        module: a module that is or contains the tracked backbone.
        batch: a mapping with `prompt_end [B]`, or with `labels [B, T]`, or anything else.

    Raises:
        ValueError: see `lightning_peft.prompt_end`.
    """
    for positions in noted:
        positions.note_batch(None)
    # to look for them may be to walk through all modules, which a step without answers need not pay for
    noted = tracked(module) if mentions_answers(batch) else []
    if noted:
        start = prompt_end(batch)
        labels = token_labels(batch) if start is None else None
        for positions in noted:
            positions.note_batch(start, labels)
    return noted


@contextmanager
def answering_batch(module: nn.Module, batch: Any) -> Iterator[None]:
    """Say, for the calls inside, where the answers of a batch begin: by its `prompt_end`, else by its labels.

    Without either, or without a tracked model in `module`, this does nothing.
    """
    affected = tracked(module) if mentions_answers(batch) else []
    start = prompt_end(batch) if affected else None
    with ExitStack() as stack:
        for positions in affected:
            if start is not None:
                stack.enter_context(positions.giving(start=start, mask=None))
            else:  # behind what the call itself says, as in a batch that a callback notes
                stack.enter_context(positions.giving(labels=token_labels(batch)))
        yield


@contextmanager
def calling(module: nn.Module, **tokens: Any) -> Iterator[None]:
    """Note the inputs of a call that bypasses the tracked model's own `forward`, such as one of its trunk alone.

    Args:
        module: a module that is or contains the tracked backbone; without one this does nothing.
        **tokens: `input_ids [B, T]`, `attention_mask`, `position_ids`, as `forward` would get them.
    """
    affected = tracked(module)
    with ExitStack() as stack:
        for positions in affected:
            stack.enter_context(positions.giving(plain=True))  # what is read inside a model is no score of an answer
            positions.before_forward(positions.model, (), tokens)
        try:
            yield
        finally:
            for positions in affected:
                positions.running.forget()


@contextmanager
def answering(module: nn.Module, start: Tensor | None = None, mask: Tensor | None = None) -> Iterator[None]:
    """Say, for the calls inside, where the answers begin. Without a tracked model in `module` it does nothing.

    Only the thread (or asyncio task) that enters it is concerned.

    Args:
        module: a module that is or contains the tracked backbone.
        start: `[B]` position ids of the last prompt tokens; `[B, T]`, for calls of exactly that shape, where a row is
            packed with several texts: for each token that of its text. Of an encoder-decoder's encoder; all tokens of
            its decoder are the answer.
        mask: bool `[B, T]`, the edited tokens themselves, for calls of exactly that shape; of an encoder-decoder, of
            its encoder's tokens or its decoder's, whichever have it.
    """
    if (start is None) == (mask is None):
        raise ValueError("Give either the start or the mask of the answers, not both and not neither.")
    with ExitStack() as stack:
        for positions in tracked(module):
            stack.enter_context(positions.giving(start=start, mask=mask))
        yield


@contextmanager
def plain_text(module: nn.Module) -> Iterator[None]:
    """Say that calls inside are of plain text, unless their labels or anything else says where an answer begins.

    Every position is then one of an answer, as without this, and no `PlainTextWarning` is given. Labels of the batch
    that a callback has noted are those of another text.

    Args:
        module: a module that is or contains the tracked backbone; without one this does nothing.
    """
    with ExitStack() as stack:
        for positions in tracked(module):
            stack.enter_context(positions.giving(plain=True, labels=None))
        yield
