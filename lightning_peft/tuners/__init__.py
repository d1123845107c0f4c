"""PEFT methods that huggingface/peft lacks, one package each, which registers itself with peft when it is imported."""

from pathlib import Path

METHODS = tuple(f"{__name__}.{file.parent.name}" for file in sorted(Path(__file__).parent.glob("*/__init__.py")))
