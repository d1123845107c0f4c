"""A comparison or sweep says before its first cell what the model cannot read, or leaves demonstrations out to fit."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_models import tiny

from lightning_peft.backbone.window import ContextWindowError, ContextWindowWarning
from lightning_peft.compare import run as running
from lightning_peft.compare.page import write_html
from lightning_peft.compare.plan import Plan, Row, cell_key
from lightning_peft.models import CausalLM
from lightning_peft.sweep.run import run as sweep
from lightning_peft.sweep.settings import Sweep, sweep_key
from lightning_peft.truthfulqa import QA_PRIMER, SideEffects, TruthfulQADataModule
from lightning_peft.truthfulqa.answers import Answers
from lightning_peft.truthfulqa.fitting import fewer_demonstrations
from lightning_peft.truthfulqa.task import TruthfulQA

pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|workers|no optimizer)")
WINDOW = 400


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A model that reads 400 tokens: less than six demonstrations with a question, but more than one."""

    def make(kind: str) -> str:
        model, path = tiny(kind), tmp_path_factory.mktemp(kind)
        model.config.max_position_embeddings = WINDOW
        type(model)(model.config).save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
        return str(path)

    return make


def plan_of(model: str, output: Path, **data: Any) -> Plan:
    rows = [Row("base", "Base", "base"), Row("few", "Few-shot", "prompt", few_shot=4, draws=2)]
    effects = SideEffects(tokens=0, capability=0)
    task = TruthfulQA(model, "package", limit=12, side_effects=effects, **data)
    return Plan("x", rows, task, output=str(output), accelerator="cpu")


def run(plan: Plan) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=500)
    settings = {"rows": {row.name: {"name": row.name} for row in plan.rows}}
    return running.run(plan, settings, console), console.file.getvalue()  # type: ignore[attr-defined]


def test_a_model_that_cannot_read_the_texts_is_refused_before_the_first_cell(
    folder: Callable[[str], str], tmp_path: Path
) -> None:
    plan = plan_of(folder("gpt2"), tmp_path / "x")
    with pytest.raises(
        ContextWindowError, match=r"^\d+ of \d+ test texts of 'base' are longer .*few_shot, or fit_window"
    ):
        run(plan)
    assert not (tmp_path / "x" / "cells").exists()
    plan.rows[0].few_shot = plan.rows[1].few_shot = 0
    plan.rows[1].draws, plan.task.answers = 1, Answers(max_new_tokens=WINDOW)  # type: ignore[attr-defined]
    with pytest.raises(ContextWindowError, match=r"^\d+ of \d+ prompts of 'base' with their answers"):
        run(plan)
    assert not (tmp_path / "x" / "cells").exists()


def test_what_a_rotary_model_was_not_trained_for_is_said_first_and_in_the_report(
    folder: Callable[[str], str], tmp_path: Path
) -> None:
    plan = plan_of(folder("llama"), tmp_path / "x")
    with pytest.warns(ContextWindowWarning) as said:
        results, _ = run(plan)
    texts = [str(warning.message) for warning in said if issubclass(warning.category, ContextWindowWarning)]
    assert any("test texts of 'base'" in text for text in texts) and any(
        "test texts of 'few'" in text for text in texts
    )
    assert not any(row["failed"] for row in results["rows"])
    beyond = [caveat for caveat in results["caveats"] if "LlamaForCausalLM was trained for" in caveat]
    assert [caveat.split(":")[0] for caveat in beyond] == ["Base", "Few-shot"]


def test_demonstrations_are_left_out_until_all_fits_and_the_report_says_how_many(
    folder: Callable[[str], str], tmp_path: Path
) -> None:
    plan = plan_of(folder("llama"), tmp_path / "x", fit_window=True, answers=Answers(max_new_tokens=10))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ContextWindowWarning)
        results, said = run(plan)
    assert not any(row["failed"] for row in results["rows"]) and "failed" not in said
    sentences = [caveat for caveat in results["caveats"] if "do not fit the context window" in caveat]
    assert [sentence.split(":")[0] for sentence in sentences] == ["Base", "Few-shot"]
    assert " of 6 demonstrations" in sentences[0] and " of 4 demonstrations" in sentences[1]
    page = write_html(results, tmp_path / "report.html").read_text()
    assert all(sentence in page for sentence in sentences)
    assert run(plan)[0] == results  # finished cells know it too


def test_as_many_demonstrations_are_kept_as_fit_and_these_are_the_last(folder: Callable[[str], str]) -> None:
    tokenizer = CausalLM(folder("gpt2")).tokenizer

    def longest(**options: Any) -> int:
        data = TruthfulQADataModule("package", limit=12, tokenizer=tokenizer, **options)
        data.setup()
        return max(int(n) for batch in data.test_dataloader() for n in batch["attention_mask"].sum(-1))

    data = TruthfulQADataModule("package", limit=12, tokenizer=tokenizer, fit_window=WINDOW)
    data.setup()
    (context, *_), shots = data.test_contexts().values(), QA_PRIMER.split("\n\n")
    assert data.demonstrations is not None
    kept, asked = data.demonstrations
    assert asked == 6 and 0 < kept < 6
    assert context.startswith("\n\n".join(shots[-kept:]) + "\n\nQ: ")
    assert longest(fit_window=WINDOW) <= WINDOW < longest(primer="\n\n".join(shots[-kept - 1 :]))
    assert longest(fit_window=10_000) == longest() > WINDOW


@pytest.mark.parametrize("window", range(0, 12))
def test_the_most_demonstrations_that_fit(window: int) -> None:
    shots, texts = ["a", "bb", "ccc"], [("q", "a"), ("", "")]

    def length(primer: str, question: str, answer: str) -> int:
        return len(primer) + len(question) + len(answer)

    found, kept, asked = fewer_demonstrations("\n\n".join(shots), texts, length, window)
    fitting = [n for n in range(4) if len("\n\n".join(shots[3 - n :])) + 2 <= window]
    assert asked == 3 and kept == max(fitting, default=0) and found == "\n\n".join(shots[3 - kept :])


def test_a_sweep_refuses_or_fits_too(folder: Callable[[str], str], tmp_path: Path) -> None:
    task = TruthfulQA(folder("gpt2"), limit=20, val_fraction=0.5)
    plan = Sweep("x", task, [2], [3.0], kl_tokens=0, chunk=2, output=str(tmp_path / "x"), device="cpu")
    with pytest.raises(ContextWindowError, match=r"^\d+ of \d+ questions with their choices are longer"):
        sweep(plan, {}, Console(file=io.StringIO()))
    assert not (tmp_path / "x" / "parts").exists()
    task.fit_window = True
    results = sweep(plan, {}, Console(file=io.StringIO()))
    assert len(results["demonstrations"]) == 4 and all(
        0 < kept < asked == 6 for kept, asked in results["demonstrations"]
    )
    assert "of 6 demonstrations fit the context window." in results["measured"]
    assert len(results["points"]) == 2


def test_a_setting_that_is_off_leaves_the_keys_as_a_release_wrote_them_that_did_not_know_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("depends_on", "data_hash"):
        monkeypatch.setattr(TruthfulQA, name, lambda task: "hash")
    plan = plan_of("model", Path("x"))
    settings, grid = {"rows": {"base": {}}}, Sweep("x", TruthfulQA("model"), [2], [1.0])
    of_cell = cell_key(plan, settings, plan.rows[0], 0)
    assert of_cell == "6c07d0ede55588c46556384f00fb6a92a4724fe68c0ef144f337df9c2a57d0ba"
    of_sweep = sweep_key(grid, {"a": 1})
    assert of_sweep == "08e0c2381d7cfa8735a1f5eb4922b8197d988b94c76152946f5031028451358c"
    plan.task.fit_window = grid.task.fit_window = True  # type: ignore[attr-defined]
    assert cell_key(plan, settings, plan.rows[0], 0) != of_cell
    assert sweep_key(grid, {"a": 1}) != of_sweep
