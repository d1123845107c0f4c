"""One folder has one writer; the others are told who it is, or wait; a killed one stands in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

from lightning_peft.files.locking import FolderInUseError, only_writer

HOLD = """
import sys
from pathlib import Path
from lightning_peft.files.locking import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the folder until its standard input is closed."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=pipe, stdout=pipe, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_another_process_is_named_and_once_killed_is_in_nobodys_way(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        taken = rf"{tmp_path} is in use by process {process.pid} on .*, since 20"
        with pytest.raises(FolderInUseError, match=taken), only_writer(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with only_writer(tmp_path):
            pass


def test_waiting_ends_with_the_other_process(tmp_path: Path) -> None:
    said: list[str] = []
    with holder(tmp_path) as process:

        def say(sentence: str) -> None:
            said.append(sentence)
            assert process.stdin is not None
            process.stdin.close()

        with only_writer(tmp_path, wait=True, say=say):
            assert process.wait(timeout=60) == 0
    assert len(said) == 1 and f"process {process.pid}" in said[0] and said[0].endswith("waiting for it.")


def test_a_thread_may_enter_again_and_no_other_may(tmp_path: Path) -> None:
    def enter() -> None:
        with only_writer(tmp_path):
            pass

    with ThreadPoolExecutor(1) as pool:
        with only_writer(tmp_path), only_writer(tmp_path):
            assert isinstance(pool.submit(enter).exception(), FolderInUseError)
        # what was entered twice was left twice
        with only_writer(tmp_path), pytest.raises(FolderInUseError, match=rf"process {os.getpid()} on"):
            pool.submit(enter).result()
        pool.submit(enter).result()


def test_a_disk_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.BaseFileLock, "acquire", none)
    with pytest.warns(UserWarning, match="cannot be locked .*let no other run write there"), only_writer(tmp_path):
        pass


def test_an_error_inside_is_no_error_of_the_lock(tmp_path: Path) -> None:
    with warnings.catch_warnings(), pytest.raises(OSError, match="disk full"):
        warnings.simplefilter("error")
        with only_writer(tmp_path):
            raise OSError("disk full")
    with only_writer(tmp_path):
        pass
