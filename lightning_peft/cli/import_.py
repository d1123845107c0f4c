"""`lightning-peft import`: an adapter that AdapterHub saved, as a peft folder."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.cli.arguments import one_sentence, parser


def main(args: list[str]) -> Path:
    """Import an adapter and return the new folder."""
    options = parser(
        "import",
        "Write an adapter that AdapterHub's save_adapter saved as a folder of this package; LoRA and IA3 become what "
        "plain peft reads.",
    )
    options.add_argument(
        "adapter", help="a folder with adapter_config.json and adapter.safetensors or pytorch_adapter.bin"
    )
    options.add_argument("folder", help="where to write; must be new or empty")
    options.add_argument("--base", required=True, help="the base model: a folder, or its name on the hub")
    options.add_argument(
        "--model-class", help="the class of transformers to adapt; default: the one that had the adapter, or the base's"
    )
    options.add_argument("--dtype", default="auto", help="to load the base in; auto is its own")
    options.add_argument(
        "--token-gates",
        action="store_true",
        help="import UniPELT's gates as gates of each token: AdapterHub's are means over all tokens of a row",
    )
    parsed = options.parse_args(args[1:])
    with one_sentence("import"):
        from lightning_peft.adapterhub.base import load_base_for
        from lightning_peft.adapterhub.importing import import_adapterhub
        from lightning_peft.stack.adapter_files.bases import check_new

        folder = Path(parsed.folder)
        check_new(folder)  # before the base is loaded
        if not Path(parsed.adapter).is_dir():
            raise FileNotFoundError(2, "", parsed.adapter)
        model = load_base_for(Path(parsed.adapter), parsed.base, parsed.model_class, parsed.dtype)
        imported = import_adapterhub(model, parsed.adapter, folder, parsed.token_gates)
        parts = ", ".join(f"{name} ({kind})" for name, kind in imported.parts.items())
        print(f"Wrote {folder}, for a {type(model).__name__}: {parts}.")
        for note in imported.notes:
            print(note)
    return folder
