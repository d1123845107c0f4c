"""The rules by which peft's tests do not apply, the table they end in, and the rows that stand in for peft's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks.peft_tests.our_types import COMPLETED, TYPES, name_of, rows
from benchmarks.peft_tests.rules import RULES, reason_of
from benchmarks.peft_tests.table import table


def entry(test: str, kind: str, outcome: str = "failed", model: str | None = None, **options: Any) -> dict[str, Any]:
    """How one of peft's tests ended."""
    return {
        "file": "test_custom_models.py",
        "test": test,
        "id": f"tests/test_custom_models.py::{test}[{kind}]",
        "type": kind,
        "outcome": outcome,
        "error": "ValueError: it cannot be.",
        "model": model,
        "options": {key: repr(value) for key, value in options.items()},
    }


LINEAR = {"activation": "linear"}


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (entry("test_merge_layers", "BOTTLENECK", config_kwargs={"size": 4}), "no linear map"),
        (entry("test_forward_float16", "BOTTLENECK", config_kwargs={"size": 4}), "no linear map"),
        (entry("test_merge_layers", "BOTTLENECK", config_kwargs=LINEAR), None),
        (entry("test_delete_adapter", "BOTTLENECK", config_kwargs={"size": 4}), None),
        (entry("test_merge_layers", "SSB", config_kwargs={}), None),
        (entry("test_merge_layers", "HEAD_OFFSETS", config_kwargs={"head_dim": 8}), "some positions only"),
        (entry("test_merge_layers", "HEAD_OFFSETS", model="OPT", config_kwargs={"positions": "all"}), None),
        (entry("test_merge_layers", "HEAD_OFFSETS", model="a/T5", config_kwargs={"positions": "all"}), "has a bias"),
        (entry("test_generate", "ATTENTION_PREFIX", model="a/tiny-GPTJ"), "AttentionInterface"),
        (entry("test_generate", "ATTENTION_PREFIX", model="a/Llama"), None),
        (entry("test_mixed_adapter_batches_mlp", "SSB"), "`adapter_names`"),
        (entry("test_mixed_adapter_batches_mlp", "LORA"), None),
        (entry("test_set_requires_grad", "WEIGHT_DELTAS"), "no module is replaced"),
        (entry("test_set_requires_grad", "HEAD_OFFSETS"), None),
    ],
)
def test_a_rule_covers_what_a_method_cannot_do_and_no_more(ended: dict[str, Any], words: str | None) -> None:
    reason = reason_of(ended)
    assert (reason is None) == (words is None) and (words or "") in (reason or "")


def test_every_rule_has_its_reason_once() -> None:
    assert len({rule.reason for rule in RULES}) == len(RULES) and all(rule.reason for rule in RULES)


def test_the_table_tells_failed_from_what_does_not_apply_and_lists_what_passes_against_a_rule() -> None:
    relu = {"size": 4}
    printed = table(
        [
            entry("test_save_pretrained", "SSB"),
            entry("test_merge_layers", "BOTTLENECK", config_kwargs=relu),
            entry("test_merge_layers_fp16", "BOTTLENECK", "passed", config_kwargs=relu),
            entry("test_adapter_name", "BOTTLENECK", "passed", config_kwargs=relu),
            entry("test_mixed", "BOTTLENECK", "skipped", config_kwargs=relu),
        ]
    )
    assert "| `test_custom_models.py` | SSB | 0 | 1 | 0 | 0 |" in printed
    assert "| `test_custom_models.py` | BOTTLENECK | 2 | 0 | 1 | 1 |" in printed
    assert "`tests/test_custom_models.py::test_save_pretrained[SSB]`: ValueError: it cannot be." in printed
    assert "BOTTLENECK, `test_merge_layers_fp16` (1)" in printed and "(BOTTLENECK 1)." in printed


class MLP(nn.Module):
    """The layers of peft's own test model of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(X)))


@pytest.mark.parametrize("row", [row for row in rows("TEST_CASES", "") if row[1] == "MLP"], ids=lambda row: row[0])
def test_a_row_adapts_the_model_and_an_adapter_is_switched_off_added_and_deleted(row: Any) -> None:
    _, _, cls, options = row
    torch.manual_seed(0)
    base, x = MLP(), torch.randn(3, 10)
    expected = base(x)
    model = get_peft_model(base, cls(**options))
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.add_adapter("other", cls(**options))
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and model(x).isfinite().all()


def test_every_type_has_rows_and_is_known_by_them() -> None:
    own = set(TYPES.values())
    for list_name, lacking in (
        ("TEST_CASES", {"ATTENTION_PREFIX"}),
        ("ALL_CONFIGS", set()),
        ("ALL_CONFIG_CLASSES", set()),
    ):
        named = {next(filter(None, map(name_of, row))) for row in rows(list_name, "CAUSAL_LM")}
        assert named == own - lacking, list_name
    assert {name_of(cls) for cls in COMPLETED} == own - {"ATTENTION_PREFIX"}
