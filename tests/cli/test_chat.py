"""`lightning-peft chat`: turns from the standard input, answers as they are written, commands between."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.cli import chat, main
from lightning_peft.generation import Conversation, load


@pytest.fixture
def said(talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a chat prints, line by line, and what it notes."""

    def run(*lines: str, adapter: str = "stack", options: tuple[str, ...] = (), new: int = 6) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(["chat", str(talker / adapter), "--max-new-tokens", str(new), *options])
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err

    return run


def expected(talk: Conversation, turn: str) -> str:
    return "".join(talk.ask(turn)).lstrip() or "(nothing)"


def test_turns_are_answered_from_the_whole_conversation(talker: Path, said: Any) -> None:
    printed, noted = said("Who is he?", "", "What")
    talk = Conversation(load(talker / "stack"), max_new_tokens=6)
    assert printed == [expected(talk, "Who is he?"), expected(talk, "What")]
    assert noted == f"{talker / 'base'}: lora at 1, edit at 1; /help lists commands.\n"


def test_strength_is_turned_and_the_base_answers_the_same_turn(talker: Path, said: Any) -> None:
    lines = ["/scale 0.5 edit", "Who is he?", "/base", "/off", "What", "/on", "/scale 2", "It"]
    printed, noted = said(*lines)
    talk = Conversation(load(talker / "stack", scale={"edit": 0.5}), max_new_tokens=6)
    first = expected(talk, "Who is he?")
    base = "".join(talk.base()).lstrip() or "(nothing)"
    talk.adapted.enable(False)
    second = expected(talk, "What")
    talk.adapted.enable()
    talk.adapted.scale(2.0)
    assert printed == [first, f"base: {base}", second, expected(talk, "It")] and first != base
    assert noted.splitlines()[1:] == [
        "lora at 1, edit at 0.5",
        "lora at 0, edit at 0",
        "lora at 1, edit at 0.5",
        "lora at 2, edit at 2",
    ]


def test_both_answer_each_turn_where_that_is_asked(said: Any) -> None:
    printed, _ = said("Who is he?", "What", options=("--beside-base",))
    assert [line.partition(": ")[0] for line in printed] == ["adapted", "base"] * 2


def test_a_conversation_begins_anew_with_another_system_message(talker: Path, said: Any) -> None:
    printed, noted = said("Who", "/system It is true.", "What", "/reset", "What", "/system", "What")
    talk = Conversation(load(talker / "stack"), "It is true.", max_new_tokens=6)
    with_system = expected(talk, "What")
    talk.begin_anew()
    assert printed[1:] == [with_system, with_system, expected(talk, "What")] and with_system != printed[-1]
    assert noted.splitlines()[1:] == ["Begun anew, as: It is true."] * 2 + ["Begun anew."]


def test_what_cannot_be_done_is_said_and_the_chat_goes_on(said: Any) -> None:
    lines = [
        "/base",
        "/scael 2",
        "/scale much",
        "/scale 1 iti",
        "/system   ",
        "It is true. " * 90,
        "/quit now",
        "/quit",
    ]
    printed, noted = said(*lines, "Who")
    assert printed == [], "nothing is answered after /quit"
    sentences = noted.splitlines()[1:]
    beginnings = [
        "Nothing was asked yet.",
        "There is no command /scael; the nearest is /scale",
        "The scale must be a number, 1 as saved and 0 off, got 'much'.",
        "There is no adapter 'iti'",
        "Begun anew.",
        "The message has",
    ]
    for sentence, beginning in zip(sentences, beginnings, strict=True):
        assert sentence.startswith(beginning) and sentence.endswith(".")


def test_help_is_in_the_chat_and_a_slash_can_be_said(talker: Path, said: Any) -> None:
    printed, noted = said("/help", "//Who")
    assert all(line in noted for line in chat.COMMANDS.values())
    talk = Conversation(load(talker / "stack"), max_new_tokens=6)
    assert printed == [expected(talk, "/Who")]


def test_a_whole_model_is_talked_to_without_a_dial(said: Any) -> None:
    printed, noted = said("Who", "/scale 2", "/off", "/base", "/scale", adapter="base")
    assert len(printed) == 1 and noted.count("is a whole model without adapters") == 3
    assert noted.splitlines()[-1] == "no adapter"


def test_a_method_without_a_dial_is_only_on_or_off(said: Any) -> None:
    _, noted = said("/scale 2", "/scale 0", "/scale 1", adapter="soft")
    assert "has no dial, it is on (1) or off (0)." in noted
    assert noted.splitlines()[-2:] == ["default at 0", "default at 1"]


def test_control_c_stops_an_answer_and_not_the_chat(talker: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    write = sys.stdout.write

    class Impatient(io.StringIO):
        def write(self, text: str) -> int:
            if len(stopped) < 3 and text.strip():
                stopped.append(text)
                if len(stopped) == 3:
                    signal.raise_signal(signal.SIGINT)
            write(text)
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Impatient())
    _, noted = said("Who is he?", "What", new=60)
    assert noted.endswith("(stopped)\n") and noted.count("(stopped)") == 1
    out: Any = sys.stdout
    first, second = out.getvalue().splitlines()
    talk = Conversation(load(talker / "stack"), max_new_tokens=60)
    whole = "".join(talk.ask("Who is he?")).lstrip()
    assert whole.startswith(first) and len(first) < len(whole)
    assert second, "what was written so far is a part of the conversation"


def test_a_base_without_a_chat_template_is_refused_before_it_is_loaded(
    talker: Path, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(SystemExit, match=r"^lightning-peft chat: .* has no chat template, being no chat model"):
        main(["chat", str(talker / "lora"), "--base", str(tiny_folder("llama"))])
