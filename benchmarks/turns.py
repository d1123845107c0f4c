"""This package and lm-evaluation-harness, each in a process of its own, taking turns at chunks of questions.

In each process the model is loaded before the clock starts. The second side waits while the first works, and who comes
first changes each time; so whatever else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from pairs import machine, quiet, ratio

from lightning_peft.truthfulqa import Question, load_questions

SIDES = ("ours", "lm_eval")
Rows = list[dict[str, Any]]  # what a side finds, one for each question
Work = Callable[[Sequence[Question]], Rows]
Turns = list[dict[str, dict[str, Any]]]  # what both sides say of each chunk


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every such comparison has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default="package", help="a folder or file of TruthfulQA, or this package's own")
    found.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    found.add_argument("--questions", type=int, default=40)
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--chunk", type=int, default=40, help="questions of one turn")
    found.add_argument("--threads", type=int, default=os.cpu_count())
    found.add_argument("--keep", help="a file for finished chunks, which a later call does not do again")
    found.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return found


def run(
    arguments: argparse.Namespace,
    sides: Mapping[str, Callable[[argparse.Namespace], Work]],
    report: Callable[[Turns, argparse.Namespace], None],
    settings: Sequence[str],
) -> None:
    """Measure and report; or, in a process of its own, be a side.

    Args:
        arguments: parsed by `parser`.
        sides: loads the model of a side and returns its work.
        report: prints what was found.
        settings: options that a kept chunk must have been measured with, besides those of `parser`.
    """
    quiet()
    torch.set_num_threads(arguments.threads)
    if arguments.side is None:
        report(_measure(arguments, (*settings, "model", "data", "threads", "chunk")), arguments)
        return
    with os.fdopen(os.dup(1), "w") as answers, open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        _work(arguments, sides[arguments.side], answers)


def report_costs(turns: Turns, arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, int]]:
    """Print how long both sides took and what they took up.

    Returns:
        The ratios of all `seconds` and `cpu_seconds`, and each side's peak memory in bytes.
    """
    print(machine())
    chunks = {(turn["ours"]["first"], turn["ours"]["last"]) for turn in turns}
    count = sum(last - first for first, last in chunks)
    print(f"{count} questions in {len(chunks)} chunks, {arguments.repeats} times")
    ratios = {}
    for kind in ("seconds", "cpu_seconds"):
        above, below = ([turn[side][kind] for turn in turns] for side in ("lm_eval", "ours"))
        ratios[kind] = sum(above) / sum(below)
        print(f"{kind}, lm_eval / ours: all {ratios[kind]:.2f}, median of pairs {ratio(above, below)}")
    peaks = {side: max(turn[side]["peak_bytes"] for turn in turns) for side in SIDES}
    print(f"peak memory: ours {peaks['ours'] / 2**20:.0f} MiB, lm_eval {peaks['lm_eval'] / 2**20:.0f} MiB")
    return ratios, peaks


def _work(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Work], answers: TextIO) -> None:
    """One side's process: a line `first last` comes in, a line of JSON goes out."""
    work = load(arguments)
    questions = load_questions(arguments.data)
    work(questions[:2])  # what is done once only is not timed
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        first, last = map(int, line.split())
        wall, cpu = time.perf_counter(), time.process_time()
        rows = work(questions[first:last])
        done: dict[str, Any] = {"side": arguments.side, "first": first, "last": last, "scores": rows}
        done |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        done["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(done), file=answers, flush=True)


class _Side:
    """The process of one side, started when it is first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, first: int, last: int) -> dict[str, Any]:
        if self._process is None:
            command = [sys.executable, *sys.argv, "--side", self.name]
            pipe = subprocess.PIPE
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            self._answer()
        assert self._process.stdin is not None
        print(first, last, file=self._process.stdin, flush=True)
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The side {self.name} ended with code {self._process.wait()}.")
        return line

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


def _measure(arguments: argparse.Namespace, settings: Sequence[str]) -> Turns:
    total = min(arguments.questions, len(load_questions(arguments.data)))
    chunks = [(first, min(first + arguments.chunk, total)) for first in range(0, total, arguments.chunk)]
    turns = [(repeat, *chunk) for repeat in range(arguments.repeats) for chunk in chunks]
    keep = Path(arguments.keep) if arguments.keep else None
    of = {name: getattr(arguments, name) for name in settings}
    kept = [json.loads(line) for line in keep.read_text().splitlines()] if keep and keep.exists() else []
    finished = {(row["repeat"], row["side"], row["first"], row["last"]): row for row in kept if row["of"] == of}
    sides = {name: _Side(name) for name in SIDES}
    for number, (repeat, first, last) in enumerate(turns):
        for name in SIDES if number % 2 else SIDES[::-1]:
            if (key := (repeat, name, first, last)) in finished:
                continue
            row = finished[key] = sides[name](first, last) | {"repeat": repeat, "of": of}
            print(f"questions {first} to {last}, {name}: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
            if keep:
                keep.parent.mkdir(parents=True, exist_ok=True)
                with keep.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for side in sides.values():
        side.close()
    return [{name: finished[repeat, name, first, last] for name in SIDES} for repeat, first, last in turns]
