"""Let wheels and editable installations have the stub of `lightning_peft.callbacks`, which is made and not kept."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Stub(BuildHookInterface):
    """Writes the stub before a wheel is made, and adds it, which git ignores."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        written = runpy.run_path(str(Path(self.root, "lightning_peft", "exports.py")))["write_stub"]()
        build_data["artifacts"].append(written.relative_to(self.root).as_posix())
