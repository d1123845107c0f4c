"""`lightning-peft export`: a checkpoint's adapters as a plain peft folder."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.cli.arguments import one_sentence, parser


def main(args: list[str]) -> Path:
    """Export a checkpoint and return the folder."""
    options = parser(
        "export", "Write the adapters of a Lightning checkpoint as a plain peft folder; no model is built."
    )
    options.add_argument("checkpoint", help="a checkpoint written with a lightning_peft callback")
    options.add_argument("folder", help="where to write; adapter files there are replaced")
    options.add_argument("--backbone", help="which backbone's adapters, where the module had several")
    options.add_argument(
        "--trust",
        action="store_true",
        help="unpickle the checkpoint, which runs code in it; only if you trust its author",
    )
    parsed = options.parse_args(args[1:])
    with one_sentence("export"):
        from lightning_peft.fitting.checkpoint_files import export_checkpoint, outside_backbones
        from lightning_peft.stack.adapter_files.folder import WEIGHTS, adapter_folders

        folder = export_checkpoint(parsed.checkpoint, parsed.folder, parsed.backbone, parsed.trust)
        for path in adapter_folders(folder):
            print(f"Wrote {path} ({(path / WEIGHTS).stat().st_size:,} bytes of weights).")
        if left := outside_backbones(parsed.checkpoint, parsed.trust):
            print(f"Not in it, being no adapter's: {', '.join(left)}.")
    return folder
