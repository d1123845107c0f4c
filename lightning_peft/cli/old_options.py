"""Options of 0.1 that are the task's now: `--model`, `--data.limit`, `--dtype`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.moved import warn_moved

_OLD_OPTIONS = ("model", "data", "dtype")  # of plans of 0.1, which are the task's now
_TASK_OPTIONS = ("task", *_OLD_OPTIONS)  # of which a plan has one or the others


def as_written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan's settings without the options that a plan of its kind has not."""
    return {name: value for name, value in settings.items() if value is not None or name not in _TASK_OPTIONS}


def with_task_options(args: list[str]) -> list[str]:
    """Return the arguments, options of 0.1 such as `--data.source` being the task's where the plan has one."""
    import yaml

    files = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == "--config"]
    files += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    plans = [yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in files if Path(file).is_file()]
    if not any(isinstance(plan, dict) and "task" in plan for plan in plans):
        return args
    return [_with_task_option(arg) for arg in args]


def _with_task_option(arg: str) -> str:
    option, equals, value = arg.partition("=")
    name, _, rest = option.removeprefix("--").partition(".")
    if not option.startswith("--") or name not in _OLD_OPTIONS or (name == "data") != bool(rest):
        return arg
    new = f"--task.init_args.{rest or name}"
    warn_moved(option, new)
    return f"{new}{equals}{value}"
