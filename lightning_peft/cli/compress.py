"""`lightning-peft compress`: an adapter in a fraction of a bit to two bits a parameter (ComPEFT)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.cli.arguments import one_sentence, parser

if TYPE_CHECKING:
    from lightning_peft.cli.validation import Scorer
    from lightning_peft.stack.adapter_files.compression import Compression

GRID = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # the paper's range


def main(args: list[str]) -> list[Compression]:
    """Compress an adapter folder, print what came of it, and return the numbers of each adapter."""
    options = parser(
        "compress",
        "Keep the largest changes of an adapter as signs with one scale (ComPEFT, arXiv:2311.13171). "
        "lightning_peft.load_adapter reads the result; `lightning-peft decompress` makes a plain peft folder of it.",
    )
    options.add_argument("adapter", help="a folder of adapters")
    options.add_argument("folder", help="where to write")
    options.add_argument("--density", type=float, default=0.1, help="share of the parameters to keep")
    options.add_argument(
        "--alpha",
        default="1",
        help="strength in standard deviations, or auto: the best on validation data, by --config",
    )
    options.add_argument(
        "--std",
        choices=("all", "kept"),
        default="all",
        help="standard deviation of all changes (the paper's and its code's), or with those that are not kept as zeros",
    )
    options.add_argument(
        "--scope", choices=("adapter", "tensor"), default="adapter", help="threshold and scale over what"
    )
    options.add_argument("--initial", help="the adapter before training; without it LoRA's A is taken for its change")
    options.add_argument("--config", help="the YAML that fit was given: its module and validation data give scores")
    options.add_argument("--monitor", default="val_loss", help="the validation metric")
    options.add_argument("--mode", choices=("min", "max"), default="min", help="whether less or more of it is better")
    parsed = options.parse_args(args[1:])
    with one_sentence("compress"):
        from lightning_peft.stack.adapter_files.compression import compress_adapter

        alpha = _alpha(parsed.alpha, parsed.config is not None)

        def compress(to: str | Path, alpha: float) -> list[Compression]:
            return compress_adapter(parsed.adapter, to, parsed.density, alpha, parsed.std, parsed.initial, parsed.scope)

        if parsed.config is None:
            results = compress(parsed.folder, 1.0 if alpha is None else alpha)
            _print(results)
            return results
        from lightning_peft.cli.validation import Scorer
        from lightning_peft.files.atomic import scratch_folder

        with scratch_folder(parsed.folder) as trial:  # beside it, so that paths relative to it are as long
            # compressed first, so that an adapter that cannot be is refused before anything is loaded
            compress(trial, 1.0 if alpha is None else alpha)
            scorer = Scorer(parsed.config, parsed.monitor)
            before = scorer.score(parsed.adapter)
            if alpha is None:
                alpha = _best(scorer, trial, 1 if parsed.mode == "max" else -1)
        results = compress(parsed.folder, alpha)
        after = scorer.score(parsed.folder)
        _print(results)
        print(f"{parsed.monitor}: {before:.6g} before, {after:.6g} after ({after - before:+.6g}), at alpha {alpha:g}.")
        return results


def _best(scorer: Scorer, trial: Path, sign: int) -> float:
    """Return the alpha with the best score; of equal ones the smallest."""
    scores = {}
    for alpha in GRID:
        scores[alpha] = scorer.score(trial, scale=alpha)
        print(f"alpha {alpha:g}: {scorer.monitor} {scores[alpha]:.6g}")
    return max(GRID, key=lambda alpha: (sign * scores[alpha], -alpha))


def _alpha(text: str, has_config: bool) -> float | None:
    """Return the number that was given, or None for `auto`."""
    if text == "auto":
        if not has_config:
            raise ValueError("--alpha auto needs validation data to choose by: give --config, or a number.")
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--alpha must be a number or auto, got {text!r}.") from None


def _print(results: list[Compression]) -> None:
    for each in results:
        print(
            f"{each.parameters:,} parameters, {each.kept:,} kept ({each.kept / each.parameters:.4%}), "
            f"scale {each.scale:.6g}\n"
            f"{each.before:,} bytes before, {each.after:,} after: {each.before / each.after:.1f} times smaller; "
            f"places and signs take {each.coded:,} bytes, {each.coded / each.bound:.3f} times the entropy bound."
        )
        if each.dense:
            print(f"{each.dense:,} numbers that are not the method's own were kept as they are.")
        if each.raw:
            print(
                f"The start of {len(each.raw)} tensors is not known (the first is {each.raw[0]}): they were "
                "compressed as they are, not what training changed in them; --initial gives their start."
            )
        if each.empty:
            print(
                f"Nothing was kept of {len(each.empty)} tensors, the first is {each.empty[0]}; --scope tensor or a "
                "larger --density keeps some of each."
            )
