"""Whether the present tree computes what another commit computes, bit for bit.

    python benchmarks/against.py COMMIT                          log-probabilities, edits, tuning, loading
    python benchmarks/against.py COMMIT --only folders           loading alone, of what COMMIT saves
    python benchmarks/against.py COMMIT --demo [--questions 20]  and the comparison of configs/compare/quick.yaml

COMMIT is checked out into a temporary worktree. One script, `against_probe.py`, runs with each tree's package, both at
once, one thread each, and writes what it computed:

- logprobs: log-probabilities of choices, by tiny models and by SmolLM2-135M-Instruct;
- edits, tuning: each adapter of `against_cases.py` on two tiny models: logits, trained tensors, numbers, the saved
  folder and the checkpoint, after an epoch of training with weight decay or after an edit's one pass;
- folders: what COMMIT saved of these is loaded by the present tree, and must give the logits that COMMIT computed;
- demo: the table of `lightning-peft compare` and every choice's score.

Printed are the numbers of cases and of values compared, each case that differs and in what, and what was not compared
because COMMIT does not have it. Exit status 1 if anything differs. Times, versions and paths are not compared. Two to
four minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from against_values import Comparison, compare, compare_loaded

ROOT = Path(__file__).resolve().parents[1]
PROBE = ROOT / "benchmarks" / "against_probe.py"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
COMPUTED = ("logprobs", "edits", "tuning")
SAVED = ("edits", "tuning")  # what of it leaves folders and checkpoints
SECTIONS = (*COMPUTED, "folders")
SHOWN = 5  # values of a case that are named


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into a folder, for the time being."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def start(tree: Path, arguments: list[Any], log: Path) -> subprocess.Popen[bytes]:
    """Start Python with a tree's package, everything that may change a number being fixed."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests")]),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, *map(str, arguments)]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=os.environ | environment, cwd=tree, stdout=output, stderr=output)


def finish(processes: Mapping[Path, subprocess.Popen[bytes]]) -> None:
    """Wait for processes, given by their logs.

    Raises:
        SystemExit: one failed; with the end of its log.
    """
    try:
        for process in processes.values():
            process.wait()
    finally:
        for process in processes.values():
            process.kill()  # where this one is interrupted; nothing to those that have ended
    for log, process in processes.items():
        if process.returncode:
            raise SystemExit(f"{log.stem} failed:\n" + "\n".join(log.read_text().splitlines()[-30:]))


def probe(trees: Mapping[str, Path], out: Path, sections: Mapping[str, list[str]]) -> None:
    """Run the probe with every tree's package, all at once, into `out/<side>`."""
    model = ["--smollm2", MODEL] if (MODEL / "model.safetensors").exists() else []
    finish(
        {
            out / f"{side}.log": start(
                tree, [PROBE, out / side, "--tree", tree, *model, "--sections", *sections[side]], out / f"{side}.log"
            )
            for side, tree in trees.items()
        }
    )


def load(tree: Path, out: Path) -> None:
    """Load with the present tree what the commit's probe saved."""
    log = out / "loading.log"
    finish({log: start(tree, [PROBE, out / "loaded", "--tree", tree, "--load", out / "before"], log)})


def demo(trees: Mapping[str, Path], out: Path, questions: int) -> None:
    """Run the quick comparison with both trees, and keep its table and scores in `out/<side>/demo/quick`."""
    plan = out / "plan.yaml"
    plan.write_text(_plan(questions))
    processes = {}
    for side, tree in trees.items():
        log = out / f"demo of {side}.log"
        arguments = ["-m", "lightning_peft.cli", "compare", "--config", plan, "--output", out / f"run-{side}"]
        processes[log] = start(tree, arguments, log)
    finish(processes)
    for side in trees:
        kept = out / side / "demo" / "quick"
        kept.mkdir(parents=True)
        for name in ("results.json", "samples.jsonl"):
            (kept / name).write_bytes((out / f"run-{side}" / name).read_bytes())


def _plan(questions: int) -> str:
    """Return the quick comparison, or with fewer questions one in which every row is tried once or twice, briefly."""
    import yaml

    plan = yaml.safe_load((ROOT / "configs" / "compare" / "quick.yaml").read_text())
    benchmark = plan.pop("task")["init_args"]  # in the form of 0.1, which every commit reads
    del benchmark["model"]
    plan["model"], plan["data"], plan["accelerator"] = str(MODEL), benchmark, "cpu"
    if questions < plan["data"]["limit"]:
        plan["data"] |= {"limit": questions, "side_effects": {"tokens": 128, "length": 64, "capability": 2}}
        for row in plan["rows"]:
            shorter: dict[str, Any] = {"few_shot": questions // 2, "max_epochs": 1}
            row |= {name: value for name, value in shorter.items() if name in row}
            row |= {name: row[name][:2] for name in ("learning_rates", "alphas") if name in row}
    return yaml.safe_dump(plan, sort_keys=False)


def run(trees: Mapping[str, Path], out: Path, sections: list[str], questions: int) -> dict[str, Comparison]:
    """Compute and compare the sections; `trees` are those of `before`, the commit, and `after`, the present."""
    computed = [section for section in COMPUTED if section in sections]
    saved = [section for section in SAVED if "folders" in sections and section not in computed]
    before, after = out / "before", out / "after"
    if computed or saved:
        probe(trees, out, {"before": computed + saved, "after": computed})
    compared = {section: compare(before / section, after / section) for section in computed}
    if "folders" in sections:
        load(trees["after"], out)
        for section in SAVED:
            compared[f"folders of {section}"] = compare_loaded(before / section, out / "loaded" / section)
    if "demo" in sections:
        demo(trees, out, questions)
        compared["demo"] = compare(before / "demo", after / "demo")
    return compared


def report(compared: Mapping[str, Comparison], commit: str) -> None:
    """Print the table, what differs, and what was not compared."""
    print(f"{'section':<20}{'cases':>8}{'values':>10}{'equal':>10}{'differ':>8}{'left out':>10}")
    for section, comparison in compared.items():
        differing = sum(len(lines) for lines in comparison.differing.values())
        numbers = f"{comparison.cases:>8}{comparison.values:>10}{max(comparison.values - differing, 0):>10}"
        print(f"{section:<20}{numbers}{differing:>8}{len(comparison.left_out):>10}")
    for section, comparison in compared.items():
        for case, lines in comparison.differing.items():
            print(f"{section}: {case} differs in {len(lines)} values")
            print(*(f"    {line}" for line in lines[:SHOWN]), *["    ..."] * (len(lines) > SHOWN), sep="\n")
        for case, reason in comparison.left_out.items():
            print(f"{section}: {case} is not compared, it {reason} in {commit}")


def _stop(*_: Any) -> None:
    """Exit by way of the worktree's removal, which a second signal must not cut short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, "demo"], help="default: all but the demo")
    parser.add_argument("--demo", action="store_true", help="the quick comparison too, which takes many minutes")
    parser.add_argument(
        "--questions",
        type=int,
        default=100,
        help="of the quick comparison; at least 10; below 100 it is shortened in other ways too",
    )
    parser.add_argument("--keep", type=Path, help="a new folder for everything computed; default, a temporary one")
    options = parser.parse_args()
    sections = [*(options.only or SECTIONS), *(["demo"] if options.demo else [])]
    begin = time.perf_counter()
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.keep or Path(temporary, "out")).resolve()
        out.mkdir(parents=True)
        with worktree(options.commit, Path(temporary, "tree")) as tree:
            compared = run({"before": tree, "after": ROOT}, out, sections, options.questions)
    report(compared, options.commit)
    print(f"{time.perf_counter() - begin:.0f} s")
    different = any(comparison.differing for comparison in compared.values())
    empty = [section for section, comparison in compared.items() if not comparison.cases]
    if empty:
        print(f"Nothing was compared in {', '.join(empty)}.")
    return 1 if different or empty else 0


if __name__ == "__main__":
    raise SystemExit(main())
