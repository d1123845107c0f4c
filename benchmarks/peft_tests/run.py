"""Run peft's own tests on our peft types, and print their table: docs/citizens.md.

pip download --no-deps --no-binary :all: peft==<the installed version> && tar xzf peft-*.tar.gz
python benchmarks/peft_tests/run.py peft-*/ [--only custom decoder encoder_decoder config] [--types SSB] [-k WORDS]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = {
    "custom": "test_custom_models.py",
    "decoder": "test_decoder_models.py",
    "encoder_decoder": "test_encoder_decoder_models.py",
    "config": "test_config.py",
}
_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))

from table import table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="the source tree of a release of peft, with its tests")
    parser.add_argument("--only", nargs="*", choices=FILES, default=list(FILES))
    parser.add_argument("--types", default="", help="peft types, separated by commas; default all of ours and LORA")
    parser.add_argument("-k", default="", help="as pytest's")
    parser.add_argument("--tb", default="no", help="as pytest's")
    parser.add_argument(
        "--results",
        type=Path,
        help="the file, one JSON object a line, in which stands how each test ended; those in it are not run again",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = (arguments.results or Path(folder) / "results.jsonl").resolve()
        results.touch()
        options = ["--tb", arguments.tb, *(["-k", arguments.k] if arguments.k else [])]
        run(arguments.peft, [FILES[name] for name in arguments.only], arguments.types, results, options)
        print(table([json.loads(line) for line in results.read_text().splitlines()]))


def run(peft: Path, files: list[str], types: str, results: Path, options: list[str]) -> None:
    """Run the tests in a folder of their own, and note in `results` how each ends."""
    if not (peft / "tests" / "testing_common.py").exists():
        raise SystemExit(f"{peft} has no tests/testing_common.py: give the source tree of a release of peft.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(peft / "tests", folder / "tests")
        (folder / "tests" / "__init__.py").touch()
        (folder / "pytest.ini").write_text("[pytest]\n")
        environment = _environment(folder, types, results)
        write = "import tiny_models; tiny_models.write(tiny_models.Path())"
        subprocess.run([sys.executable, "-c", write], cwd=folder, env=environment, check=True)
        quiet = ["-q", "--no-summary", "--show-capture=no", "-W", "ignore", "-p", "no:cacheprovider", "-n", "0"]
        command = [sys.executable, "-m", "pytest", "-p", "plugin", *quiet, *options]
        command += [f"tests/{file}" for file in files]
        subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=False)


def _environment(folder: Path, types: str, results: Path) -> dict[str, str]:
    path = [str(folder), str(_HERE), str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # the models are too small for more
        "PEFT_TESTS_RESULTS": str(results),
        "PEFT_TESTS_TYPES": types,
    }


if __name__ == "__main__":
    main()
