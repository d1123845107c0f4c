"""An answer as it is written, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_peft.generation.adapted import AdaptedModel
from lightning_peft.generation.answers import padded_left
from lightning_peft.generation.decoding import Decoding
from lightning_peft.generation.prompts import Prompt, encode, room_behind, turn_ends
from lightning_peft.positions import PositionsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


def stream(
    adapted: AdaptedModel, prompt: Prompt, *, chat: bool = False, system: str | None = None, **decoding: Any
) -> Generator[str, None, None]:
    """Yield an answer in pieces as its tokens are written; put together they are the answer.

    The model writes in a thread of its own. It stops at the next token when the iterator is closed, as it is when one
    breaks out of the loop over it, or on Ctrl-C.

    Args:
        adapted: the model.
        prompt: a text, or a chat as a list of messages.
        chat: put a text as a user's turn in the model's chat template.
        system: a message before the chat.
        **decoding: as of `Decoding`: `max_new_tokens`, `temperature`, `top_p`, `seed`.

    Raises:
        PromptError: at once, for a prompt that cannot be answered; see `encode`.

    Example:
        >>> from lightning_peft.generation import load, stream
        >>> for piece in stream(load("polite"), "Where is the station?", chat=True):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    ids = encode(adapted, prompt, system, chat)
    return stream_tokens(adapted, ids, Decoding(**decoding), ends=turn_ends(adapted, [prompt], chat))


def stream_tokens(
    adapted: AdaptedModel, ids: list[int], decoding: Decoding, turn: int = 0, ends: Sequence[int] = ()
) -> Generator[str, None, None]:
    """Yield what the model writes behind a prompt of tokens, as `stream` does.

    Args:
        adapted: the model; as its adapters are now.
        ids: the prompt.
        decoding: how.
        turn: added to the seed.
        ends: tokens that end a text beside the model's own.
    """
    room = room_behind(adapted, len(ids))
    limit = decoding.max_new_tokens if room is None else min(room, decoding.max_new_tokens)
    pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
    stopped = threading.Event()

    def write() -> None:
        from transformers import StoppingCriteriaList

        batch, mask = padded_left([ids], adapted)
        written = _Written(adapted.tokenizer, pieces)
        try:
            with decoding.applied(adapted, limit, turn, ends) as all_ends:
                written.ends = all_ends
                adapted.model.generate(
                    input_ids=batch,
                    attention_mask=mask,
                    streamer=cast("BaseStreamer", written),
                    stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
                )
        except BaseException as error:
            pieces.put(error)
        else:
            pieces.put(None)

    thread = threading.Thread(target=write, name="lightning-peft-stream", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, PositionsError):
                raise ValueError(str(piece)) from piece
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stopped.set()
        thread.join()


class _Stopped:
    """Ends a text when somebody no longer wants it; a stopping criterion of transformers."""

    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)


class _Written:
    """Puts texts of tokens into a queue as soon as they are whole characters; a streamer of transformers.

    That of transformers keeps each word until the next begins. Here a token's text is what the tokens of the last
    piece and this one decode to beyond what the last alone does, since a space may belong to either.

    Args:
        tokenizer: the model's.
        pieces: takes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pieces: SimpleQueue[Any]) -> None:
        self.tokenizer, self.pieces = tokenizer, pieces
        self.ends: list[int] = []
        self._tokens: list[int] = []
        self._last, self._given = 0, 0  # where the last piece begins, and where it ends
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then each new token."""
        if self._prompt:
            self._prompt = False
            return
        self._tokens += [token for token in value.flatten().tolist() if token not in self.ends]
        self._give(whole=False)

    def end(self) -> None:
        """Give what is left, whole or not."""
        self._give(whole=True)

    def _give(self, whole: bool) -> None:
        before = self._decoded(self._tokens[self._last : self._given])
        text = self._decoded(self._tokens[self._last :])
        if len(text) > len(before) and (whole or not text.endswith("\ufffd")):
            self.pieces.put(text[len(before) :])
            self._last, self._given = self._given, len(self._tokens)

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
