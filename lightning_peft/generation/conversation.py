"""A conversation of many turns with an adapted chat model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

from lightning_peft.generation.adapted import AdaptedModel
from lightning_peft.generation.decoding import Decoding
from lightning_peft.generation.prompts import PromptError, encode, turn_ends
from lightning_peft.generation.stream import stream_tokens


class Conversation:
    """What was said so far, in the model's chat template, and the next answer.

    The adapters' strength may change between turns. Each answer is computed from the whole conversation, in which
    earlier answers are part of the prompt: an edit of answers acts on the one that is being written.

    Args:
        adapted: the model.
        system: a message before the first turn, which tells the model how to behave.
        **decoding: as of `Decoding`: `max_new_tokens`, `temperature`, `top_p`, `seed`.

    Raises:
        PromptError: the model has no chat template, or one that takes no system message.

    Example:
        >>> from lightning_peft.generation import Conversation, load
        >>> talk = Conversation(load("polite"))  # doctest: +SKIP
        >>> print("".join(talk.ask("Where is the station?")))  # doctest: +SKIP
        >>> talk.adapted.scale(0.5)  # doctest: +SKIP
        >>> print("".join(talk.ask("And how far is it?")))  # doctest: +SKIP
    """

    def __init__(self, adapted: AdaptedModel, system: str | None = None, **decoding: Any) -> None:
        self.adapted, self.decoding = adapted, Decoding(**decoding)
        self.messages: list[dict[str, str]] = []
        self._asked: list[dict[str, str]] = []  # up to the user's last turn, whether or not it got an answer
        self.system: str | None = None
        self.begin_anew(system)

    def begin_anew(self, system: str | None = None) -> None:
        """Forget all turns, and set the system message, or leave it out.

        Raises:
            PromptError: the model takes no such message, or has no chat template; nothing is forgotten then.
        """
        if system is not None and not system.strip():
            raise PromptError("The system message is empty.")
        encode(self.adapted, "Hello", system, chat=True, where="The system message")
        self._ends = turn_ends(self.adapted, [], chat=True)
        self.system, self.messages, self._asked = system, [], []

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a user's turn in pieces, and keep both; of an answer that is cut off, what was written.

        A turn to which nothing is written is not kept.

        Raises:
            PromptError: at once: the turn is empty, or the conversation has grown beyond the model's window.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(asked)
        self._asked = asked
        return self._kept(asked, self._stream(ids, turn=len(self.messages)))

    def base(self) -> Generator[str, None, None]:
        """Yield the base's answer to the user's last turn, which is not kept.

        Raises:
            ValueError: at once: nothing was asked yet, or there is no base beside the model.
        """
        if not self._asked:
            raise ValueError("Nothing was asked yet.")
        asked = self._asked
        ids = self._encode(asked)
        with self.adapted.as_base():  # which says at once where there is none
            pass
        return self._of_base(ids, turn=len(asked) - 1)

    def _of_base(self, ids: list[int], turn: int) -> Generator[str, None, None]:
        with self.adapted.as_base():
            yield from self._stream(ids, turn)

    def _stream(self, ids: list[int], turn: int) -> Generator[str, None, None]:
        return stream_tokens(self.adapted, ids, self.decoding, turn, self._ends)

    def _kept(self, asked: list[dict[str, str]], pieces: Generator[str, None, None]) -> Generator[str, None, None]:
        written = ""
        try:
            with closing(pieces):
                for piece in pieces:
                    written += piece
                    yield piece
        finally:
            if written.strip():
                self.messages = [*asked, {"role": "assistant", "content": written}]

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        return encode(self.adapted, messages, self.system, where="The conversation" if messages[1:] else "The message")
