"""Whenever the process that replaces an adapter dies, the old one is there or the new one, and no third."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deaths import WAYS, each_death
from peft import LoraConfig
from tiny_models import tiny
from torch import Tensor

from lightning_peft.stack.adapter_files.folder import (
    COMPRESSED,
    CONFIG,
    NOTES,
    ORDER,
    WEIGHTS,
    AdapterError,
    adapter_folders,
    read_folder,
    write_folders,
)
from lightning_peft.stack.adapter_files.replacing import STAGED
from lightning_peft.stack.adapter_files.saving import load_adapter, save_adapter
from lightning_peft.stack.stack import stack_of

Adapters = dict[str, tuple[Any, dict[str, Tensor], dict[str, Any]]]


def adapters(seed: int, *names: str) -> Adapters:
    """Adapters that differ from those of another seed in each of their files."""
    key = "base_model.model.q_proj.lora_A.weight"
    return {
        name: (LoraConfig(r=seed), {key: torch.full((seed, 4), float(i))}, {"computed": False, "record": {"of": seed}})
        for i, name in enumerate(names)
    }


ONE, OTHER = adapters(1, "default"), adapters(2, "default")
STACK = adapters(3, "lora", "edit")
PACKED = adapters(5, "default")


def write(root: Path, made: Adapters) -> None:
    if not made:
        root.mkdir(exist_ok=True)
    elif made is PACKED:
        from lightning_peft.stack.adapter_files.compression import compress_adapter

        write_folders(root.with_name("plain"), made)
        compress_adapter(root.with_name("plain"), root)
    else:
        write_folders(root, made)


def content(root: Path) -> list[Any]:
    """All that is read from an adapter's folder; nothing where there is none."""
    try:
        read = [(path.name, *read_folder(path)) for path in adapter_folders(root)]
    except AdapterError as error:
        assert "is not an adapter folder: it has no adapter_config.json" in str(error)
        return []
    name = (lambda path: path) if (root / ORDER).exists() else (lambda path: "")
    return [
        (name(path), config.to_dict(), {key: value.tolist() for key, value in tensors.items()}, notes)
        for path, config, tensors, notes in read
    ]


def plainly(root: Path) -> tuple[str, bytes] | None:
    """What a reader finds that knows nothing of this package; nothing where the folder is no adapter's."""
    weights = root / (COMPRESSED if (root / COMPRESSED).exists() else WEIGHTS)
    return ((root / CONFIG).read_text(), weights.read_bytes()) if (root / CONFIG).exists() else None


CHANGES: dict[str, tuple[Adapters, Adapters]] = {
    "one by another": (ONE, OTHER),
    "a stack by one": (STACK, ONE),
    "one by a stack": (ONE, STACK),
    "compressed by plain": (PACKED, ONE),
    "nothing by one": ({}, ONE),
}


DEATHS = [(change, WAYS[0]) for change in CHANGES]
DEATHS += [(change, way) for change in ("one by another", "nothing by one") for way in WAYS[1:]]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("change", "way"), DEATHS)
def test_old_or_new_is_there_whenever_the_writer_dies(change: str, way: str, tmp_path: Path) -> None:
    old, new = CHANGES[change]
    for name, made in (("old", old), ("new", new)):
        write(tmp_path / name, made)
    before, after = content(tmp_path / "old"), content(tmp_path / "new")
    assert before != after and len(after) == len(new)
    plain = {None, plainly(tmp_path / "old"), plainly(tmp_path / "new")}
    (tmp_path / "old" / "README.md").write_text("the user's own")
    clean = {path.name for path in (tmp_path / "new").iterdir()} | {"README.md"} | old.keys() - {"default"}
    found, root = [], tmp_path / "root"

    def work() -> None:
        write(root, new)

    shutil.copytree(tmp_path / "old", root)
    for number in each_death(work, way):
        assert plainly(root) in plain, f"a mixture after operation {number}"
        found.append(content(root))
        assert found[-1] in (before, after), f"neither old nor new after operation {number}"
        assert content(root) == found[-1], "reading changes nothing more"
        work()
        assert content(root) == after and {path.name for path in root.iterdir()} == clean
        assert (root / "README.md").read_text() == "the user's own"
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "old", root)
    assert content(root) == after
    assert found == sorted(found, key=lambda each: each == after), "one moment at which the new one counts"
    assert way == "killed while writing" or {before == each for each in found} == {True, False}
    assert {path.name for path in tmp_path.iterdir()} <= {"old", "new", "root", "plain"}


def test_what_a_dead_writer_had_done_is_loaded(tmp_path: Path) -> None:
    """Once more with all that loading does, for a writer that died as it moved files to their places."""
    model = tiny("llama")
    stack_of(model).add(LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    (tensors,) = (stack_of(model).tensors(part) for part in stack_of(model).parts)
    tensors[min(tensors)].fill_(7.0)
    seen = set()
    for _ in each_death(lambda: save_adapter(model, tmp_path / "adapter"), "killed"):
        moving = (tmp_path / "adapter" / STAGED / "files.json").exists()
        again = tiny("llama")
        (part,) = load_adapter(again, tmp_path / "adapter")
        seen.add((moving, float(stack_of(again).tensors(part)[min(tensors)].max()) == 7.0))
        assert not moving or not (tmp_path / "adapter" / STAGED).exists()
    assert seen == {(False, False), (True, True), (False, True)}


def test_two_processes_that_write_at_once_leave_the_adapter_of_one(tmp_path: Path) -> None:
    children = []
    for made in (ONE, STACK, OTHER):
        if (child := os.fork()) == 0:
            try:
                for _ in range(10):
                    write_folders(tmp_path / "adapter", made)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    for name, made in (("one", ONE), ("stack", STACK), ("other", OTHER)):
        write_folders(tmp_path / name, made)
    assert content(tmp_path / "adapter") in [content(tmp_path / name) for name in ("one", "stack", "other")]
    assert STAGED not in {path.name for path in (tmp_path / "adapter").iterdir()}


def test_a_folder_that_cannot_be_finished_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path, ONE)
    next(number for number in each_death(lambda: write_folders(tmp_path, OTHER), "killed") if _moving(tmp_path))

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        with pytest.raises(AdapterError, match=r"was being replaced when that was cut off, .*: Permission denied\.$"):
            load_adapter(tiny("llama"), tmp_path)
    assert content(tmp_path)[0][1]["r"] == 2


def _moving(root: Path) -> bool:
    return (root / STAGED / "files.json").exists()


FOREIGN: dict[str, Any] = {
    "list": "[",
    "no list": {},
    "numbers": [1],
    "outside": ["../adapter_config.json"],
    "further outside": ["a/../../adapter_config.json"],
    "absolute": ["/adapter_config.json"],
    "another file": ["README.md"],
    "a part's other file": ["lora/README.md"],
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_list_of_files_that_was_not_written_here_moves_nothing(case: str, tmp_path: Path) -> None:
    """A folder from somebody else may hold anything, also what looks like a half-finished replacement."""
    write_folders(tmp_path / "adapter", ONE)
    (tmp_path / "adapter" / STAGED).mkdir()
    text = FOREIGN[case] if case == "list" else json.dumps(FOREIGN[case])
    (tmp_path / "adapter" / STAGED / "files.json").write_text(text)
    (tmp_path / "adapter" / "README.md").write_text("own")
    (tmp_path / CONFIG).write_text("outside")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for act in (
        lambda: load_adapter(tiny("llama"), tmp_path / "adapter"),
        lambda: write_folders(tmp_path / "adapter", OTHER),
    ):
        with pytest.raises(AdapterError, match=r"files\.json|cannot hold"):
            act()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", [CONFIG, NOTES, WEIGHTS])
def test_a_folder_where_a_file_should_be_is_said_before_anything_is_replaced(place: str, tmp_path: Path) -> None:
    write_folders(tmp_path, ONE)
    (tmp_path / place).unlink()
    (tmp_path / place).mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(AdapterError, match="is a folder where an adapter's file should be: remove it"):
        write_folders(tmp_path, OTHER)
    assert {path.name for path in tmp_path.iterdir()} == before
