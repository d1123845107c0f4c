"""`lightning-peft plan`: what fit would train, and the memory it would take; nothing is allocated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_peft.backbone.shapes import shapes_only
from lightning_peft.cli.arguments import first_error, one_sentence, why_not_made
from lightning_peft.cli.verbs import OPTIONS

if TYPE_CHECKING:
    from lightning_peft.planning.estimate import Plan

_HELP = """usage: lightning-peft plan --config X.yaml [--batch_size 1] [--length 512] [--json] [options of fit]

Takes what `lightning-peft fit` takes and says what would be trained, where the adapters go, and the bytes of weights,
gradients, optimizer state, checkpoint and activations. The module is made on the meta device: of a transformers model
only config.json is read, from its folder or from the hub; no weights are downloaded and nothing is allocated. The data
and the Trainer are not made.

  --batch_size   rows of a batch, for the bound on activations
  --length       tokens of a row
  --json         print JSON instead of a table

`lightning-peft fit --help` lists the other options.
"""


def main(args: list[str]) -> Plan | None:
    """Print the plan of a recipe and return it."""
    if "-h" in args or "--help" in args:
        print(_HELP, end="")
        return None
    with one_sentence("plan"):
        built = _OnMeta(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=None,
            args=["fit", *args[1:]],
            **OPTIONS,
        )
        planned = built.plan()
        print(json.dumps(planned.as_dict(), indent=2)) if built.as_json else _print(planned)
    return planned


class _OnMeta(LightningCLI):
    """Build the module and the callbacks of a recipe without values, and nothing else of it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--batch_size", type=int, default=1)
        parser.add_argument("--length", type=int, default=512)
        parser.add_argument("--json", action="store_true")

    def instantiate_classes(self) -> None:
        config = self.config.clone()
        fit, trainer = config["fit"], config["fit"]["trainer"]
        self.as_json: bool = fit["json"]
        self.shape = fit["batch_size"], fit["length"]
        self.precision = str(trainer["precision"] or "32-true")
        if min(self.shape) < 1:
            raise ValueError(f"--batch_size and --length must be at least 1, got {self.shape[0]} and {self.shape[1]}.")
        fit["data"] = None
        # what these make may open files, devices or processes
        for name in ("logger", "profiler", "plugins", "strategy", "accelerator"):
            trainer[name] = None
        with shapes_only():
            try:
                self.config_init = self.parser.instantiate_classes(config)
            except (ValueError, RuntimeError) as error:
                raise ValueError(_why_not_made(error)) from error
            self.model = self._get(self.config_init, "model")
            self._add_configure_optimizers_method_to_model(self.subcommand)
        callbacks: Any = self._get(self.config_init, "trainer")["callbacks"]
        self.callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        self.trainer = None  # type: ignore[assignment]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def plan(self) -> Plan:
        """Return the plan of what was built."""
        from lightning_peft.models import CausalLM, Seq2SeqLM, SequenceClassifier
        from lightning_peft.planning.estimate import plan

        whole = isinstance(self.model, CausalLM | Seq2SeqLM | SequenceClassifier)
        if self.precision == "bf16-true":
            self.model.bfloat16()
        elif self.precision == "16-true":
            self.model.half()
        return plan(self.model, self.callbacks, *self.shape, precision=self.precision, whole_batch=whole)


def _why_not_made(error: BaseException) -> str:
    """Return in one sentence why the module could not be made."""
    message = why_not_made(error)
    if isinstance(first_error(error), RuntimeError):  # torch's, of a tensor without values
        return f"The module cannot be planned, for it reads values while it is made ({message.rstrip('.')})."
    return message


def _print(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    adapters = Table(title=f"Adapters on {plan.backbone}", title_justify="left")
    for column in ("adapter", "method", "injected into", "parameters"):
        adapters.add_column(column, justify="right" if column == "parameters" else "left")
    for adapter in plan.adapters:
        where = ", ".join(f"{count} × {name}" for name, count in adapter.modules.items())
        adapters.add_row(adapter.name, adapter.method, where, f"{adapter.parameters:,}")
    console.print(adapters)
    rows, length = plan.batch
    sizes = Table(title="Bytes", title_justify="left")
    sizes.add_column("of")
    sizes.add_column("bytes", justify="right")
    for name, size in (
        ("frozen weights", plan.frozen_bytes),
        ("trained weights", plan.trainable_bytes),
        ("gradients", plan.gradient_bytes),
        (f"optimizer state ({plan.optimizer})", plan.optimizer_bytes),
        (f"activations kept for backward, at most ({rows} × {length})", plan.activation_bytes),
        ("these together", plan.total_bytes),
        ("checkpoint", plan.checkpoint_bytes),
        ("checkpoint, weights only", plan.weights_only_bytes),
    ):
        sizes.add_row(name, "unknown" if size is None else f"{size:,}")
    console.print(sizes)
    share = f"{plan.trainable:,} of {plan.parameters:,} parameters are trained ({plan.trainable_percent:.3f} %)"
    print(f"{share}, {plan.outside:,} of them outside the backbone." if plan.outside else f"{share}.")
    for note in plan.notes:
        print(note)
