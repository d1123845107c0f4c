"""Bottlenecks that stood elsewhere in release 68ae323 stay there: its folders and trainings go on as they were."""

from __future__ import annotations

import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from placed import END, FOLDER, KINDS, METHODS, NAMES
from released import Language, backbone, base, outputs
from safetensors.torch import load_file
from torch import Tensor
from tuning import QUIET, fit, one_sentence

from lightning_peft import callbacks as c
from lightning_peft import export_checkpoint, load_adapter
from lightning_peft.fitting.checkpoints import load_from_checkpoint
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import stack_of
from lightning_peft.truthfulqa.question_records import QuestionRecords

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
EXPECTED = load_file(FOLDER / "outputs.safetensors")
# what computes in this release as it did in that one, said in arguments
FORMER: dict[str, Any] = {
    "pfeiffer": lambda **o: c.Pfeiffer(size=2, reads="output", **o),
    "adapter_plus": lambda **o: c.AdapterPlus(size=2, drop_path=0.0, reads="output", **o),
    "compacter_plus_plus": lambda **o: c.CompacterPlusPlus(n=2, size=2, reads="output", **o),
    "parallel": lambda **o: c.ParallelAdapter(size=2, scaling=1.0, reads="input", **o),
    "scaled_parallel": lambda **o: c.ScaledParallelAdapter(size=2, reads="input", **o),
    "mam": lambda **o: c.MAM(prefix_length=2, size=2, reads="input", **o),
    "unipelt": lambda **o: c.UniPELT(r=2, alpha=2, prefix_length=2, size=2, reads="output", **o),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placements")
    with tarfile.open(FOLDER / "saved.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def check(actual: Tensor, name: str, kind: str, tolerance: float = 1e-5) -> None:
    """Assert that the release's outputs are computed: every bit, where this machine computes every bit of the base."""
    expected = EXPECTED[name]
    if torch.equal(outputs(base(kind)), EXPECTED[f"base/{kind}"]):
        assert torch.equal(actual, expected), float((actual - expected).abs().max())
    else:
        assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_every_method_whose_place_changed_has_a_fixture() -> None:
    assert {name for name in EXPECTED if name.startswith("saved/")} == {f"saved/{name}" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_its_folders_compute_what_they_computed(name: str, saved: Path) -> None:
    kind = name.rpartition("-")[2]
    model = base(kind)
    load_adapter(model, saved / name)
    check(outputs(model), f"saved/{name}", kind)


@pytest.mark.parametrize("name", NAMES)
def test_its_checkpoints_compute_and_are_exported_as_they_were(name: str, saved: Path, tmp_path: Path) -> None:
    kind, path = name.rpartition("-")[2], saved / f"{name}.ckpt"
    check(outputs(load_from_checkpoint(Language, path)), f"saved/{name}", kind)
    export_checkpoint(path, tmp_path / "adapter")
    model = base(kind)
    load_adapter(model, tmp_path / "adapter")
    check(outputs(model), f"saved/{name}", kind)


@pytest.mark.parametrize("name", NAMES)
def test_its_trainings_go_on_where_they_stood_without_an_argument(name: str, saved: Path) -> None:
    method, _, kind = name.rpartition("-")
    module = Language(kind)
    fit(module, METHODS[method](), max_steps=END, ckpt_path=saved / f"{name}.ckpt")
    check(outputs(backbone(module)), f"resumed/{name}", kind, 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_its_trainings_go_on_with_the_place_named_and_from_a_folder(name: str, saved: Path) -> None:
    method, _, kind = name.rpartition("-")
    module = Language(kind)
    fit(module, FORMER[method](layers=[2]), max_steps=END, ckpt_path=saved / f"{name}.ckpt")
    check(outputs(backbone(module)), f"resumed/{name}", kind, 1e-3)
    module = Language(kind)
    callback = METHODS[method]()
    before = load_adapter(
        backbone(module), saved / name, None if (saved / name / "stack.json").exists() else callback.name
    )
    callback.apply(module)  # to the adapter that is there, as it is
    assert stack_of(backbone(module)).parts == before
    check(outputs(backbone(module)), f"saved/{name}", kind)


ELSEWHERE: dict[str, tuple[Any, str]] = {
    "pfeiffer-llama": (lambda: c.Pfeiffer(size=2, reads="stream", layers=[2]), "reads: 'output' != 'stream'"),
    "pfeiffer-bert": (lambda: c.Pfeiffer(size=2, reads="stream", layers=[2]), "reads: 'output' != 'stream'"),
    "compacter_plus_plus-bert": (
        lambda: c.CompacterPlusPlus(n=2, size=2, reads="stream", layers=[2]),
        "reads: 'output' != 'stream'",
    ),
    "scaled_parallel-llama": (
        lambda: c.ScaledParallelAdapter(size=2, reads="stream", layers=[2]),
        "reads: 'input' != 'stream'",
    ),
    "parallel-bert": (lambda: c.ParallelAdapter(size=2, scaling=4.0, layers=[2]), "alpha: 1.0 != 4.0"),
    "unipelt-llama": (lambda: c.UniPELT(r=2, alpha=1, prefix_length=2, size=2, layers=[2]), "alpha: 1.0 != 0.5"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_another_place_that_was_asked_for_is_one_sentence_that_names_it(name: str, saved: Path) -> None:
    make, difference = ELSEWHERE[name]
    with pytest.raises(AdapterError, match=rf"have other settings: {difference}\.$") as error:
        fit(Language(name.rpartition("-")[2]), make(), max_steps=END, ckpt_path=saved / f"{name}.ckpt")
    assert one_sentence(str(error.value))


def test_new_configurations_say_what_is_read() -> None:
    made = [make().make_configs(base(kind)) for make in METHODS.values() for kind in KINDS]
    bottlenecks = [config for configs in made for config in configs.values() if hasattr(config, "placement")]
    assert len(bottlenecks) == 16 and all(config.to_dict()["reads"] for config in bottlenecks)


@pytest.mark.parametrize(
    "name", ["Pfeiffer", "AdapterPlus", "ParallelAdapter", "ScaledParallelAdapter", "MAM", "UniPELT"]
)
def test_cells_of_its_rows_count_only_for_rows_that_compute_the_same(name: str) -> None:
    former: dict[str, Any] = {"reads": "input" if "arallel" in name or name == "MAM" else "output"}
    former |= {"scaling": 1.0} if name == "ParallelAdapter" else {"alpha": 2.0} if name == "UniPELT" else {}
    new, same = row(name), row(name, **former)
    written = {**same["init_args"]}
    del written["reads"]  # as the release wrote its rows
    assert depends_on({**same, "init_args": written}) == depends_on(same) != depends_on(new)


def row(name: str, **arguments: Any) -> dict[str, Any]:
    """The settings of a callback, as a plan has them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    given = {"class_path": f"lightning_peft.callbacks.{name}", "init_args": arguments}
    return parser.parse_object({"callback": given}).callback.as_dict()


def depends_on(settings: dict[str, Any]) -> Any:
    task: Any = SimpleNamespace(model="m", dtype="float32", settings=dict, depends_on=list)
    return QuestionRecords(task).depends_on([settings], 0, 0)
