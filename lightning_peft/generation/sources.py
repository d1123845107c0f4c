"""Folders and files of what was adapted: which kind each is, and the base that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_peft.fitting.checkpoint_files import export_checkpoint, read_checkpoint
from lightning_peft.stack.adapter_files.bases import named_base
from lightning_peft.stack.adapter_files.folder import CONFIG, ORDER, AdapterError

# what LightningModules call the argument that names their pretrained model; the first is this package's own
_PRETRAINED = ("pretrained", "pretrained_model_name_or_path", "model_name_or_path", "model_name")


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter or a stack of them."""
    return (folder / CONFIG).is_file() or (folder / ORDER).is_file()


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a whole model of transformers, such as a baked or a merged one, and no adapter."""
    return (folder / "config.json").is_file() and not is_adapter(folder)


def is_checkpoint(path: Path) -> bool:
    """Return whether it is a checkpoint of Lightning: a file, or the folder of shards that FSDP2 writes."""
    return path.is_file() or (path / "meta.pt").is_file()


@contextmanager
def as_folder(source: Path, backbone: str | None = None, trust: bool = False) -> Iterator[Path]:
    """Yield the adapter folder that something is, or, of a checkpoint, the one it exports to, for a while.

    Args:
        source: a folder or a checkpoint.
        backbone: which backbone's adapters, where a checkpoint's module had several.
        trust: unpickle the checkpoint, which runs code in it.

    Raises:
        FileNotFoundError: there is nothing.
        AdapterError: it is neither; the message names what was given.
    """
    if source.suffix == ".gguf":
        raise AdapterError(
            f"{source} is a control vector for llama.cpp: give the adapter's folder that it was made from."
        )
    if not is_checkpoint(source):
        if not source.is_dir():
            raise FileNotFoundError(2, "No such file or directory", str(source))
        if not is_adapter(source):
            raise AdapterError(
                f"{source} is neither an adapter's folder ({CONFIG}, or {ORDER} of a stack) nor a model's "
                "(config.json): give one that save_adapter, export, bake or merge wrote, or a checkpoint."
            )
        yield source
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "adapter")
        try:
            yield export_checkpoint(source, folder, backbone, trust)
        except ValueError as error:  # which may name the temporary folder
            if str(folder) in str(error):
                raise type(error)(str(error).replace(str(folder), str(source))) from error
            raise


def base_of(source: Path, folder: Path, trust: bool = False) -> str:
    """Return the base that an adapter's own files name, or the pretrained model that a checkpoint's module had.

    Args:
        source: what the user gave.
        folder: of its adapters, as `as_folder` yields.
        trust: as there.

    Raises:
        AdapterError: none is named.
    """
    try:
        return named_base(folder)
    except AdapterError:
        hyperparameters = read_checkpoint(source, "cpu", trust).get("hyper_parameters") if folder != source else None
        if isinstance(hyperparameters, Mapping):
            for name in _PRETRAINED:
                if isinstance(value := hyperparameters.get(name), str):
                    return value
        raise AdapterError(f"{source} names no base model: give it with --base (the argument base).") from None
