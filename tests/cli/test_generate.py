"""`lightning-peft generate`: answers on the command line and in files, from all that adapters are kept in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from talkers import PROMPTS
from tuning import python

from lightning_peft.cli import main
from lightning_peft.cli.generation_options import scales
from lightning_peft.generation import answers, load

NEW = ["--max-new-tokens", "6"]


def failure(*args: object) -> str:
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    return str(caught.value)


@pytest.mark.parametrize("name", ["edit", "plain", "stack", "base"])
def test_one_prompt_is_answered_and_nothing_else_is_printed(
    talker: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = load(talker / name)
    told = {prompt: answers(adapted, [prompt], max_new_tokens=6)[0].strip("\n") for prompt in PROMPTS}
    prompt, expected = next((prompt, answer) for prompt, answer in told.items() if answer)
    main(["generate", str(talker / name), prompt, *NEW])
    assert capsys.readouterr().out == f"{expected}\n"


def test_several_prompts_are_answered_beside_the_base(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", str(talker / "stack"), "--scale", "edit=2", *PROMPTS[1:], "--beside-base", "--chat", *NEW])
    adapted = load(talker / "stack", scale={"edit": 2.0})
    own = answers(adapted, PROMPTS[1:], chat=True, max_new_tokens=6)
    with adapted.as_base():
        base = answers(adapted, PROMPTS[1:], chat=True, max_new_tokens=6)
    blocks = zip(PROMPTS[1:], own, base, strict=True)
    expected = [f"> {prompt}\nadapted: {one.strip()}\nbase: {other.strip()}" for prompt, one, other in blocks]
    assert capsys.readouterr().out == "\n\n".join(expected) + "\n" and own != base


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_a_file_of_prompts_becomes_a_file_of_answers_in_its_order(
    talker: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["Who is he?", "It", "Q: What is it?", "What"]
    file = tmp_path / f"prompts.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"asked": prompt, "n": 1}) + "\n" for prompt in prompts))
    else:
        file.write_text("\n".join(["asked", *prompts] if kind == "csv" else prompts) + "\n")
    column = [] if kind == "txt" else ["--column", "asked"]
    output = tmp_path / "made" / "answers.jsonl"
    given = ["--input", str(file), "--output", str(output), *column, "--batch-size", "2", "--beside-base", *NEW]
    main(["generate", str(talker / "lora"), *given])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    adapted = load(talker / "lora")
    assert [row["prompt"] for row in rows] == prompts
    assert [row["answer"] for row in rows] == answers(adapted, prompts, max_new_tokens=6)
    with adapted.as_base():
        assert [row["base_answer"] for row in rows] == answers(adapted, prompts, max_new_tokens=6)
    printed = capsys.readouterr()
    assert printed.out == f"Wrote 4 answers to {output}.\n" and "2 of 4 answered" in printed.err
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]


def test_chats_of_a_file_are_answered_at_the_assistants_last_turn(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "Who"}, {"role": "assistant", "content": "It is he."}]
    chats = [turns, [*turns, {"role": "user", "content": "What"}]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    main(["generate", str(talker / "lora"), "--input", str(tmp_path / "chats.jsonl"), *NEW])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == [chats[0][:1], chats[1]]
    expected = answers(load(talker / "lora"), [chats[0][:1], chats[1]], max_new_tokens=6)
    assert [row["answer"] for row in rows] == expected


@pytest.mark.parametrize(("arguments", "count"), [(["-"], 1), (["--input", "-"], 2)])
def test_the_standard_input_is_one_prompt_or_one_a_line(
    talker: Path,
    arguments: list[str],
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is he?\nIt is\n"))
    main(["generate", str(talker / "lora"), *arguments, *NEW])
    printed = capsys.readouterr().out
    prompts = ["Who is he?\nIt is"] if count == 1 else ["Who is he?", "It is"]
    expected = answers(load(talker / "lora"), prompts, max_new_tokens=6)
    found = (
        [printed.removesuffix("\n")] if count == 1 else [json.loads(line)["answer"] for line in printed.splitlines()]
    )
    assert found == expected


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing there": (["nowhere", "What"], "nowhere does not exist."),
    "no prompt": (["lora"], "Give a prompt"),
    "prompts twice": (["lora", "What", "--input", "x.txt"], "not both"),
    "a column of nothing": (["lora", "What", "--column", "x"], "--column is of a file"),
    "a system without chat": (["lora", "What", "--system", "x"], "give --chat as well"),
    "no such file": (["lora", "--input", "nowhere.txt"], "nowhere.txt does not exist."),
    "no such column": (["lora", "--input", "two.jsonl"], "two.jsonl has no column 'prompt'"),
    "a value of another kind": (["lora", "--input", "three.jsonl"], "three.jsonl, row 2: 'prompt' holds '3'"),
    "an empty row": (["lora", "--input", "four.jsonl"], "four.jsonl, row 2 is empty."),
    "an empty file": (["lora", "--input", "five.txt"], "five.txt holds no prompt."),
    "the file itself": (["lora", "--input", "four.jsonl", "--output", "four.jsonl"], "is the file of prompts"),
    "a folder": (["lora", "What", "--output", "lora"], "is a folder: name a file"),
    "an empty prompt": (["lora", ""], "The prompt is empty."),
    "too long": (["lora", "It is true. " * 90], "The prompt has"),
    "no number": (["lora", "What", "--scale", "much"], "The scale must be a number"),
    "no such part": (["stack", "What", "--scale", "iti=2"], "There is no adapter 'iti'"),
    "no dial": (["soft", "What", "--scale", "2"], "has no dial"),
    "no base beside": (["base", "What", "--beside-base"], "is a whole model without adapters"),
    "a temperature below 0": (["lora", "What", "--temperature", "-1"], "temperature must be 0"),
    "no batch": (["lora", "What", "--batch-size", "0"], "--batch-size must be at least 1"),
    "standard input twice": (["lora", "-", "-"], "give it once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_answered_is_one_sentence(talker: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(talker)
    rows = {
        "two": [{"asked": "What", "n": 2}],
        "three": [{"prompt": "What"}, {"prompt": 3}],
        "four": [{"prompt": "What"}, {"prompt": " "}],
    }
    for name, values in rows.items():
        (talker / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (talker / "five.txt").write_text("\n")
    args, expected = WRONG[case]
    before = sorted(path.name for path in talker.iterdir())
    said = failure("generate", *args)
    assert expected in said and said.startswith("lightning-peft generate: ") and said.endswith(".")
    assert "\n" not in said and sorted(path.name for path in talker.iterdir()) == before


def test_strengths_are_of_all_or_of_some() -> None:
    assert scales([]) == 1.0 and scales(["-2"]) == -2.0 and scales(["a=1", "b=0.5"]) == {"a": 1.0, "b": 0.5}
    for wrong in (["1", "2"], ["1", "a=2"]):
        with pytest.raises(ValueError, match="give one number for all adapters, or NAME=SCALE"):
            scales(wrong)


HELP = """
import sys
from lightning_peft.cli import main
for command in ("generate", "chat"):
    try:
        main([command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
assert not {"torch", "transformers", "lightning", "peft", "numpy"} & set(sys.modules)
"""


def test_help_imports_nothing_that_is_slow() -> None:
    assert "--beside-base" in python(HELP)
