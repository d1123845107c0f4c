"""Rows that decode: contrasts of layers, or neighbours, score choices as plain reimplementations do."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from layer_contrast import slow
from lightning import Trainer
from tiny_models import tiny
from torch import Tensor

from lightning_peft.cli import main
from lightning_peft.compare.cell import run_cell
from lightning_peft.compare.plan import Plan, Row, check
from lightning_peft.models import CausalLM
from lightning_peft.tasks.decoding import DoLaScoring, RTDScoring
from lightning_peft.truthfulqa import SideEffects, TruthfulQADataModule
from lightning_peft.truthfulqa.evaluation import by_logprob
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS, LIMIT = [1, 2], 12


def row(name: str, scoring: Any, **options: Any) -> Row:
    return Row(name, "", "decoded", scoring=scoring, **options)


ROWS = [
    Row("base", "", "base"),
    row("dola", DoLaScoring(layers=LAYERS)),
    row("constrained", DoLaScoring(layers=LAYERS, relative_top=0.1, reference=True)),
    row("normalised", DoLaScoring(layers=LAYERS, relative_top=0.1, normalise=True)),
    row("last", DoLaScoring(layers=3, relative_top=0.1)),
    row("rtd", RTDScoring(k=5, temperature=2.0, heads=2)),
    row("mixed", RTDScoring(k=5, temperature=2.0, heads=2, lm_weight=0.5)),
    row("chosen", RTDScoring(k=5)),
]


@pytest.fixture(scope="module")
def cells(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    plan = Plan("decoded", ROWS, TruthfulQA(str(tiny_folder("llama")), "package", limit=LIMIT), accelerator="cpu")
    check(plan)
    folder = tmp_path_factory.mktemp("cells")
    return {row.name: run_cell(plan, row, 0, folder / row.name, {}) for row in ROWS}


@pytest.fixture(scope="module")
def data(tiny_tokenizer: Any) -> TruthfulQADataModule:
    data = TruthfulQADataModule("package", limit=LIMIT, tokenizer=tiny_tokenizer)
    data.setup()
    return data


def scores(cell: dict[str, Any]) -> Tensor:
    return torch.tensor([sample["logprob"] for sample in cell["samples"]])


def choices(data: TruthfulQADataModule) -> list[tuple[list[int], int]]:
    """Tokens of each choice behind its prompt, and the number of prompt tokens."""
    found = []
    for batch in data.test_dataloader():
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            found.append((ids[mask.bool()].tolist(), int((labels != -100).nonzero()[0])))
    return found


def test_dola_sums_contrasts_that_are_not_normalised(cells: dict[str, Any], data: TruthfulQADataModule) -> None:
    model, expected = tiny("llama"), []
    for ids, prompt in choices(data):
        contrasts = slow("llama", model, ids, LAYERS, top=0.0)
        expected.append(sum(contrasts[t - 1, ids[t]] for t in range(prompt, len(ids))))
    torch.testing.assert_close(scores(cells["dola"]), torch.stack(expected), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["constrained", "normalised"])
def test_an_implausible_token_counts_a_thousand(name: str, cells: dict[str, Any], data: TruthfulQADataModule) -> None:
    model, expected, reference = tiny("llama"), [], name == "constrained"
    for ids, prompt in choices(data):
        free, bound = (slow("llama", model, ids, LAYERS, top, reference) for top in (0.0, 0.1))
        scored = (free if reference else free.log_softmax(-1)).where(bound > -1000, bound.min())
        expected.append(sum(scored[t - 1, ids[t]] for t in range(prompt, len(ids))))
    assert min(expected) < -1000
    torch.testing.assert_close(scores(cells[name]), torch.stack(expected), atol=2e-3, rtol=1e-4)


def test_contrasted_with_the_last_layer_itself_implausible_tokens_are_counted(cells: dict[str, Any]) -> None:
    counted = scores(cells["last"]) / -1000
    torch.testing.assert_close(counted, counted.round(), atol=1e-5, rtol=0)


def plain_rtd(data: TruthfulQADataModule, tokenizer: Any, temperature: float, k: int = 5, heads: int = 2) -> Tensor:
    """log p of each tested choice, neighbour by neighbour."""
    model: Any = tiny("llama")

    def state(question: str, answer: str) -> Tensor:
        ids = tokenizer(f"Q: {question} A: {answer}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]

    stored = [
        (state(q.text, answer), truth)
        for q in data.fold_questions
        for answers, truth in ((q.correct, 1), (q.incorrect, 0))
        for answer in answers
    ]
    share = sum(truth for _, truth in stored) / len(stored)
    found = []
    for question in data.test_questions:
        for choice in question.choices:
            asked, votes = state(question.text, choice.text).chunk(heads), 0.0
            for head, piece in enumerate(asked):
                near = sorted((float((s.chunk(heads)[head] - piece).norm()), truth) for s, truth in stored)[:k]
                weights = [math.exp(-heads * distance / temperature) for distance, _ in near]
                votes += sum(w for w, (_, truth) in zip(weights, near, strict=True) if truth) / sum(weights) / heads
            found.append(math.log((k * votes + share) / (k + 1)))
    return torch.tensor(found)


def test_rtd_asks_the_neighbours_among_training_statements(
    cells: dict[str, Any], data: TruthfulQADataModule, tiny_tokenizer: Any
) -> None:
    expected = plain_rtd(data, tiny_tokenizer, temperature=2.0)
    torch.testing.assert_close(scores(cells["rtd"]), expected, atol=1e-4, rtol=1e-4)
    assert len(expected.unique()) > len(expected) / 2


def test_the_models_own_log_probability_is_mixed_in_by_its_weight(cells: dict[str, Any]) -> None:
    expected = scores(cells["rtd"]) + 0.5 * scores(cells["base"])
    torch.testing.assert_close(scores(cells["mixed"]), expected, atol=1e-4, rtol=1e-5)


def test_a_temperature_that_is_not_given_is_chosen_and_told(
    cells: dict[str, Any], data: TruthfulQADataModule, tiny_tokenizer: Any
) -> None:
    temperature = cells["chosen"]["chosen"]["temperature"]
    expected = plain_rtd(data, tiny_tokenizer, temperature, heads=1)
    torch.testing.assert_close(scores(cells["chosen"]), expected, atol=1e-4, rtol=1e-4)
    assert cells["dola"]["chosen"] == {}


def test_nothing_is_adapted(cells: dict[str, Any]) -> None:
    for name in ("dola", "rtd"):
        assert cells[name]["trainable_parameters"] == cells[name]["edited_parameters"] == 0
        assert cells[name]["effects"] == {"documents": [], "capability": {}}


def test_a_module_scores_by_log_probability_unless_told_otherwise(
    tiny_folder: Callable[[str], Path], cells: dict[str, Any], data: TruthfulQADataModule
) -> None:
    module = CausalLM(str(tiny_folder("llama")))
    by_default, by_contrast = by_logprob(module.backbone), DoLaScoring(layers=LAYERS)(module)
    batch = next(iter(data.test_dataloader()))
    count = len(batch["input_ids"])
    torch.testing.assert_close(by_default(batch), scores(cells["base"])[:count], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(by_contrast(batch), scores(cells["dola"])[:count], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(by_default(batch), scores(cells["base"])[:count], atol=1e-4, rtol=1e-5)


def test_the_temperature_chosen_is_the_likeliest_on_inner_validation_questions(
    cells: dict[str, Any], data: TruthfulQADataModule, tiny_tokenizer: Any
) -> None:
    def likelihood(temperature: float) -> float:
        inner = copy.copy(data)
        inner.val_questions, inner.test_questions = [], data.val_questions
        found, total = iter(plain_rtd(inner, tiny_tokenizer, temperature, heads=1).tolist()), 0.0
        for choice in (choice for question in data.val_questions for choice in question.choices):
            logprob = next(found)
            if choice.mc2 >= 0:
                total += logprob if choice.mc2 else math.log1p(-math.exp(logprob))
        return total

    chosen = cells["chosen"]["chosen"]["temperature"]
    assert likelihood(chosen) > max(likelihood(chosen * 10**0.5), likelihood(chosen / 10**0.5))


@pytest.mark.parametrize("wrong", [Row("x", "", "decoded"), Row("x", "", "prompt", scoring=DoLaScoring(), few_shot=5)])
def test_decoded_rows_and_no_others_have_a_scoring(wrong: Row) -> None:
    with pytest.raises(ValueError, match=r"rows of kind decoded, and no others, have a scoring\.$"):
        check(Plan("plan", [Row("base", "", "base"), wrong], TruthfulQA("")))


def test_rows_are_read_from_yaml_and_a_changed_one_is_run_again(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    def compared(layers: Any) -> dict[str, Any]:
        place = "lightning_peft.tasks.decoding."
        scorings = {
            "dola": {"class_path": place + "DoLaScoring", "init_args": {"layers": layers}},
            "rtd": {"class_path": place + "RTDScoring", "init_args": {"k": 5}},
        }
        rows: list[dict[str, Any]] = [{"name": "base", "label": "Base", "kind": "base"}]
        rows += [{"name": name, "label": name, "kind": "decoded", "scoring": how} for name, how in scorings.items()]
        task = {"model": str(tiny_folder("llama")), "limit": LIMIT, "side_effects": {"tokens": 0, "capability": 0}}
        values = {"name": "x", "rows": rows, "task": {"class_path": "TruthfulQA", "init_args": task}}
        values |= {"accelerator": "cpu"}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values | {"output": str(tmp_path / "out")}))
        main(["compare", "--config", str(tmp_path / "plan.yaml")])
        found = json.loads((tmp_path / "out" / "results.json").read_text())
        assert not any(row["failed"] for row in found["rows"])
        return {row["method"]: row for row in found["rows"]}

    first, second = compared("high"), compared([1, 2])
    assert first["rtd"]["seconds"] == second["rtd"]["seconds"] and len(first["rtd"]["chosen"]["temperature"]) == 2
    assert first["dola"]["seconds"] != second["dola"]["seconds"]


def test_questions_of_which_no_statement_was_read_are_refused(tiny_folder: Callable[[str], Path]) -> None:
    module = CausalLM(str(tiny_folder("llama")))
    module.scoring = RTDScoring(k=5)
    data = TruthfulQADataModule("package", limit=LIMIT, side_effects=SideEffects(tokens=0, capability=4))
    with pytest.raises(ValueError, match=r"neither in validation nor side effects\.$"):
        Trainer(logger=False, enable_progress_bar=False, accelerator="cpu").test(module, data, verbose=False)
