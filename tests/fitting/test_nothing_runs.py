"""No file that is read runs anything, whatever it holds: checkpoints, folders of shards, folders of adapters."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from tuning import QUIET, Classifier, classifier, fit, one_sentence, points, same, trainer, weights

from lightning_peft import export_checkpoint, load_adapter, load_from_checkpoint
from lightning_peft.callbacks import LoRA
from lightning_peft.cli import main
from lightning_peft.fitting.checkpoint_files import outside_backbones, read_checkpoint
from lightning_peft.fitting.shards import INDEX, read_index
from lightning_peft.stack.adapter_files.folder import AdapterError

pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*QUIET, "ignore:torch.distributed is disabled")]


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def harms(sentinel: Path) -> dict[str, Any]:
    """Objects that leave a file when they are unpickled."""
    return {
        "exec": Call(builtins.exec, f"open({str(sentinel)!r}, 'w')"),
        "system": Call(os.system, f"touch {sentinel}"),
        "a method": Call(Path.touch, sentinel),
        "a function of torch": Call(torch.save, {}, str(sentinel)),
    }


HARMS = tuple(harms(Path()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "trained.ckpt"
    fit(classifier(), LoRA(r=2, backbone="net")).save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def shards(checkpoint: Path) -> Path:
    """The same as the folder that FSDP2's strategy writes."""
    whole = torch.load(checkpoint, weights_only=True)
    folder = checkpoint.with_name("folder.ckpt")
    state = {"state_dict": whole.pop("state_dict"), "optimizer_0": {"rate": 0.1, "half": torch.ones(2).bfloat16()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save(whole, folder / "meta.pt")
    return folder


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "export": lambda path, to: export_checkpoint(path, to),
    "outside": lambda path, to: outside_backbones(path),
    "load": lambda path, to: load_from_checkpoint(Classifier, path),
    "command": lambda path, to: main(["export", str(path), str(to)]),
}


def refused(read: Callable[[], Any], sentinel: Path) -> str:
    """The sentence with which something is refused, or nothing if it is read; nothing has run meanwhile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        said = ""
    except (AdapterError, SystemExit) as error:
        said = str(error)
    assert not sentinel.exists(), "it ran"
    assert "\n" not in said
    return said


def test_a_folder_of_shards_is_read_as_the_file_is(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    assert same(read_checkpoint(shards)["state_dict"], torch.load(checkpoint, weights_only=True)["state_dict"])
    assert same(read_checkpoint(shards, trust=True)["state_dict"], read_checkpoint(shards)["state_dict"])
    assert same(
        weights(load_from_checkpoint(Classifier, shards)), weights(load_from_checkpoint(Classifier, checkpoint))
    )


@pytest.mark.parametrize("size", [(), (0,), (3,), (2, 0, 3), (4, 3, 2)])
def test_tensors_of_every_dtype_and_shape_come_back(size: tuple[int, ...], tmp_path: Path) -> None:
    from lightning_peft.fitting.shards import read_shards

    dtypes = ("float32", "float16", "bfloat16", "float64", "int8", "uint8", "int64", "bool", "float8_e4m3fn")
    state = {f"a.{name}": (torch.randn(size) * 3).to(getattr(torch, name)) for name in dtypes}
    save({"state_dict": state}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    found = read_shards(tmp_path)
    assert found.keys() == state.keys()
    assert all(found[k].dtype == v.dtype and torch.equal(found[k].float(), v.float()) for k, v in state.items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("place", ["all of it", "planner_data", "storage_data", "a tensor's entry"])
def test_an_index_of_shards_runs_nothing(place: str, harm: str, reader: str, shards: Path, tmp_path: Path) -> None:
    evil = harms(tmp_path / "sentinel")[harm]
    folder = shutil.copytree(shards, tmp_path / "folder")
    index = pickle.loads((folder / INDEX).read_bytes())
    if place == "all of it":
        index = evil
    elif place == "a tensor's entry":
        index.state_dict_metadata[min(index.state_dict_metadata)].properties.requires_grad = evil
    else:
        setattr(index, place, [getattr(index, place), evil])
    (folder / INDEX).write_bytes(pickle.dumps(index))
    said = refused(lambda: READERS[reader](folder, tmp_path / "out"), tmp_path / "sentinel")
    assert "which PyTorch does not write there and which was not run" in said and not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="which was not run"):
        read_index(folder)
    if place == "all of it":
        pickle.loads((folder / INDEX).read_bytes())
        assert (tmp_path / "sentinel").exists(), "it would have run"


def test_a_trainer_does_not_hand_such_an_index_to_its_strategy(shards: Path, tmp_path: Path) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    from lightning_peft.fitting.strategies import prepare

    folder = shutil.copytree(shards, tmp_path / "folder")
    resumed = trainer(strategy=ModelParallelStrategy(), devices=1)
    resumed.ckpt_path = folder
    prepare(resumed, classifier())
    (folder / INDEX).write_bytes(pickle.dumps(harms(tmp_path / "sentinel")["exec"]))
    said = refused(lambda: prepare(resumed, classifier()), tmp_path / "sentinel")
    assert "which was not run" in said and one_sentence(said.replace(str(folder), "folder").replace("builtins.", ""))


def test_with_trust_an_index_is_unpickled_as_pytorch_does(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(FileSystemReader, "read_metadata", lambda self: asked.append(self) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_checkpoint(shards, tmp_path / "out", trust=True)
    assert len(asked) == 1
    export_checkpoint(shards, tmp_path / "out")
    assert len(asked) == 1


INDICES: dict[str, Callable[[Any], Any]] = {
    "of nothing": lambda index: None,
    "of numbers": lambda index: [1, 2],
    "another file": lambda index: _each(index, relative_path="../secret.distcp"),
    "an absolute file": lambda index: _each(index, relative_path="/secret.distcp"),
    "no file": lambda index: _each(index, relative_path="__9_9.distcp"),
    "a folder": lambda index: _each(index, relative_path="."),
    "other bytes": lambda index: _each(index, offset=7),
    "no bytes": lambda index: _each(index, length=0),
    "a part too few": lambda index: [entry.chunks.clear() for entry in index.state_dict_metadata.values()] and index,
    "no places": lambda index: setattr(index, "storage_data", {}) or index,
    "other sizes": lambda index: [_grow(entry) for entry in index.state_dict_metadata.values()] and index,
}


def _each(index: Any, **change: Any) -> Any:
    for info in index.storage_data.values():
        info.__dict__.update(change)
    return index


def _grow(entry: Any) -> None:
    entry.size = torch.Size([10**7, *entry.size])


@pytest.mark.parametrize("damage", INDICES)
def test_a_damaged_index_is_one_sentence(damage: str, shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "folder", ignore=lambda *_: [])
    shutil.copy(folder / "__0_0.distcp", tmp_path / "secret.distcp")
    index = pickle.loads((folder / INDEX).read_bytes())
    for entry in [key for key, value in index.state_dict_metadata.items() if not hasattr(value, "chunks")]:
        del index.state_dict_metadata[entry]
    (folder / INDEX).write_bytes(pickle.dumps(INDICES[damage](index)))
    with pytest.raises(AdapterError, match=r"is damaged: its index and its shards do not fit|cannot be read") as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_a_truncated_index_or_shard_is_one_sentence(shards: Path, tmp_path: Path) -> None:
    for number, name in enumerate((INDEX, "__0_0.distcp", "meta.pt")):
        folder = shutil.copytree(shards, tmp_path / str(number))
        (folder / name).write_bytes((folder / name).read_bytes()[:150])
        with pytest.raises(AdapterError, match=r"truncated|is damaged") as error:
            read_checkpoint(folder)
        assert "\n" not in str(error.value)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("place", ["all of it", "hyper_parameters", "lightning_peft", "state_dict", "callbacks"])
def test_a_checkpoint_runs_nothing(place: str, harm: str, reader: str, checkpoint: Path, tmp_path: Path) -> None:
    evil, path = harms(tmp_path / "sentinel")[harm], tmp_path / "evil.ckpt"
    whole = torch.load(checkpoint, weights_only=True)
    torch.save({**whole, place: {**whole[place], "seed": evil}} if place in whole else evil, path)
    said = refused(lambda: READERS[reader](path, tmp_path / "out"), tmp_path / "sentinel")
    harmless = place in ("hyper_parameters", "callbacks") and harm in ("exec", "a function of torch")
    assert bool(said) is not harmless, "what needs nothing of it is read"
    if harm == "exec" and place == "hyper_parameters":
        torch.load(path, weights_only=False)
        assert (tmp_path / "sentinel").exists(), "it would have run"


def test_a_trainer_runs_nothing_either(checkpoint: Path, tmp_path: Path) -> None:
    whole = torch.load(checkpoint, weights_only=True)
    whole["hyper_parameters"]["seed"] = harms(tmp_path / "sentinel")["exec"]
    torch.save(whole, tmp_path / "evil.ckpt")
    said = refused(
        lambda: trainer(LoRA(r=2, backbone="net")).test(classifier(), points(), ckpt_path=tmp_path / "evil.ckpt"),
        tmp_path / "sentinel",
    )
    assert "holds hyper_parameters.seed, a builtins.exec" in said


def test_the_pickles_within_shards_run_nothing(shards: Path, tmp_path: Path) -> None:
    evil = io.BytesIO()
    torch.save(harms(tmp_path / "sentinel")["exec"], evil)
    folder = shutil.copytree(shards, tmp_path / "folder")
    (folder / "__0_0.distcp").write_bytes(evil.getvalue())
    index = pickle.loads((folder / INDEX).read_bytes())
    (folder / INDEX).write_bytes(pickle.dumps(_each(index, offset=0, length=len(evil.getvalue()))))
    assert "is damaged" in refused(lambda: read_checkpoint(folder), tmp_path / "sentinel")
    shutil.copy(shards / INDEX, folder / INDEX)
    torch.save(
        {**torch.load(shards / "meta.pt", weights_only=True), "more": Call(builtins.exec, "1/0")}, folder / "meta.pt"
    )
    shutil.copy(shards / "__0_0.distcp", folder)
    assert export_checkpoint(folder, tmp_path / "out")


def test_a_pickle_that_changes_what_it_is_handed_changes_nothing_here(shards: Path, tmp_path: Path) -> None:
    """One that sets an attribute of a class that it names."""
    from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

    before = dict(vars(Metadata)), dict(vars(TensorProperties))
    folder = shutil.copytree(shards, tmp_path / "folder")
    name = b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n"
    (folder / INDEX).write_bytes(b"\x80\x02" + name + b"(N}(U\x0c__setstate__" + name + b"utb.")
    with pytest.raises(AdapterError):
        read_checkpoint(folder)
    assert (dict(vars(Metadata)), dict(vars(TensorProperties))) == before


def test_a_scripted_model_in_place_of_a_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"a/{name}", b"3\n")
    with pytest.raises(AdapterError, match=r"is no checkpoint|is truncated or damaged"):
        read_checkpoint(tmp_path / "a.ckpt")


CONFIGS: dict[str, dict[str, Any]] = {
    "a module to import": {"megatron_config": {"a": 1}, "megatron_core": "harmful"},
    "a library to import": {"auto_mapping": {"parent_library": "harmful", "base_model_class": "A"}},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapters_configuration_imports_nothing(
    case: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    folder = export_checkpoint(checkpoint, tmp_path / "adapter")
    (tmp_path / "harmful.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | CONFIGS[case]))
    try:
        load_adapter(classifier().net, folder)
    except ValueError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "sentinel").exists() and "harmful" not in sys.modules


def test_weights_are_read_as_safetensors_alone(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(checkpoint, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(harms(tmp_path / "sentinel")["exec"], folder / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in refused(
        lambda: load_adapter(classifier().net, folder), tmp_path / "sentinel"
    )
    torch.save(harms(tmp_path / "sentinel")["exec"], folder / "adapter_model.safetensors")
    assert "not a safetensors file" in refused(lambda: load_adapter(classifier().net, folder), tmp_path / "sentinel")
    save_file({}, folder / "adapter_model.safetensors")
