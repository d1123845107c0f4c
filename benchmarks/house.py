"""Sizes of the package in this tree and in a commit: lines, type ignores, `Any`, long files, imports that go up.

    python benchmarks/house.py COMMIT

Lines are those that are neither blank nor part of a docstring. `Any` is counted in the types of parameters and results,
each time that it stands there. An import goes up where the room that it names is on the floor of the importing room or
above; the floors of both trees are those of tests/test_imports.py as it is now, exceptions count, and rooms that an
older tree had elsewhere are listed as without a floor. A few seconds.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_peft"
LONG = 250  # lines of a file
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
Sources = dict[str, str]


def in_this_tree() -> Sources:
    """Return the text of every Python file of the package, by its path."""
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / PACKAGE).rglob("*.py")}


def in_commit(commit: str) -> Sources:
    """Return the same of a commit.

    Raises:
        SystemExit: git has no such commit, or it has no such package.
    """
    command = ["git", "archive", "--format=tar", commit, PACKAGE]
    archived = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if archived.returncode:
        raise SystemExit(f"git cannot read {PACKAGE} of {commit!r}: {archived.stderr.decode().strip()}")
    sources = {}
    with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as tar:
        for member in tar:
            if member.name.endswith(".py") and (file := tar.extractfile(member)):
                sources[member.name] = file.read().decode()
    return sources


def code_lines(source: str) -> int:
    """Count the lines that are neither blank nor part of a docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            documentation |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and number not in documentation for number, line in lines)


def any_in_signatures(source: str) -> int:
    """Count `Any` in the types of parameters and of results."""
    count = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            types = [arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg)] + [node.returns]
            names = (name for kind in types if kind is not None for name in ast.walk(kind))
            count += sum(isinstance(name, ast.Name) and name.id == "Any" for name in names)
    return count


def floors() -> dict[str, int]:
    """Return the floor of each room, 0 for the lowest, as the test of imports has it."""
    for node in ast.parse((ROOT / "tests" / "test_imports.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return {room: floor for floor, rooms in enumerate(ast.literal_eval(node.value)) for room in rooms}
    raise SystemExit("tests/test_imports.py has no FLOORS.")


def internal_imports(path: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield the importing room and the imported one, for each import of another room of the package."""
    room = _room(path.removesuffix(".py").split("/"))
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
        for module in modules:
            parts = module.split(".")
            if parts[0] == PACKAGE and _room(parts) not in ("", room):
                yield room, _room(parts)


def sizes(sources: Sources) -> dict[str, str]:
    """Return every size of a package, written out, by its name."""
    floor = floors()
    imports = [pair for path, source in sources.items() for pair in internal_imports(path, source)]
    upward = [pair for pair in imports if set(pair) <= floor.keys() and floor[pair[1]] >= floor[pair[0]]]
    homeless = sorted({room for pair in imports for room in pair if room} - floor.keys())
    long = sum(len(source.splitlines()) > LONG for source in sources.values())
    between = ", ".join(f"{above} from {below}" for below, above in sorted(set(upward)))
    return {
        "lines": str(sum(map(code_lines, sources.values()))),
        "type: ignore": str(sum(source.count("# type: ignore") for source in sources.values())),
        "Any in signatures": str(sum(map(any_in_signatures, sources.values()))),
        f"files over {LONG} lines": f"{long} of {len(sources)}",
        "imports that go up": f"{len(upward)} of {len(imports)} between rooms" + (f": {between}" if between else ""),
        "rooms without a floor": ", ".join(homeless) or "none",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what to compare this tree with, as git names it")
    commit = parser.parse_args().commit
    before, after = sizes(in_commit(commit)), sizes(in_this_tree())
    for name in before:
        print(f"{name}\n  {commit}: {before[name]}\n  this tree: {after[name]}")


def _room(parts: list[str]) -> str:
    return "" if len(parts) < 2 or parts[1].startswith("_") else parts[1]


if __name__ == "__main__":
    main()
