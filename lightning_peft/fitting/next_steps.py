"""Where fit left its result, and the commands that go on from there."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint


def checkpoint_path(trainer: L.Trainer) -> str:
    """Return the best checkpoint that this fit wrote, else the last one; empty where there is none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    written = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    for name in ("best_model_path", "last_model_path"):
        for callback in written:
            if path := getattr(callback, name, ""):
                return _short(path)
    return ""


def config_path(trainer: L.Trainer) -> str:
    """Return the configuration that the command line's fit saved; empty where it was not the command line's."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    names = [callback.config_filename for callback in callbacks if hasattr(callback, "config_filename")]
    path = Path(trainer.log_dir or ".") / names[0] if names else None
    return _short(path) if path is not None and path.is_file() else ""


def next_commands(checkpoint: str, config: str, base: str, prompt: str | None) -> list[str]:
    """Return what can be done with a checkpoint, as lines for a shell; without a configuration the test is Python's.

    Args:
        checkpoint: its path; without one nothing can be done.
        config: the path of the configuration that `fit` ran with.
        base: the pretrained model's name or folder, if it is known.
        prompt: to generate after; None where the model does not generate.

    Example:
        >>> next_commands("last.ckpt", "config.yaml", "models/base", "What is it?")[-1]
        "lightning-peft generate last.ckpt --base models/base 'What is it?'"
    """
    if not checkpoint:
        return []
    path = shlex.quote(checkpoint)
    lines = ['trainer.test(module, data, ckpt_path="best")  # in Python']
    if config:
        lines = [f"lightning-peft test --config {shlex.quote(config)} --ckpt_path {path}"]
    if prompt is not None and base:
        return [*lines, f"lightning-peft generate {path} --base {shlex.quote(base)} {shlex.quote(prompt)}"]
    return [*lines, f"lightning-peft export {path} adapter"]


def _short(path: str | Path) -> str:
    """Return a path as it is named from here, where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
