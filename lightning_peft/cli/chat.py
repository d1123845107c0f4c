"""`lightning-peft chat`: a conversation with an adapted model, beside its base if one likes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, TextIO

from lightning_peft.cli.arguments import one_sentence, parser
from lightning_peft.cli.generation_options import (
    add_decoding_options,
    add_model_options,
    decoding_settings,
    load_model,
    number,
)

if TYPE_CHECKING:
    from lightning_peft.generation.conversation import Conversation

COMMANDS = {
    "/scale": "/scale 2 [NAME]: the strength of all adapters, or of one; without a number, what it is",
    "/off": "/off: the base answers, until /on",
    "/on": "/on: the adapters act again, each at the strength it had",
    "/base": "/base: the base's answer to the last turn, beside the adapted one",
    "/system": "/system TEXT: begin anew with a message that says how to behave; without a text, without one",
    "/reset": "/reset: begin anew",
    "/help": "/help: these commands",
    "/quit": "/quit: end (so does the end of the input); Ctrl-C stops an answer",
}


def main(args: list[str]) -> None:
    """Read turns from the standard input, a line each, and print the answers as they are written."""
    options = parser(
        "chat",
        "Talk to an adapted chat model, tuned or edited, one adapter or a stack. While talking: "
        f"{'; '.join(COMMANDS.values())}.".replace("%", "%%"),
    )
    add_model_options(options)
    options.add_argument("--system", help="a message before the first turn, which says how to behave")
    options.add_argument("--beside-base", action="store_true", help="let the base answer each turn too")
    add_decoding_options(options)
    parsed = options.parse_args(args[1:])
    with one_sentence("chat"):
        settings = decoding_settings(parsed)
        from lightning_peft.generation.conversation import Conversation

        talk = Conversation(load_model(parsed, chat=True), parsed.system, **settings)
        if parsed.beside_base:
            with talk.adapted.as_base():  # which says at once where there is none
                pass
        try:
            _Chat(talk, parsed.beside_base).run()
        except KeyboardInterrupt:  # while another program writes the turns
            raise SystemExit(130) from None


class _Chat:
    """The loop over turns: answers go to the standard output, all else to the error stream.

    Args:
        talk: the conversation.
        beside: whether the base answers each turn too.
    """

    def __init__(self, talk: Conversation, beside: bool) -> None:
        self.talk, self.beside = talk, beside

    def run(self) -> None:
        """Take turns until the input ends."""
        _note(f"{self.talk.adapted.name}: {self._strengths()}; /help lists commands.")
        for line in _lines(sys.stdin):
            turn = line.strip()
            if not turn:
                continue
            if turn.split()[0] == "/quit":
                return
            try:
                if turn.startswith("/") and not turn.startswith("//"):
                    self._command(turn)
                else:
                    self._ask(turn.removeprefix("/") if turn.startswith("//") else turn)
            except ValueError as error:
                _note(str(error))

    def _ask(self, turn: str) -> None:
        done = _show(self.talk.ask(turn), "adapted: " if self.beside else "")
        if done and self.beside:
            _show(self.talk.base(), "base: ")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/scale": self._scale,
            "/off": lambda _: self._enable(False),
            "/on": lambda _: self._enable(True),
            "/base": lambda _: self._base(),
            "/system": lambda text: self._begin(text.strip() or None),
            "/reset": lambda _: self._begin(self.talk.system),
            "/help": lambda _: _note("\n".join(COMMANDS.values())),
        }
        if name not in commands:
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4) or ["/help"]
            raise ValueError(
                f"There is no command {name}; the nearest is {near[0]}, and // begins a turn with a slash."
            )
        commands[name](rest.strip())

    def _scale(self, rest: str) -> None:
        if rest:
            value, *part = rest.split(maxsplit=1)
            self.talk.adapted.scale(number(value), *part)
        _note(self._strengths())

    def _enable(self, enabled: bool) -> None:
        self.talk.adapted.enable(enabled)
        _note(self._strengths())

    def _base(self) -> None:
        _show(self.talk.base(), "base: ")

    def _begin(self, system: str | None) -> None:
        self.talk.begin_anew(system)
        _note("Begun anew." if system is None else f"Begun anew, as: {system}")

    def _strengths(self) -> str:
        strengths = self.talk.adapted.strengths()
        return ", ".join(f"{name} at {scale:g}" for name, scale in strengths.items()) or "no adapter"


def _show(pieces: Generator[str, None, None], before: str) -> bool:
    """Print an answer as it is written; return whether it was not stopped by Ctrl-C."""
    begun = False
    with closing(pieces):
        try:
            for piece in pieces:
                if not begun and not piece.strip():
                    continue
                print(piece if begun else before + piece.lstrip(), end="", flush=True)
                begun = True
        except KeyboardInterrupt:
            print(flush=True)
            _note("(stopped)")
            return False
    print("" if begun else f"{before}(nothing)", flush=True)
    return True


def _lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines of the input: of a terminal with a prompt, where Ctrl-C begins the line anew."""
    if not stream.isatty():
        yield from stream
        return
    import readline  # noqa: F401 - gives `input` a history and keys that edit the line

    while True:
        try:
            yield input("\n> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("\n(/quit ends the chat)")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
