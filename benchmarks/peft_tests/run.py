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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="the source tree of a release of peft, with its tests")
    parser.add_argument("--only", nargs="*", choices=FILES, default=list(FILES))
    parser.add_argument("--types", default="", help="peft types, separated by commas; default all of ours and LORA")
    parser.add_argument("-k", default="", help="as pytest's")
    parser.add_argument("--results", type=Path, help="keep how each test ended in this file, one JSON object a line")
    arguments = parser.parse_args()
    entries = run(arguments.peft, [FILES[name] for name in arguments.only], arguments.types, arguments.k)
    if arguments.results:
        arguments.results.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    sys.path.insert(0, str(_HERE))
    from table import table

    print(table(entries))


def run(peft: Path, files: list[str], types: str, words: str) -> list[dict[str, str]]:
    """Run the tests in a folder of their own; return how each ended."""
    if not (peft / "tests" / "testing_common.py").exists():
        raise SystemExit(f"{peft} has no tests/testing_common.py: give the source tree of a release of peft.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(peft / "tests", folder / "tests")
        (folder / "tests" / "__init__.py").touch()
        (folder / "pytest.ini").write_text("[pytest]\n")
        subprocess.run([sys.executable, "-c", "import tiny_models; tiny_models.write(tiny_models.Path())"],
                       cwd=folder, env=_environment(folder, types), check=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-n", "0", "-W", "ignore", "--tb=no",
                   "--no-summary", "-p", "no:cacheprovider"]
        command += [*(["-k", words] if words else []), *(f"tests/{file}" for file in files)]
        subprocess.run(command, cwd=folder, env=_environment(folder, types), stdout=sys.stderr, check=False)
        results = folder / "results.jsonl"
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _environment(folder: Path, types: str) -> dict[str, str]:
    path = [str(folder), str(_HERE), str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PEFT_TESTS_RESULTS": str(folder / "results.jsonl"),
        "PEFT_TESTS_TYPES": types,
    }


if __name__ == "__main__":
    main()
