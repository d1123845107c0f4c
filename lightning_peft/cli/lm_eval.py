"""`lightning-peft lm-eval`: any saved folder in lm-evaluation-harness, with the harness's own tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_peft.cli.arguments import one_sentence, parser


def main(args: list[str]) -> None:
    """Hand a folder and all further options to the harness's own command."""
    options = parser(
        "lm-eval",
        "Evaluate an adapter, a stack of them or a whole model in lm-evaluation-harness. Further options are the "
        "harness's own (lm_eval run --help lists them): --tasks, --num_fewshot, --batch_size, --include_path, …",
    )
    options.allow_abbrev = False  # else the harness's would be taken for these
    options.add_argument("folder", help="of an edit, a tuned adapter or a stack; or a model's, such as a baked one")
    options.add_argument(
        "--base", help="the base model: a folder, or its name on the hub; default: as the adapter says"
    )
    options.add_argument("--scale", type=float, help="the adapter's strength: 1 as saved, 0 off")
    options.add_argument("--positions", help="the tokens that an edit acts on; default: as saved")
    parsed, others = options.parse_known_args(args[1:])
    with one_sentence("lm-eval"):
        if any(option.partition("=")[0] in ("--model", "-M") for option in others):
            raise ValueError("--model is set by this command: leave it out, or call lm_eval itself.")
        try:
            from lightning_peft.harness import NAME
        except ImportError as error:
            if error.name != "lm_eval":
                raise
            raise ValueError(str(error)) from error
        model = _model_arguments(Path(parsed.folder), parsed.base, parsed.scale, parsed.positions)
        if "adapter" in model and not any("strict_base" in other for other in others):
            _check_base(Path(parsed.folder), model["pretrained"])
        from lm_eval.__main__ import cli_evaluate

        with _command_line("lm-eval", *others, "--model", NAME, "--model_args", json.dumps(model)):
            cli_evaluate()


def _model_arguments(folder: Path, base: str | None, scale: float | None, positions: str | None) -> dict[str, Any]:
    """Return the arguments of the model type, after checking them, since the harness reads its tasks first."""
    from lightning_peft.harness.adapters import choose, is_model

    if not folder.is_dir():
        raise FileNotFoundError(2, "", str(folder))
    if not is_model(folder):
        chosen = choose(base, folder, None, 1.0 if scale is None else scale, positions)
        model = {"pretrained": chosen.base, "adapter": str(folder), "scale": chosen.scale, "positions": positions}
        return {name: value for name, value in model.items() if value is not None}
    given = {"--base": base, "--scale": scale, "--positions": positions}
    if useless := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{folder} is a whole model and no adapter: leave {useless[0]} out.")
    return {"pretrained": str(folder)}


def _check_base(adapter: Path, base: str) -> None:
    """Raise `AdapterError` where an adapter is for another base, by the shapes of its weights, before any is loaded."""
    from lightning_peft.stack.adapter_files.bases import base_config, fitting_class
    from lightning_peft.stack.adapter_files.typed_values import AdapterError

    try:
        config = base_config(adapter, base)
        if getattr(config, "quantization_config", None) is None:  # else there are no shapes without its weights
            fitting_class(adapter, base, config)
    except AdapterError:
        raise
    except ValueError:
        pass  # such as a model of code of its own, which the harness loads by options of its own


@contextmanager
def _command_line(*arguments: str) -> Iterator[None]:
    """Let the harness, which reads the process's own, see these arguments."""
    before, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = before
