"""What peft keeps to itself is used in one file; a tuner of ours may use what it inherits."""

from __future__ import annotations

import re

from tuning import ROOT

NAMES = (
    "_get_available_adapters|_active_adapter|_disable_adapters|_adapters|_check_merge_allowed|_cast_adapter_dtype|"
    "_manage_pre_hooks|_enable_peft_forward_hooks|_seed_shadow_state|_peft_config|_parents"
)
USE = re.compile(rf"(?<!\bself)(?<!\bsuper\(\))\.({NAMES})\b|_boundary_hook_handles|import AuxiliaryTrainingWrapper")


def test_private_names_of_peft_are_in_one_file() -> None:
    using = {file.name for file in (ROOT / "lightning_peft").rglob("*.py") if USE.search(file.read_text())}
    assert using == {"peft_private.py"}


def test_a_use_is_seen() -> None:
    assert USE.search("layer._active_adapter = []") and USE.search("self.tuner._parents[name]")
    assert not USE.search("self._active_adapter = []") and not USE.search("super()._check_merge_allowed()")
