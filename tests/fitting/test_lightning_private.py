"""What Lightning keeps to itself is used in one file."""

from __future__ import annotations

import re

from tuning import ROOT

USE = re.compile(
    r"\.fit_loop\b|\.epoch_loop\b|_progress\b\.|\._generate_state_key|_strict_loading|_MultiProcessingLauncher"
    r"|strategy\._|trainer\._|\._\w+_connector|from lightning\.\S* import _"
)


def test_private_names_of_lightning_are_in_one_file() -> None:
    using = {file.name for file in (ROOT / "lightning_peft").rglob("*.py") if USE.search(file.read_text())}
    assert using == {"lightning_private.py"}


def test_a_use_is_seen() -> None:
    assert USE.search("trainer.fit_loop.setup_data()") and USE.search("trainer._checkpoint_connector")
    assert not USE.search("trainer.strategy.launcher")
