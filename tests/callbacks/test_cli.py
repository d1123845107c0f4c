"""The callbacks under LightningCLI: configured by YAML or the command line, with its own `--optimizer`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from tuning import QUIET, Classifier, base_weights, moved, points, python, weights

from lightning_peft import adapters
from lightning_peft.callbacks import LoRA as LoRACallback

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Tiny(Classifier):
    """A user's module that brings its training data."""

    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> Any:
        return points()


LORA = """
    - class_path: lightning_peft.callbacks.LoRA
      init_args: {r: 2, alpha: 4, backbone: net, layers: [0, 2], target_modules: [linear]}
"""
PEFT = """
    - class_path: lightning_peft.callbacks.PEFT
      init_args:
        backbone: net
        config:
          class_path: peft.LoraConfig
          init_args: {r: 2, target_modules: [linear], use_rslora: true}
"""


def cli(tmp_path: Path, callbacks: str, *arguments: str, run: bool = True) -> LightningCLI:
    """LightningCLI as a user writes it, with one YAML file and further arguments."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  accelerator: cpu\n  devices: 1\n  max_steps: 3\n  logger: false\n  enable_checkpointing: false\n"
        f"  enable_progress_bar: false\n  enable_model_summary: false\n  callbacks:{callbacks}"
    )
    command = ["fit"] if run else []
    args = [*command, "--config", str(config), *arguments]
    return LightningCLI(Tiny, args=args, run=run, save_config_callback=None, seed_everything_default=5)


@pytest.mark.parametrize(("callback", "name"), [(LORA, "lora"), (PEFT, "default")])
def test_a_callback_in_yaml_is_built_and_trains(tmp_path: Path, callback: str, name: str) -> None:
    made = cli(tmp_path, callback, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1")
    config = adapters(made.model)[name].config
    assert config.r == 2 and type(config).__name__ == "LoraConfig"
    assert config.use_rslora is (name == "default")
    trained = {n for n, value in weights(made.model).items() if "lora_B" in n and value.any()}
    assert len(trained) == (2 if name == "lora" else 3)


@pytest.mark.parametrize("scheduler", [[], ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]])
def test_the_clis_own_optimizer_trains_the_adapter_and_the_head(tmp_path: Path, scheduler: list[str]) -> None:
    optimizer = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01", "--optimizer.weight_decay=0.1"]
    made = cli(tmp_path, LORA, *optimizer, *scheduler)
    assert moved(base_weights(Tiny()), base_weights(made.model)) == {"head.weight", "head.bias"}
    assert all(value.any() for name, value in weights(made.model).items() if "lora_B" in name)
    (group,) = made.trainer.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in made.model.parameters() if p.requires_grad}
    assert group["weight_decay"] == 0.1


def test_a_callback_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    given = ["--trainer.callbacks+=lightning_peft.callbacks.PEFT", "--trainer.callbacks.backbone=net"]
    given += ["--trainer.callbacks.config=peft.IA3Config", "--trainer.callbacks.config.target_modules=[linear]"]
    given += ["--trainer.callbacks.config.feedforward_modules=[]"]
    made = cli(tmp_path, " []\n", *given, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1")
    assert type(adapters(made.model)["default"].config).__name__ == "IA3Config"


def test_an_argument_in_yaml_can_be_overridden(tmp_path: Path) -> None:
    made = cli(tmp_path, LORA, "--trainer.callbacks.r=3", run=False)
    assert made.trainer.callbacks[0].r == 3


@pytest.mark.parametrize("bad", ["rank: 3", "r: many", "variant: qlora", "layers: [first]"])
def test_a_wrong_argument_is_refused_by_name(tmp_path: Path, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(tmp_path, f"\n    - class_path: lightning_peft.callbacks.LoRA\n      init_args: {{{bad}}}\n", run=False)
    assert bad.split(":")[0] in capsys.readouterr().err


PRINT = """
import sys
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

LightningCLI(BoringModel, args=["fit", *sys.argv[1:]], save_config_callback=None)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What `--print_config` prints in a new process that has imported nothing else."""
    arguments = ["--trainer.callbacks+=lightning_peft.callbacks.LoRA", "--optimizer=AdamW", "--print_config"]
    return yaml.safe_load(python(PRINT, *arguments))


def test_print_config_is_readable_and_can_be_read_back(tmp_path: Path, printed: dict[str, Any]) -> None:
    (callback,) = printed["trainer"]["callbacks"]
    defaults = {name: parameter.default for name, parameter in inspect.signature(LoRACallback).parameters.items()}
    del defaults["options"]  # what they hold has a default of its own
    assert callback == {"class_path": "lightning_peft.callbacks.LoRA", "init_args": defaults}
    assert defaults["r"] == 8 and "peft_type" not in defaults
    made = cli(tmp_path, f" {json.dumps([callback])}\n", run=False)
    assert made.trainer.callbacks[0].r == 8


def test_lora_leaves_optimizers_their_short_names(printed: dict[str, Any]) -> None:
    """Importing peft would bring in bitsandbytes, whose AdamW makes the name ambiguous."""
    assert printed["optimizer"]["class_path"] == "torch.optim.AdamW"


def test_the_configuration_saved_by_the_cli_is_what_was_given(tmp_path: Path) -> None:
    made = cli(tmp_path, PEFT, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1")
    saved = yaml.safe_load(made.parser.dump(made.config, skip_none=False))["fit"]["trainer"]["callbacks"][0]
    assert saved["init_args"]["config"]["init_args"]["target_modules"] == ["linear"]
    assert isinstance(made.trainer.optimizers[0], torch.optim.SGD)
