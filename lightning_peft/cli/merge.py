"""`lightning-peft merge`: adapters written into their base, as a plain transformers folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_peft.cli.arguments import one_sentence, parser


def main(args: list[str]) -> Path:
    """Merge an adapter folder, or a checkpoint's adapters, and return the folder."""
    options = parser("merge", "Write adapters into their base: a transformers folder that loads without this package.")
    options.add_argument("adapter", help="a folder of adapters, or a checkpoint written with a lightning_peft callback")
    options.add_argument("folder", help="where to write; must be new or empty")
    options.add_argument(
        "--base", help="the base model: a folder, or its name on the hub; default: as the adapter says"
    )
    options.add_argument("--dtype", default="auto", help="to merge and save in; auto is the base's own")
    options.add_argument("--backbone", help="which backbone's adapters, where a checkpoint's module had several")
    options.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare what was written with the adapted base, for a model too large to be run here in float32",
    )
    options.add_argument(
        "--trust",
        action="store_true",
        help="unpickle the checkpoint, which runs code in it; only if you trust its author",
    )
    options.add_argument(
        "--no-strict-base",
        action="store_true",
        help="take another base than the adapter was made for, such as one with a token more or tuned further, with a "
        "warning",
    )
    parsed = options.parse_args(args[1:])
    with one_sentence("merge"), tempfile.TemporaryDirectory() as temporary:
        from lightning_peft.fitting.checkpoint_files import export_checkpoint, outside_backbones
        from lightning_peft.stack.adapter_files.merging import merge_pretrained

        source, left = Path(parsed.adapter), []
        if source.is_file():
            left = outside_backbones(source, parsed.trust)
            source = export_checkpoint(source, Path(temporary, "adapter"), parsed.backbone, parsed.trust)
        elif not source.is_dir():
            raise FileNotFoundError(2, "", str(source))
        try:
            checks = {"verify": not parsed.no_verify, "strict_base": not parsed.no_strict_base}
            merged = merge_pretrained(source, parsed.folder, parsed.base, parsed.dtype, **checks)
        except ValueError as error:  # which names the temporary folder
            raise ValueError(str(error).replace(str(source), parsed.adapter)) from error
        print(f"Wrote {parsed.folder}, a {merged.cls} that transformers loads by itself.")
        print(f"{merged.verification or 'Not verified'}.")
        if merged.untied:
            print(f"No longer one weight, since the adapter changed one alone: {', '.join(merged.untied)}.")
        if left:
            print(f"Not in it, standing outside the model: {', '.join(left)}.")
    return Path(parsed.folder)
