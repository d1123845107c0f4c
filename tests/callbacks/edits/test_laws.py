"""Every edit, fitted by its callback, obeys the laws *threads* and *restored*, and *off* bit for bit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tuning import QUIET, ROOT

from lightning_peft import adapters, save_adapter, steering
from lightning_peft.callbacks import Edit
from lightning_peft.stack.stack import find_stacks
from lightning_peft.testing.lockstep import in_lockstep
from lightning_peft.testing.traces import first_difference, traces

sys.path.insert(0, str(ROOT / "benchmarks"))  # the list of edits, each with small settings, is the comparison's

from against_cases import EDITS
from against_probe import ProbedStatements, Tiny, trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
PROMPTS = [torch.tensor([[5, 9, 14]]), torch.tensor([[6, 12, 8, 20, 7, 11, 30]])]


def write(model: Any, prompt: torch.Tensor) -> list[int]:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPTS[1], attention_mask=torch.ones_like(PROMPTS[1])).logits


def test_every_edit_is_in_the_list() -> None:
    from lightning_peft import callbacks

    exported = {getattr(callbacks, name) for name in callbacks.__all__}
    edits = {one for one in exported if issubclass(one, Edit) and not getattr(one, "__abstractmethods__", None)}
    named = {type(callback) for make in EDITS.values() for callback in make()}
    assert {one.__name__ for one in edits} - {"Edit", "ReadingEdit"} <= {one.__name__ for one in named}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_lets_threads_be_and_leaves_nothing_behind(name: str, kind: str, tmp_path: Any) -> None:
    module = Tiny(kind).eval()
    model: Any = module.backbone
    before, expected = traces(model), logits(model)
    trainer(*EDITS[name]()).fit(module, ProbedStatements())
    module.eval()
    stack = adapters(module)
    edited = logits(model)
    assert not torch.equal(edited, expected)
    alone = [write(model, prompt) for prompt in PROMPTS]
    assert in_lockstep(model, lambda number: write(model, PROMPTS[number])) == alone
    with stack.disabled():
        assert torch.equal(logits(model), expected)
    folder = save_adapter(module, tmp_path / "edit")
    for part in list(stack.parts):
        stack.remove(part.name)
    assert first_difference(before, traces(model)) is None
    assert not find_stacks(module) and torch.equal(logits(model), expected)
    with steering(model, folder):
        assert torch.equal(logits(model), edited)
    assert first_difference(before, traces(model)) is None
