"""The names that a package's files define for its users, read from their text: nothing is imported.

    python lightning_peft/exports.py

writes the stub of `lightning_peft.callbacks`, by which type checkers and editors see what it exports.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path


def public_classes(package: Path) -> dict[str, list[str]]:
    """Return the names that the modules below a package export: those in a module's `__all__`, else its public classes.

    Args:
        package: the package's folder.

    Returns:
        Names by module, which is named as from within the package, such as `"tuning.lora"`.
    """
    names = {}
    for file in sorted(package.rglob("[!_]*.py")):
        text = file.read_text(encoding="utf-8")
        listed = re.search(r"^__all__ = (\[[^\]]*\])", text, re.MULTILINE)
        public = ast.literal_eval(listed[1]) if listed else re.findall(r"^class ([A-Za-z]\w*)", text, re.MULTILINE)
        if public:
            names[".".join(file.relative_to(package).with_suffix("").parts)] = public
    return names


def stub(package: Path) -> str:
    """Return the text of the `__init__.pyi` of a package that exports its `public_classes`."""
    exported = [(module, name) for module, names in public_classes(package).items() for name in sorted(names)]
    imports = "".join(f"from .{module} import {name} as {name}\n" for module, name in exported)
    return f"{imports}\n__all__ = {sorted(name for _, name in exported)}\n"


def write_stub() -> Path:
    """Write the stub of `lightning_peft.callbacks` and return its path."""
    package = Path(__file__).parent / "callbacks"
    (package / "__init__.pyi").write_text(stub(package), encoding="utf-8")
    return package / "__init__.pyi"


if __name__ == "__main__":
    print(write_stub())
