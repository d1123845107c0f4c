"""The files and commands of docs/data.md are run as the page says, with a tiny model in the recipes."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft.cli import main
from lightning_peft.data import read_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMANDS = [
    command.replace("\\\n", " ")
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for command in re.split(r"\n(?=lightning-peft)", block.strip())
]
FIT = [command for command in COMMANDS if command.startswith("lightning-peft fit")]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]) -> Path:
    """A folder with the page's files and with recipes for a tiny model, in which commands are given."""
    for title, text in re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE):
        (tmp_path / title).write_text(text.replace(MODEL, str(tiny_folder("llama"))), encoding="utf-8")
    (tmp_path / "configs").mkdir()
    for name in ("iti", "caa", "repe", "lora"):
        recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        recipe["model"]["init_args"]["pretrained"] = str(tiny_folder("llama"))
        quiet = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "default_root_dir": str(tmp_path / name)}
        recipe["trainer"] |= quiet | {"enable_progress_bar": False, "enable_model_summary": False}
        if name == "iti":
            recipe["trainer"]["callbacks"][0]["init_args"]["num_heads"] = 3
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def run(command: str) -> None:
    with redirect_stdout(io.StringIO()):
        main(shlex.split(command)[1:])


def test_the_page_has_ten_lines_of_each_kind() -> None:
    files = dict(re.findall(r'^```(?:json|csv) title="(.+?)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE))
    lines = {name: len(text.strip().split("\n")) - name.endswith(".csv") for name, text in files.items()}
    assert lines == dict.fromkeys(("my.jsonl", "pairs.jsonl", "questions.csv", "reviews.csv"), 10)


@pytest.mark.parametrize(
    "command", FIT, ids=lambda command: "-".join(re.findall(r"configs/(\w+)|--data (\w+)", command)[0])
)
def test_the_commands_fit(folder: Path, command: str) -> None:
    run(command)
    (path,) = folder.rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    trained = [tensor for name, tensor in saved["state_dict"].items() if "lora_B" in name or "offsets" in name]
    assert trained and any(bool(tensor.any()) for tensor in trained), "something was learnt or computed"


def test_the_behaviour_set_is_compared(folder: Path) -> None:
    sys.path.insert(0, "")  # as the script of a shell has it
    (command,) = [command for command in COMMANDS if command.startswith("lightning-peft compare")]
    run(f"{command} --accelerator cpu")
    results = json.loads((folder / "runs" / "ab" / "results.json").read_text())
    base, caa = results["rows"]
    assert results["data"]["units"] == 40 and not caa["failed"] and 0 <= base["metrics"]["right"]["mean"] <= 1
    sys.modules.pop("ab_task", None)


@pytest.mark.parametrize(
    ("line", "options", "sentence"),
    [
        (
            '{"text": "a", "label": "maybe"}',
            "",
            r"my\.jsonl, row 11: 'label' is 'maybe', but must be 1, true or yes for",
        ),
        ("", "--data.path mine.jsonl", r"mine\.jsonl does not exist; beside it: my\.jsonl, "),
    ],
)
def test_a_file_that_cannot_be_used_ends_the_command_in_one_sentence(
    folder: Path, line: str, options: str, sentence: str
) -> None:
    with Path("my.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(SystemExit, match=rf"^lightning-peft fit: {sentence}") as raised:
        run(f"{FIT[0]} {options}")
    assert "\n" not in str(raised.value)


def test_the_pages_python_runs(folder: Path) -> None:
    names: dict[str, object] = {"__name__": "data.md"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(block, "data.md", "exec"), names)
    assert names["first"] == read_rows("package:certainty")[0]
    (folder / "papers.csv").write_text("title,abstract\nOn ants,They walk.\nOn bees,They fly.\n")
    titles = names["Titles"]("papers.csv", str(folder.parent), val_fraction=0.0)  # type: ignore[operator]
    titles.prepare_data()
    assert len(titles.rows) == 2
