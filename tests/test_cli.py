"""The command: LightningCLI's verbs from the recipes in `configs/`, and help that says what there is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft.callbacks import LoRA
from lightning_peft.cli import main

ROOT = Path(__file__).parents[1]


# of the benchmark's data; tests/test_docs_chat.py runs the one of chats
RECIPES = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "TruthfulQA" in path.read_text()]
SMALLER: dict[str, dict[str, object]] = {  # what a recipe asks for that a tiny model of three blocks has not
    "adalora": {"tinit": 0, "tfinal": 0},
    "diff_pruning": {"gate_epochs": None, "gate_steps": 1},
    "head_gains": {"init_from": None},  # the edit it trains is another recipe's
    "iti": {"num_heads": 3},
    "iti_reference": {"num_heads": 3},
    "lofit": {"select_steps": 1},
    "lora_dash": {"warmup_steps": 1},
    "lottery": {"round_steps": 1},
    "lt_sft": {"full_epochs": None, "full_steps": 1},
    "mam": {"size": 4},
    "memit": {"layers": [0, 1], "numbers": [0, 1]},
    "p_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "rome": {"layer": 1},
    "sara": {"rank_min_dim": 8},
    "strata": {"boundaries": [1, 2]},
    "trunk_cache": {"layers": [1, 2]},
}

EPOCHS = {  # those that train in phases, or prune
    "adalora": 2,
    "diff_pruning": 3,
    "lofit": 3,
    "lora_dash": 2,
    "lottery": 4,
    "lt_sft": 3,
    "sara": 2,
}


def arguments(recipe: Path, model: Path, folder: Path) -> list[str]:
    """A recipe on a tiny model and few questions."""
    config = yaml.safe_load(recipe.read_text())
    first = config["trainer"]["callbacks"][0]
    first["init_args"] = (first.get("init_args") or {}) | SMALLER.get(recipe.stem, {})
    smaller = folder / recipe.name
    smaller.write_text(yaml.safe_dump(config))
    return [
        "--config",
        str(smaller),
        f"--model.init_args.pretrained={model}",
        "--data.init_args.limit=12",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_fit_then_test_from_the_checkpoint(
    recipe: Path,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = arguments(recipe, tiny_folder("llama"), tmp_path)
    main(["fit", *options, f"--trainer.max_epochs={EPOCHS.get(recipe.stem, 1)}"])
    (path,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    (described,) = saved["lightning_peft"]["backbones"].values()
    adapter = {f"backbone.{name}" for part in described["parts"] for name in part["keys"].values()}
    assert saved["state_dict"].keys() == adapter, "only the adapter is saved"
    capsys.readouterr()
    main(["test", *options, f"--ckpt_path={path}"])
    printed = capsys.readouterr().out
    assert all(metric in printed for metric in ("mc0", "mc1", "mc2", "mc3"))


def test_print_config_is_readable(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *arguments(ROOT / "configs" / "lora.yaml", tiny_folder("llama"), tmp_path), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    lora = printed["trainer"]["callbacks"][0]
    assert lora["class_path"].endswith("LoRA") and lora["init_args"]["r"] == 8
    own = set(inspect.signature(LoRA).parameters)
    assert set(lora["init_args"]) <= own, "peft's internal fields do not show"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("fit", "validate", "test", "predict", "compare"))


@pytest.mark.parametrize("plan", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_plan_parses_and_can_be_run_to_its_end(plan: Path) -> None:
    from jsonargparse import ArgumentParser

    from lightning_peft.compare.plan import Plan, check

    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Plan, as_positional=False)
    values = parser.instantiate(parser.parse_args(["--config", str(plan)])).as_dict()
    values.pop("config")
    check(Plan(**values))
