"""Whatever names, links and lists are in a file that is read, nothing outside the target is written or deleted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import both, edited
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import tiny
from tuning import QUIET, Classifier, classifier, fit

from lightning_peft import export_checkpoint, load_adapter, load_from_checkpoint, save_adapter
from lightning_peft.callbacks import HeadOffsets, LoRA, Steer
from lightning_peft.cli import main
from lightning_peft.compare.plan import Plan, Row
from lightning_peft.compare.run import run as compare
from lightning_peft.editing.arithmetic import combine
from lightning_peft.files.atomic import new_file, new_folder, scratch_folder
from lightning_peft.fitting.checkpoint_files import outside_backbones
from lightning_peft.stack.adapter_files.baking import bake
from lightning_peft.stack.adapter_files.bases import load_base
from lightning_peft.stack.adapter_files.compression import compress_adapter, decompress_adapter
from lightning_peft.stack.adapter_files.folder import AdapterError, write_folders
from lightning_peft.stack.adapter_files.merging import merge_pretrained
from lightning_peft.stack.adapter_files.names import is_folder_name
from lightning_peft.stack.adapter_files.replacing import STAGED
from lightning_peft.stack.stack import stack_of
from lightning_peft.stack.steering import steering
from lightning_peft.sweep.run import run as sweep
from lightning_peft.sweep.settings import Sweep
from lightning_peft.truthfulqa.judges import save_quality
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

FILES = ("adapter_config.json", "adapter_model.safetensors", "lightning_peft.json", "stack.json", "judge.json")
NAMES = [
    *("", ".", "..", "../..", "../victim", "../../victim", "a/../../victim", "/victim", "victim/..", "a/b", "a/", "/"),
    *(
        "//victim",
        "./a",
        "..\\victim",
        "a\\b",
        "C:\\victim",
        "C:victim",
        "\\\\host\\victim",
        "a\0b",
        "a\nb",
        "a\n",
        " ",
    ),
    *("..%2fvictim", "~", "~/victim", "$HOME", ".hidden", "...", "a.", "stack.json", "adapter_config.json", STAGED),
    *("x" * 300, "é" * 60, "\ud800", "a b", "*", "a:b", "．．", "∕victim", "‥", "-a/../..", "\x7f", "a\u202eb"),
]


def state(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything in a folder: names, kinds, content, when it was changed."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (kind.st_mode, kind.st_mtime_ns if path.is_file() else 0, content)
    return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a victim at every place that a hostile name may lead to, from the targets `deep/er/out`."""
    for place in ("", "deep", "deep/er", "victim", "deep/victim", "deep/er/victim", "deep/er/a", "deep/er/b"):
        (tmp_path / "world" / place).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (tmp_path / "world" / place / name).write_text(f"{place}/{name}")
    monkeypatch.chdir(tmp_path / "world" / "deep" / "er")
    monkeypatch.setenv("HOME", str(tmp_path / "world"))
    return tmp_path / "world"


def harmless(world: Path, target: Path, act: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    """The sentence with which something is refused; nothing but the target has changed, and that is not there."""
    before = state(world)
    with pytest.raises((error, SystemExit)) as raised:
        act()
    said = str(raised.value)
    assert "\n" not in said and state(world) == before and not target.exists()
    return said


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "trained.ckpt"
    fit(classifier(), LoRA(r=2, backbone="net"), LoRA(r=2, backbone="net", name="more")).save_checkpoint(path)
    return path


def renamed(checkpoint: Path, to: Path, name: str) -> Path:
    """The checkpoint with another name for its second adapter."""
    whole = torch.load(checkpoint, weights_only=True)
    whole["lightning_peft"]["backbones"]["net"]["parts"][1]["name"] = name
    torch.save(whole, to)
    return to


FROM_CHECKPOINT: dict[str, Callable[[Path, Path], Any]] = {
    "export_checkpoint": lambda path, out: export_checkpoint(path, out),
    "outside_backbones": lambda path, out: outside_backbones(path),
    "load_from_checkpoint": lambda path, out: load_from_checkpoint(Classifier, path),
    "export": lambda path, out: main(["export", str(path), str(out)]),
    "merge": lambda path, out: main(["merge", str(path), str(out), "--base", "base"]),
}


@pytest.mark.parametrize("way", FROM_CHECKPOINT)
def test_a_name_in_a_checkpoint_leads_nowhere(way: str, checkpoint: Path, world: Path, tmp_path: Path) -> None:
    every = 5 if way in ("export", "merge") else 2 if way != "export_checkpoint" else 1  # commands call functions
    for name in (*NAMES[::every], str(world / "victim")):
        path, out = renamed(checkpoint, tmp_path / "evil.ckpt", name), world / "deep" / "er" / "out"
        said = harmless(world, out, lambda path=path, out=out: FROM_CHECKPOINT[way](path, out))
        assert "not a name of letters, digits, - and _" in said


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(st.one_of(st.text(max_size=12), st.text("./\\ab~", max_size=8), st.text("aé_-", min_size=1, max_size=8)))
@example("lora-2")
def test_any_name_is_a_folder_within_or_refused(checkpoint: Path, world: Path, tmp_path: Path, name: str) -> None:
    path, out = renamed(checkpoint, tmp_path / "any.ckpt", name), world / "deep" / "er" / "out"
    before = state(world)
    try:
        export_checkpoint(path, out)
        assert {p.name for p in out.iterdir()} == {"README.md", "stack.json", "lora", name} and is_folder_name(name)
        assert all((out / name / file).is_file() for file in FILES[:3])
    except AdapterError:
        assert not is_folder_name(name) or name == "lora"
    shutil.rmtree(out, ignore_errors=True)
    assert state(world) == before


FROM_FOLDER: dict[str, Callable[[Path, Path], Any]] = {
    "load_adapter": lambda folder, out: load_adapter(tiny("llama"), folder),
    "steering": lambda folder, out: steering(tiny("llama"), folder).__enter__(),
    "compress_adapter": lambda folder, out: compress_adapter(folder, out),
    "compress's start": lambda folder, out: compress_adapter(folder.parent / "plain", out, initial=folder),
    "decompress_adapter": lambda folder, out: decompress_adapter(folder, out),
    "combine": lambda folder, out: combine([folder], out),
    "merge_pretrained": lambda folder, out: merge_pretrained(folder, out, "base"),
    "load_base": lambda folder, out: load_base(folder),
    "bake": lambda folder, out: bake(tiny("llama"), folder, out),
    "HeadOffsets": lambda folder, out: HeadOffsets(init_from=str(folder)).make_config(tiny("llama")),
    "compress": lambda folder, out: main(["compress", str(folder), str(out)]),
    "decompress": lambda folder, out: main(["decompress", str(folder), str(out)]),
    "combine, the command": lambda folder, out: main(["combine", str(folder), str(out)]),
    "merge, the command": lambda folder, out: main(["merge", str(folder), str(out), "--base", "base"]),
    "bake, the command": lambda folder, out: main(["bake", str(folder), str(out), "--base", "base"]),
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(edited("llama")[0], folder / "plain")
    return save_adapter(both("llama")[0], folder / "stack")


@pytest.mark.parametrize("way", FROM_FOLDER)
def test_a_name_in_the_order_of_a_stack_leads_nowhere(way: str, stack: Path, world: Path) -> None:
    out = world / "deep" / "er" / "out"
    every = 5 if "command" in way else 2 if way != "decompress_adapter" else 1
    for name in (*NAMES[::every], str(world / "victim")):
        (stack / "stack.json").write_text(json.dumps({"parts": ["lora", name]}))
        said = harmless(world, out, lambda: FROM_FOLDER[way](stack, out))
        assert "stack.json is not what this package writes: parts[1] is" in said
    (stack / "stack.json").write_text(json.dumps({"parts": ["lora", "edit"]}))


def test_a_name_that_is_given_to_an_adapter_leads_nowhere(stack: Path, world: Path) -> None:
    model = tiny("llama")
    for name in NAMES:
        if name:  # none is the default's
            said = harmless(
                world, Path("out"), lambda name=name: load_adapter(model, stack.parent / "plain", name=name)
            )
            assert said.startswith("An adapter's name consists of letters")
    assert not stack_of(model).parts


def test_a_name_of_a_part_that_was_changed_since_leads_nowhere(world: Path) -> None:
    model, adapters = both("llama")
    adapters.parts[0].name = "../victim"
    with pytest.raises((ValueError, KeyError)):
        save_adapter(model, "out")
    one = write_one()
    harmless(world, Path("out"), lambda: write_folders(Path("out"), {"a": one, "../victim": one}))


def write_one() -> tuple[Any, ...]:
    from peft import LoraConfig

    return LoraConfig(r=1), {"a": torch.ones(1)}, {}


@pytest.mark.parametrize("name", [*NAMES, "{world}/victim"])
def test_the_name_of_a_row_or_a_plan_leads_nowhere(name: str, world: Path) -> None:
    name = name.replace("{world}", str(world))
    console = Console(quiet=True)
    rows, task = [Row("base", "", "base"), Row(name, "", "prompt", few_shot=0)], TruthfulQA("no-model")
    for plan in (Plan("a", rows, task, output="out"), Plan(name, rows[:1], task)):
        said = harmless(world, world / "deep/er/out", lambda plan=plan: compare(plan, {"rows": {}}, console))
        assert "name consists of letters, digits, - and _, at most 100 of them" in said
    plan = Sweep(name, "no-model", [1], [1.0])
    said = harmless(world, world / "deep/er/runs", lambda: sweep(plan, {}, console))
    assert said.startswith("A sweep's name consists of letters")


# -- links -----------------------------------------------------------------------------------------------------------


def test_a_link_in_place_of_a_parts_folder_is_not_followed(stack: Path, world: Path) -> None:
    Path("out").mkdir()
    Path("out", "edit").symlink_to(world / "victim")
    before = state(world)
    with pytest.raises(AdapterError, match="is a link or a file where an adapter's folder should be: remove it"):
        save_adapter(both("llama")[0], "out")
    assert state(world) == before
    with pytest.raises(AdapterError, match="is a link or a file"):
        compress_adapter(stack, "out")
    assert state(world) == before


def test_a_link_in_place_of_a_file_is_replaced_itself(stack: Path, world: Path) -> None:
    Path("out").mkdir()
    for name in FILES[:4]:
        Path("out", name).symlink_to(world / "victim" / name)
    before = state(world / "victim")
    save_adapter(edited("llama")[0], "out")
    assert state(world / "victim") == before
    assert {path.name for path in Path("out").iterdir()} == {"README.md", *FILES[:3]}
    assert not any(path.is_symlink() for path in Path("out").iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "dangling"])
def test_a_link_in_place_of_what_is_being_written_is_not_followed(kind: str, stack: Path, world: Path) -> None:
    victim = world / "victim" / {"folder": "", "file": "stack.json", "dangling": "not-there"}[kind]
    Path("out").mkdir()
    Path("out", STAGED).symlink_to(victim)
    for name in (".made.new", ".made.trial", ".one.new"):
        Path(name).symlink_to(victim)
    before = state(world / "victim")
    load_adapter(tiny("llama"), stack)
    save_adapter(edited("llama")[0], "out")
    with new_folder("made") as made:
        (made / "stack.json").write_text("new")
    with scratch_folder("made") as made:
        (made / "stack.json").write_text("new")
    with new_file("one") as one:
        one.write_text("new")
    assert state(world / "victim") == before
    assert {path.name for path in Path("out").iterdir()} == {"README.md", *FILES[:3]}
    assert Path("one").read_text() == "new" and not Path("made").is_symlink()


@pytest.mark.parametrize("place", ["staged", "target"])
def test_links_in_a_replacement_that_seems_half_done_are_not_followed(place: str, stack: Path, world: Path) -> None:
    """Loading would move files out of one folder into the other, and delete what stands in their way."""
    shutil.copytree(stack.parent / "plain", "out")
    Path("out", STAGED).mkdir()
    (Path("out", STAGED) if place == "staged" else Path("out")).joinpath("victim").symlink_to(world / "victim")
    Path("out", STAGED, "files.json").write_text(json.dumps([f"victim/{name}" for name in FILES[:3]]))
    before = state(world)
    with pytest.raises(AdapterError, match="is a link or a file where an adapter's folder should be"):
        load_adapter(tiny("llama"), "out")
    assert state(world) == before


def test_links_are_not_followed_where_a_dead_writers_folder_is_cleared(world: Path) -> None:
    Path("out", STAGED, "lora").mkdir(parents=True)
    for link in ("a", "lora/b"):
        Path("out", STAGED, link).symlink_to(world / "victim")
    before = state(world / "victim")
    save_adapter(edited("llama")[0], "out")
    assert state(world / "victim") == before and not Path("out", STAGED).exists()


def test_a_link_beside_a_judge_is_not_followed(world: Path) -> None:
    from lightning_peft.truthfulqa.judges.quality import Confusion, JudgeQuality

    Path("judge").mkdir()
    for name in (".judge.json.new", ".judge.json.partial", "judge.json"):
        Path("judge", name).symlink_to(world / "victim" / "judge.json")
    before = state(world / "victim")
    save_quality(JudgeQuality("truth", 1, 1, 1.0, 1.0, 1.0, 0.0, 0.0, Confusion(((1, 0, 0, 0),))), "judge")
    assert state(world / "victim") == before and not Path("judge", "judge.json").is_symlink()


def test_links_that_only_lead_to_files_to_read_are_followed(stack: Path, tmp_path: Path) -> None:
    """As in the Hugging Face hub's cache, where every file is one."""
    (tmp_path / "linked").mkdir()
    for path in (stack.parent / "plain").iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    assert load_adapter(tiny("llama"), tmp_path / "linked")
    Steer(str(tmp_path / "linked"))


def test_a_module_named_in_a_checkpoint_is_looked_up_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("__class__", "net.__dict__", "head.weight", "../net", "net..", ".net"):
        whole = torch.load(checkpoint, weights_only=True)
        backbones = whole["lightning_peft"]["backbones"]
        backbones[name] = backbones.pop("net")
        torch.save(whole, tmp_path / "evil.ckpt")
        with pytest.raises(AdapterError, match="does not have"):
            load_from_checkpoint(Classifier, tmp_path / "evil.ckpt")
