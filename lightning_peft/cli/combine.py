"""`lightning-peft combine`: adapters added, negated, interpolated and merged into one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from lightning_peft.cli.arguments import one_sentence, parser


def main(args: list[str]) -> Path:
    """Combine adapter folders, or fine-tuned checkpoints of one base, and return the folder."""
    options = parser(
        "combine",
        "Task arithmetic (arXiv:2212.04089) on adapters of one kind and one base, and on fine-tuned models: --weights "
        "1 1 adds, -1 negates, 0.3 0.7 interpolates; TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) merge.",
    )
    options.add_argument("adapters", nargs="+", help="folders of adapters, or with --base of transformers models")
    options.add_argument("folder", help="where to write")
    options.add_argument("--weights", nargs="+", type=float, help="one for each adapter; default: 1 each")
    options.add_argument("--method", choices=("sum", "ties", "dare", "dare_ties"), default="sum", help="how to merge")
    options.add_argument("--density", type=float, default=0.2, help="share of the entries that TIES and DARE keep")
    options.add_argument("--rank", type=int, help="of the LoRA that comes out; default: the sum's own, or the largest")
    options.add_argument("--seed", type=int, default=0, help="of what DARE drops")
    options.add_argument("--base", help="the model that fine-tuned models came from: their difference to it is taken")
    parsed = options.parse_args(args[1:])
    with one_sentence("combine"), tempfile.TemporaryDirectory() as temporary:
        from lightning_peft.editing.arithmetic import combine
        from lightning_peft.stack.adapter_files.folder import CONFIG, NOTES

        if len(parsed.weights or parsed.adapters) != len(parsed.adapters):
            raise ValueError(f"--weights needs one number for each of the {len(parsed.adapters)} adapters.")
        places = []  # where each is read
        for i, path in enumerate(map(Path, parsed.adapters)):
            if not path.is_dir():
                raise FileNotFoundError(2, "", str(path))
            if (path / "config.json").is_file() and not (path / CONFIG).is_file():
                path = _difference(path, parsed.base, Path(temporary, str(i)))
            places.append(path)
        try:
            combine(places, parsed.folder, parsed.weights, parsed.method, parsed.density, parsed.rank, parsed.seed)
        except ValueError as error:  # which names the temporary folders
            message = str(error)
            for place, shown in zip(places, parsed.adapters, strict=True):
                message = message.replace(str(place), shown)
            raise ValueError(message) from error
        record = json.loads(Path(parsed.folder, NOTES).read_text())["record"]
        terms = [f"{w:g} x {adapter}" for w, adapter in zip(record["weights"], parsed.adapters, strict=True)]
        print(f"Wrote {parsed.folder}: {' and '.join(terms)}.")
        if "kept_squared_norm" in record:
            print(f"Cutting it to its rank kept {record['kept_squared_norm']:.2%} of its squared norm.")
    return Path(parsed.folder)


def _difference(tuned: Path, base: str | None, folder: Path) -> Path:
    """Write the adapter that makes the base a fine-tuned model, and return its folder."""
    from lightning_peft.editing.differences import checkpoint_difference

    if base is None:
        raise ValueError(f"{tuned} is a model, not an adapter: name the one it was tuned from with --base.")
    return checkpoint_difference(tuned, base, folder)
