"""Argument parsers of the short commands, and errors as one sentence."""

from __future__ import annotations

import argparse
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
    """
    from jsonargparse import ArgumentParser

    options = ArgumentParser(prog=f"lightning-peft {command}", description=description)
    options.add_argument("--config", action="config", help="YAML file with these options")
    options.add_class_arguments(kind, as_positional=False)
    options.add_argument("--wait", action="store_true", help="where another run writes to the same folder, wait for it")
    parsed = options.parse_args(args[1:])
    settings, instances = parsed.clone().as_dict(), options.instantiate(parsed).as_dict()
    wait = settings["wait"]
    for values in (settings, instances):
        for name in ("config", "wait"):
            values.pop(name, None)
    return kind(**instances), settings, wait


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
