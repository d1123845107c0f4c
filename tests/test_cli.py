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


def arguments(recipe: str, model: Path, folder: Path) -> list[str]:
    """A recipe on a tiny model and few questions."""
    return [
        "--config",
        str(ROOT / "configs" / recipe),
        f"--model.init_args.pretrained={model}",
        "--data.init_args.limit=12",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
    ]


@pytest.mark.parametrize(("recipe", "kept"), [("lora.yaml", "lora_"), ("iti.yaml", "head_offsets")])
def test_fit_then_test_from_the_checkpoint(
    recipe: str,
    kept: str,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = arguments(recipe, tiny_folder("llama"), tmp_path)
    if recipe == "iti.yaml":  # the tiny model has 12 heads, and no option reaches into a list of callbacks
        config = yaml.safe_load(Path(options[1]).read_text())
        config["trainer"]["callbacks"][0]["init_args"]["num_heads"] = 3
        options[1] = str(tmp_path / recipe)
        Path(options[1]).write_text(yaml.safe_dump(config))
    main(["fit", *options, "--trainer.max_epochs=1"])
    (path,) = tmp_path.rglob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state and all(kept in name for name in state), "only the adapter is saved"
    capsys.readouterr()
    main(["test", *options, f"--ckpt_path={path}"])
    printed = capsys.readouterr().out
    assert all(metric in printed for metric in ("mc0", "mc1", "mc2", "mc3"))


def test_print_config_is_readable(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *arguments("lora.yaml", tiny_folder("llama"), tmp_path), "--print_config"])
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
