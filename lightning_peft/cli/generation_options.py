"""Options that `generate` and `chat` share: what is talked to, and how it writes."""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.generation.adapted import AdaptedModel


def add_model_options(options: argparse.ArgumentParser) -> None:
    """Add what says which model is talked to."""
    options.add_argument(
        "adapter",
        help="a folder of an adapter or a stack, a checkpoint with adapters, or a whole model, such as a baked one",
    )
    options.add_argument(
        "--base", help="the base model: a folder, or its name on the hub; default: as the adapter says"
    )
    options.add_argument(
        "--scale",
        action="append",
        metavar="[NAME=]SCALE",
        help="the strength: 1 as saved, 0 off, negative reversed; NAME=2 is of one adapter of a stack, and may be "
        "repeated",
    )
    options.add_argument("--dtype", default="auto", help="to load the base in; auto is its own")
    options.add_argument("--quantize", choices=["nf4", "fp4", "int8"], help="keep the base in 4 or 8 bits")
    options.add_argument("--device", help="default: a GPU where there is one")
    options.add_argument("--backbone", help="which backbone's adapters, where a checkpoint's module had several")
    options.add_argument(
        "--no-strict-base",
        action="store_true",
        help="warn where the adapter was made for another base, instead of refusing it",
    )
    options.add_argument(
        "--trust",
        action="store_true",
        help="unpickle the checkpoint, which runs code in it; only if you trust its author",
    )


def add_decoding_options(options: argparse.ArgumentParser) -> None:
    """Add what says how texts are written."""
    options.add_argument("--max-new-tokens", type=int, default=256, help="of an answer, at most")
    options.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token each time; above, tokens are drawn"
    )
    options.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest with this probability")
    options.add_argument("--seed", type=int, default=0, help="of what is drawn")


def decoding_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Decoding` that were given, checked before anything is loaded."""
    from lightning_peft.generation.decoding import Decoding

    return vars(
        Decoding(
            max_new_tokens=parsed.max_new_tokens,
            temperature=parsed.temperature,
            top_p=parsed.top_p,
            seed=parsed.seed,
        )
    )


def load_model(parsed: argparse.Namespace, chat: bool) -> AdaptedModel:
    """Load what the options name, without what libraries say of themselves meanwhile."""
    scale = scales(parsed.scale or [])
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    from lightning_peft.generation.loading import load

    disable_progress_bar()
    return load(
        parsed.adapter,
        parsed.base,
        scale=scale,
        dtype=parsed.dtype,
        quantize=parsed.quantize,
        device=parsed.device,
        backbone=parsed.backbone,
        strict_base=not parsed.no_strict_base,
        trust=parsed.trust,
        chat=chat,
    )


def scales(given: list[str]) -> float | dict[str, float]:
    """Return the strength of all adapters, or of some by name.

    Raises:
        ValueError: one is no number, or some have a name and others have none.

    Example:
        >>> scales(["2"]), scales(["iti=0.5", "lora=-1"])
        (2.0, {'iti': 0.5, 'lora': -1.0})
    """
    named = {name: number(value) for name, _, value in (one.rpartition("=") for one in given)}
    if "" in named and (len(named) > 1 or len(given) > 1):
        raise ValueError(f"--scale {' '.join(given)}: give one number for all adapters, or NAME=SCALE for each.")
    return named.get("", 1.0) if not named or "" in named else named


def number(written: str) -> float:
    """Return a strength.

    Raises:
        ValueError: it is no finite number.
    """
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"The scale must be a number, 1 as saved and 0 off, got {written!r}.")
    return value
