"""Argument parsers of the short commands, and errors as one sentence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning_peft.cli import COMMANDS

Plan = TypeVar("Plan")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return a parser that shows the command's example under its options."""
    return argparse.ArgumentParser(
        prog=f"lightning-peft {command}",
        description=description,
        epilog=f"example: {COMMANDS[command].example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def read_plan(command: str, description: str, kind: type[Plan], args: list[str]) -> tuple[Plan, dict[str, Any], bool]:
    """Read a plan from YAML and options, which are the fields of its class.

    Returns:
        The plan, the plain values that it was made of, and whether to wait for another run that writes to its folder.

    Raises:
        ValueError: in one sentence, for a value that is of another type, or an object that cannot be made.
    """
    from jsonargparse import ArgumentParser

    options = ArgumentParser(prog=f"lightning-peft {command}", description=description, exit_on_error=False)
    options.add_argument("--config", action="config", help="YAML file with these options")
    options.add_class_arguments(kind, as_positional=False)
    options.add_argument("--wait", action="store_true", help="where another run writes to the same folder, wait for it")
    try:
        parsed = options.parse_args(args[1:])
        settings, instances = parsed.clone().as_dict(), options.instantiate(parsed).as_dict()
    except Exception as error:  # of the parser, or of any class that the plan names
        raise ValueError(_why_not_read(error)) from error
    wait = settings["wait"]
    for values in (settings, instances):
        for name in ("config", "wait"):
            values.pop(name, None)
    return kind(**instances), settings, wait


def why_not_made(error: BaseException) -> str:
    """Return the first line of the error that led to all others."""
    return _first_line(first_error(error))


def first_error(error: BaseException) -> BaseException:
    """Return the error that led to all others."""
    *_, first = _wrapped(error)
    return first


def _why_not_read(error: BaseException) -> str:
    """Return the line that matters of why jsonargparse could not read a plan or make its objects, and where."""
    of_parser = re.compile(r"(?:Parser key|Problem with given class_path) .(.+?).:$|Does not validate against")
    places: list[str] = []
    for wrapped in _wrapped(error):
        if (match := of_parser.match(line := _first_line(wrapped))) is None:
            break
        places += [match[1]] if match[1] and match[1] not in places else []
    if isinstance(wrapped, FileNotFoundError) and wrapped.filename:
        line = f"{wrapped.filename} does not exist."
    elif isinstance(wrapped, LookupError | RuntimeError):  # of a class's own, which may be but a key
        line = f"{type(wrapped).__name__}: {line}"
    return "".join(f"{place}: " for place in places) + re.sub(r'^Parser key "(.+?)": ', r"\1: ", line)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    """Give an error and those that led to it, the first last."""
    while True:
        yield error
        inner = error.__cause__ or error.__context__
        if inner is None:
            return
        error = inner


@contextmanager
def one_sentence(command: str) -> Iterator[None]:
    """End the program with the message alone where what it was given cannot be used.

    Raises:
        SystemExit: in place of a `ValueError` (this package's own errors are), or of a file that cannot be opened.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise SystemExit(f"lightning-peft {command}: {error.filename} does not exist.") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"lightning-peft {command}: {error}") from error
