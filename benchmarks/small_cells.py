"""What a finished comparison on TruthfulQA measured, without a word of the benchmark: numbers by question.

    python benchmarks/small_cells.py runs/gemma-truthfulqa docs/results/gemma-truthfulqa

Each cell becomes a small JSON file: question, draw, what each choice is to MC1 and MC2, and its log-probability, in
`columns`' order; sums over neutral text by document; what was chosen; seconds and bytes. `results.json` is copied.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from lightning_peft.files.records import write_record

COLUMNS = ("question_id", "draw", "mc1", "mc2", "logprob")
LEFT_OUT = ("samples", "texts", "files", "sha256", "key")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    for path in sorted(options.run.glob("cells/*/result.json")):
        result = json.loads(path.read_text())
        cell = {name: value for name, value in result.items() if name not in LEFT_OUT}
        cell["columns"] = list(COLUMNS)
        cell["choices"] = [[round(sample[name], 4) for name in COLUMNS] for sample in result["samples"]]
        write_record(options.output / "cells" / f"{path.parent.name}.json", cell)
    shutil.copy(options.run / "results.json", options.output / "results.json")


if __name__ == "__main__":
    main()
