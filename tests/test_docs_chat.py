"""The files, commands and code of docs/chat.md are run as the page says, with a tiny chat model."""

from __future__ import annotations

import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from chat_templates import chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.cli import main
from lightning_peft.data import read_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMANDS = re.findall(r"^lightning-peft fit --config configs/\w+\.yaml --data.*$", PAGE, re.MULTILINE)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny chat model's folder."""
    folder, tokenizer = tmp_path_factory.mktemp("chat"), chat_tokenizer("chatml")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> Path:
    """A folder with the page's files and with recipes for the tiny model, in which commands are given."""
    for title, text in re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE):
        (tmp_path / title).write_text(text, encoding="utf-8")
    (tmp_path / "configs").mkdir()
    for name in ("chat_lora", "lora"):
        recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        recipe["model"]["init_args"]["pretrained"] = model
        quiet = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "default_root_dir": str(tmp_path / name)}
        recipe["trainer"] |= quiet | {"enable_progress_bar": False, "enable_model_summary": False}
        (tmp_path / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def test_the_page_has_files_of_ten_lines(folder: Path) -> None:
    assert {name: len(read_rows(folder / name)) for name in ("chats.jsonl", "texts.csv")} == {
        "chats.jsonl": 10,
        "texts.csv": 10,
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_tune(folder: Path, command: str) -> None:
    with redirect_stdout(io.StringIO()):
        main(shlex.split(command)[1:])
    assert list(folder.rglob("*.ckpt"))


def test_its_code_says_what_the_page_says(model: str) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(block.replace(MODEL, model), "chat.md", "exec"), names)
    assert str(names["learnt"]).startswith("Aye.") and str(names["learnt"]).endswith("Fair winds!<|im_end|>")
    assert str(names["asked"]).endswith("<|im_start|>assistant\n") and len(names["prompts"]) == 10  # type: ignore[arg-type]
    (iron, asked), (wood, same) = names["choices"]  # type: ignore[misc]
    assert asked == same < min(iron, wood)
