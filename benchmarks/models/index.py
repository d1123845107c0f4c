"""Try the package on a small model of every type of transformers, beside plain hooks; print or write the index.

python benchmarks/models/index.py [--task causal image] [--types llama gemma3_text …] [--again] [--write]

Each type is built from its default configuration, shrunk by `lightning_peft.testing.shrunk`, with random weights, in a
process of its own that may take `--seconds` and `--gibibytes`. Rows are kept in `docs/results/models`: a type is run
once unless `--again` says so, and several commands may run at once. `--write` makes `docs/models.md` of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT))

import torch  # noqa: E402

from benchmarks.models.check import NATS, RELATIVE, check, sentence  # noqa: E402
from benchmarks.models.page import page, terminal  # noqa: E402
from lightning_peft.files.atomic import locked, new_file  # noqa: E402
from lightning_peft.testing.shrunk import shrunk_config, shrunk_model  # noqa: E402

TASKS = ("causal", "image")
FOLDER, PAGE = _ROOT / "docs/results/models", _ROOT / "docs/models.md"


def types(task: str) -> dict[str, str]:
    """Return the model types of a task in transformers, and the classes of their models."""
    from transformers.models.auto import modeling_auto

    names = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }[task]
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names.items()}


def build(task: str, kind: str) -> Any:
    """Return the shrunk model of a type."""
    import transformers

    model_class = getattr(transformers, types(task)[kind])
    decodes = task == "causal" and hasattr(shrunk_config(kind), "is_decoder")
    model = shrunk_model(model_class, kind, **({"is_decoder": True} if decodes else {}))
    return model.requires_grad_(False)  # as the package leaves it: some kernels round otherwise


def run(task: str, kind: str) -> dict[str, Any]:
    """Build and check one type."""
    began = time.time()
    row: dict[str, Any] = {"class": types(task)[kind]}
    try:
        model = build(task, kind)
    except Exception as error:
        return {**row, "built": sentence(error)}
    row |= {"built": "", "parameters": sum(p.numel() for p in model.parameters())}
    row |= check(model, sees_pictures=task == "image")
    return {**row, "seconds": round(time.time() - began, 1)}


def run_bounded(task: str, kind: str, seconds: float, gibibytes: float) -> dict[str, Any]:
    """`run` in a process of its own, which ends with its time or memory."""
    context = multiprocessing.get_context("fork")  # with all imports done
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, task, kind, gibibytes), daemon=True)
    process.start()
    there.close()
    try:
        if here.poll(seconds):
            row: dict[str, Any] = here.recv()
            return row
        return {"class": types(task)[kind], "built": f"more than {seconds:g} seconds"}
    except EOFError:
        return {"class": types(task)[kind], "built": "its process ended by itself"}
    finally:
        process.kill()
        process.join()


def _child(there: Connection, task: str, kind: str, gibibytes: float) -> None:
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    there.send(run(task, kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--types", nargs="+", help="only these; default all")
    parser.add_argument("--again", action="store_true", help="also those whose result is kept")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--gibibytes", type=float, default=10)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(_ROOT)}")
    options = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run("causal", "gpt2")  # what is imported meanwhile is there in every process
    gc.collect()
    gc.freeze()  # else each collection in a process looks at all of it
    warnings.simplefilter("ignore")
    for task in options.task:
        for kind in options.types or types(task):
            if kind in types(task) and (options.again or kind not in kept(task)):
                row = run_bounded(task, kind, options.seconds, options.gibibytes)
                keep(task, kind, row)
                print(terminal(task, kind, row), flush=True)
    if options.write:
        with new_file(PAGE) as new:
            new.write_text(page({task: kept(task) for task in TASKS}, transformers.__version__, RELATIVE, NATS))


def kept(task: str) -> dict[str, dict[str, Any]]:
    """Return the rows that are kept, by type."""
    file = FOLDER / f"{task}.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return rows


def keep(task: str, kind: str, row: dict[str, Any]) -> None:
    """Add a row to those that are kept; several commands may do so at once."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with locked(FOLDER):
        rows = kept(task) | {kind: row}
        with new_file(FOLDER / f"{task}.json") as new:
            lines = (f"{json.dumps(k)}: {json.dumps(rows[k], ensure_ascii=False)}" for k in sorted(rows))
            new.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
