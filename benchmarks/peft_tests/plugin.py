"""The pytest plugin that puts our types where peft's tests have peft's, and notes how every test ends.

What it changes in peft's tests: the rows they are parametrised with; `hub_online_once`, which would go online; and
`set_init_weights_false`, which asks a configuration to start at random: ours have no such option, so the layers of
the tests that ask for it are filled at random as they are made. In this package it changes one thing: the models'
names count as the hub's, though they are folders.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner

from benchmarks.peft_tests.our_types import COMPLETED, name_of, rows
from lightning_peft.stack.adapter_files import readme

_LISTS = (
    "TEST_CASES",
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",
    "MIXED_ADAPTER_TEST_CASES",
    "ALL_CONFIGS",
    "ALL_CONFIG_CLASSES",
)
_TASKS = {"test_decoder_models": "CAUSAL_LM", "test_encoder_decoder_models": "SEQ_2_SEQ_LM"}
_starts_at_random = False


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("diffusers") is None:  # used by tests of Stable Diffusion only
        pipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = ModuleType("diffusers")
        vars(sys.modules["diffusers"])["StableDiffusionPipeline"] = pipeline
    helpers = importlib.import_module("tests.testing_utils")
    theirs = helpers.set_init_weights_false
    helpers.hub_online_once = lambda model_id: nullcontext()
    helpers.set_init_weights_false = lambda cls, kwargs: _random_start(theirs, cls, kwargs)
    # the models are folders here, of whose names a model card would show the last part only
    readme._is_folder = lambda name: False  # type: ignore[assignment]
    inject = BaseTuner.inject_adapter

    def inject_and_fill(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, adapter_name, *args, **kwargs)
        if _starts_at_random and name_of(self.peft_config[adapter_name]) not in (None, "LORA"):
            for name, parameter in model.named_parameters():
                if self.prefix in name and adapter_name in name.split(".") and parameter.is_floating_point():
                    _add_noise(parameter)
        return result

    BaseTuner.inject_adapter = inject_and_fill  # type: ignore[method-assign]


@torch.no_grad()
def _add_noise(parameter: torch.nn.Parameter) -> None:
    if parameter.device.type != "meta":
        parameter.add_(torch.randn_like(parameter), alpha=0.5)


def _random_start(theirs: Any, cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    global _starts_at_random
    if name_of(cls) in (None, "LORA"):
        return theirs(cls, kwargs)
    _starts_at_random = True
    return kwargs.copy()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our rows in the place of peft's."""
    module = metafunc.module
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize" and (ours := _our_rows(module, mark.args[0], mark.args[1])) is not None:
            marks[i] = pytest.mark.parametrize(mark.args[0], ours).mark


def _our_rows(module: ModuleType, names: str, values: Any) -> list[Any] | None:
    for name in _LISTS:
        if values is getattr(module, name, None):
            return rows(name, _TASKS.get(module.__name__.rpartition(".")[2], ""))
    if values is getattr(module, "ALL_PEFT_CONFIG_CLASSES", None):
        return list(COMPLETED)
    if values is getattr(module, "LAYER_INDEXING_CONFIG_CLASSES", None):
        needed = {"layers_to_transform", "layers_pattern"}
        return [row for row in rows("ALL_CONFIG_CLASSES", "") if needed <= set(inspect.signature(row[0]).parameters)]
    if names == "config_cls" and len(values) > 5:  # a list of their types, written where it is used
        return list(COMPLETED)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that speak of peft's types alone, and those whose end is known."""
    only = set(filter(None, os.environ["PEFT_TESTS_TYPES"].split(",")))
    known = {json.loads(line)["id"] for line in Path(os.environ["PEFT_TESTS_RESULTS"]).read_text().splitlines()}
    ours = [item for item in items if (kind := _kind(item)) is not None and (not only or kind in only)]
    items[:] = [item for item in ours if item.nodeid not in known]


def _kind(item: pytest.Item) -> str | None:
    if item.name == "test_from_peft_type":
        return "all"
    callspec = getattr(item, "callspec", None)
    return next(filter(None, map(name_of, callspec.params.values())), None) if callspec else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _starts_at_random
    callspec = getattr(item, "callspec", None)
    _starts_at_random = callspec is not None and callspec.params.get("tuner_method") == "random start"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        params = getattr(getattr(item, "callspec", None), "params", {})
        error = ""
        if report.skipped:
            error = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif call.excinfo is not None:
            error = f"{call.excinfo.typename}: {call.excinfo.value}"
        entry = {
            "file": Path(item.path).name,
            "test": getattr(item, "originalname", item.name),
            "id": item.nodeid,
            "type": _kind(item),
            "when": report.when,
            "outcome": report.outcome,
            "error": error.removeprefix("Skipped: "),
            "model": params.get("model_id"),
            "options": {key: repr(value) for key, value in params.items()},
        }
        with open(os.environ["PEFT_TESTS_RESULTS"], "a") as file:
            file.write(json.dumps(entry) + "\n")
    return report
