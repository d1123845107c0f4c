"""`lightning-peft decompress`: a compressed adapter as a plain peft folder again."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.cli.arguments import one_sentence, parser


def main(args: list[str]) -> Path:
    """Decompress an adapter folder and return the new one."""
    options = parser("decompress", "Write a compressed adapter as a plain peft folder, for PeftModel.from_pretrained.")
    options.add_argument("adapter", help="a folder that `lightning-peft compress` wrote")
    options.add_argument("folder", help="where to write")
    options.add_argument("--no-verify", action="store_true", help="do not compare what was written with what is loaded")
    parsed = options.parse_args(args[1:])
    with one_sentence("decompress"):
        from lightning_peft.stack.adapter_files.compression import decompress_adapter

        folder = decompress_adapter(parsed.adapter, parsed.folder, verify=not parsed.no_verify)
        print(f"Wrote {folder}, {'not verified' if parsed.no_verify else 'verified bit for bit'}.")
    return folder
