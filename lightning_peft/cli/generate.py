"""`lightning-peft generate`: an adapted model's answers to prompts, of the command line, a file or standard input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.cli.arguments import one_sentence, parser
from lightning_peft.cli.generation_options import (
    add_decoding_options,
    add_model_options,
    decoding_settings,
    load_model,
)

if TYPE_CHECKING:
    from lightning_peft.generation.prompt_file import FilePrompt


def main(args: list[str]) -> None:
    """Answer prompts, and print the answers or write them to a file."""
    options = parser(
        "generate",
        "Let an adapted language model answer prompts: tuned or edited, one adapter or a stack of them, from a folder "
        "or a checkpoint.",
    )
    add_model_options(options)
    options.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="texts to answer; - is the whole of the standard input"
    )
    options.add_argument("--chat", action="store_true", help="put each as a user's turn in the model's chat template")
    options.add_argument("--system", help="a message before each chat, which says how to behave")
    options.add_argument("--beside-base", action="store_true", help="let the base answer too")
    options.add_argument(
        "--input", help="a file of prompts: .jsonl, .csv, .tsv, .json, .parquet, or .txt and - with one a line"
    )
    options.add_argument("--column", help="of --input; default: prompt, or messages, or the only one")
    options.add_argument("--output", help="a .jsonl file to write; default: print")
    options.add_argument("--batch-size", type=int, default=8, help="prompts that are answered together")
    add_decoding_options(options)
    parsed = options.parse_intermixed_args(args[1:])
    with one_sentence("generate"):
        _check(parsed)
        from lightning_peft.generation.answers import answer_each
        from lightning_peft.generation.decoding import Decoding
        from lightning_peft.generation.prompt_file import FilePrompt

        decoding = Decoding(**decoding_settings(parsed))
        if parsed.input is None:
            prompts = [FilePrompt(text, where) for text, where in _texts(parsed.prompt)]
        else:
            prompts = _from_file(parsed)
        adapted = load_model(parsed, parsed.chat)
        given = answer_each(
            adapted,
            [prompt for prompt, _ in prompts],
            decoding,
            chat=parsed.chat,
            system=parsed.system,
            batch_size=parsed.batch_size,
            beside_base=parsed.beside_base,
            wheres=[where for _, where in prompts],
        )
        answers = []
        for answer in given:
            answers.append(answer)
            if len(prompts) > parsed.batch_size and (len(answers) % parsed.batch_size == 0):
                print(f"{len(answers)} of {len(prompts)} answered", file=sys.stderr, flush=True)
        _write(parsed, prompts, [(answer.text, answer.base) for answer in sorted(answers)])


def _check(parsed: argparse.Namespace) -> None:
    """Raise `ValueError` where the options do not go together."""
    if parsed.input is None and not parsed.prompt:
        raise ValueError("Give a prompt, - for the standard input, or a file of them with --input.")
    if parsed.input is not None and parsed.prompt:
        raise ValueError(f"Give prompts, or a file of them with --input, not both: {parsed.prompt[0]!r} is a prompt.")
    if parsed.column is not None and parsed.input is None:
        raise ValueError("--column is of a file of prompts: give one with --input.")
    if parsed.system is not None and not parsed.chat:
        raise ValueError("--system is a message of a chat: give --chat as well.")
    if parsed.output and parsed.input and Path(parsed.output).absolute() == Path(parsed.input).absolute():
        raise ValueError(f"--output {parsed.output} is the file of prompts: name another.")
    if parsed.output and Path(parsed.output).is_dir():
        raise ValueError(f"--output {parsed.output} is a folder: name a file, such as answers.jsonl.")
    if parsed.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {parsed.batch_size}.")


def _texts(given: list[str]) -> list[tuple[str, str]]:
    """Return prompts of the command line, with the standard input in place of `-`, and what messages call each."""
    if given.count("-") > 1:
        raise ValueError("- is the whole of the standard input: give it once, or --input - for a prompt a line.")
    texts = []
    for place, text in enumerate(given, 1):
        if text == "-":
            texts.append((sys.stdin.read().rstrip("\n"), "Standard input"))
        else:
            texts.append((text, "The prompt" if len(given) == 1 else f"Prompt {place}"))
    return texts


def _from_file(parsed: argparse.Namespace) -> list[FilePrompt]:
    from lightning_peft.generation.prompt_file import read_prompts

    return read_prompts(parsed.input, parsed.column)


def _write(parsed: argparse.Namespace, prompts: list[FilePrompt], answers: list[tuple[str, str | None]]) -> None:
    """Write answers in the prompts' order: a JSON object a line, or, of prompts of the command line, as plain text."""
    from lightning_peft.generation.prompt_file import answer_line, writing_answers

    if parsed.output is None and parsed.input is None:
        print(
            "\n\n".join(
                _shown(str(p.prompt), *pair, len(prompts) > 1) for p, pair in zip(prompts, answers, strict=True)
            )
        )
        return
    with writing_answers(parsed.output) as file:
        for (prompt, _), (text, base) in zip(prompts, answers, strict=True):
            beside = {} if base is None else {"base_answer": base}
            file.write(answer_line({"prompt": prompt, "answer": text, **beside}))
    if parsed.output is not None:
        print(f"Wrote {len(answers):,} answer{'s' if len(answers) > 1 else ''} to {parsed.output}.")


def _shown(prompt: str, text: str, base: str | None, several: bool) -> str:
    lines = [f"> {prompt}"] if several else []
    if base is None:
        return "\n".join([*lines, text.strip("\n")])
    return "\n".join([*lines, f"adapted: {text.strip()}", f"base: {base.strip()}"])
