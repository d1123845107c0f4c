"""A subclass that overrides a hook is heard wherever that hook acts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import pytest

from lightning_peft import callbacks
from lightning_peft.callbacks import LoRA, Steer

HOOKS = ("start", "end", "batch_start", "batch_end")
EVALUATED = [(LoRA, hook) for hook in HOOKS[2:]] + [(Steer, hook) for hook in HOOKS]


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize(("base", "hook"), EVALUATED)
def test_what_a_subclass_does_in_validation_it_does_in_test_and_predict(base: Any, hook: str, stage: str) -> None:
    calls: list[tuple[Any, ...]] = []

    def override(self: Any, *args: Any) -> None:
        calls.append(args)

    mine: Any = type("Mine", (base,), {f"on_validation_{hook}": override})
    getattr(mine.__new__(mine), f"on_{stage}_{hook}")("trainer", "module", "batch", 0)
    assert calls == [("trainer", "module", "batch", 0)]


def test_what_a_subclass_does_in_test_it_does_there_alone() -> None:
    class Mine(Steer):
        calls = 0

        def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.calls += 1

    mine: Any = Mine.__new__(Mine)
    mine.on_test_start(None, None)
    assert mine.calls == 1


@pytest.mark.parametrize("cls", [getattr(callbacks, name) for name in callbacks.__all__])
def test_no_hook_is_another_under_a_second_name(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, L.Callback)):
        return
    names = [name for name in vars(L.Callback) if name.startswith("on_")]
    changed = [getattr(cls, name) for name in names if getattr(cls, name) is not getattr(L.Callback, name)]
    shared = [hook for hook, count in Counter(changed).items() if count > 1]
    assert all(hook.__qualname__.startswith("same_as.") for hook in shared)
