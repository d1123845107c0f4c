"""Argument parsers of the short commands, and errors as one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_peft.cli import COMMANDS


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser that shows the command's example under its options."""
    return argparse.ArgumentParser(
        prog=f"lightning-peft {command}",
        description=description,
        epilog=f"example: {COMMANDS[command].example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


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
