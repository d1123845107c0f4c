"""`lightning-peft export`: a checkpoint's adapters as a plain peft folder, and adapters as plain LoRA."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_peft.cli.arguments import one_sentence, parser


def main(args: list[str]) -> Path:
    """Export a checkpoint, or a folder as plain LoRA, and return the folder."""
    options = parser(
        "export",
        "Write the adapters of a Lightning checkpoint as a plain peft folder; no model is built. With --as-lora they, "
        "or those of a folder, are written as plain LoRA, which servers load.",
    )
    options.add_argument(
        "source", help="a checkpoint written with a lightning_peft callback; with --as-lora a folder too"
    )
    options.add_argument("folder", help="where to write; adapter files there are replaced")
    options.add_argument("--backbone", help="which backbone's adapters, where the module had several")
    options.add_argument(
        "--trust",
        action="store_true",
        help="unpickle the checkpoint, which runs code in it; only if you trust its author",
    )
    options.add_argument(
        "--as-lora",
        action="store_true",
        help="write a LoRA of one scaling that computes the same, of adapters whose change is a product of low rank",
    )
    options.add_argument(
        "--base",
        help="with --as-lora, the model that the adapter was made for: read where PiSSA or OLoRA changed it; default: "
        "as the adapter says",
    )
    parsed = options.parse_args(args[1:])
    with one_sentence("export"), tempfile.TemporaryDirectory() as temporary:
        from lightning_peft.fitting.checkpoint_files import export_checkpoint, outside_backbones
        from lightning_peft.stack.adapter_files.as_lora import as_lora
        from lightning_peft.stack.adapter_files.folder import CONFIG, ORDER, WEIGHTS, adapter_folders

        source, folder = Path(parsed.source), Path(parsed.folder)
        saved = source.is_dir() and any((source / file).is_file() for file in (CONFIG, ORDER))
        if saved and not parsed.as_lora:
            raise ValueError(f"{source} is an adapter folder already: give --as-lora to write it as plain LoRA.")
        if not saved:
            target = Path(temporary, "adapter") if parsed.as_lora else folder
            exported = export_checkpoint(source, target, parsed.backbone, parsed.trust)
        if parsed.as_lora:
            try:
                as_lora(source if saved else exported, folder, parsed.base)
            except ValueError as error:  # which names the temporary folder
                raise ValueError(str(error).replace(str(Path(temporary, "adapter")), parsed.source)) from error
        for path in adapter_folders(folder):
            print(f"Wrote {path} ({(path / WEIGHTS).stat().st_size:,} bytes of weights).")
        if not saved and (left := outside_backbones(source, parsed.trust)):
            print(f"Not in it, being no adapter's: {', '.join(left)}.")
    return folder
