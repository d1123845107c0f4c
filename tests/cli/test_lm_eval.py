"""`lightning-peft lm-eval`: the harness's own command, with tasks of its own form, on saved folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lm_eval.tasks
import pytest
from edits import add_offsets

from lightning_peft import save_adapter
from lightning_peft.cli import main
from lightning_peft.harness import AdaptedLM

TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    "metric_list: [{metric: acc}]",
    "writing": "output_type: generate_until\ndoc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]",
}
ROWS = [
    {"question": "What is it?", "choices": [" It is true.", " It is not false."], "answer": 0},
    {"question": "Who is he?", "choices": [" He is she.", " It is he."], "answer": 1},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks, one of each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, settings in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ntest_split: test\nfewshot_split: test\n"
            f"dataset_kwargs: {json.dumps({'data_files': {'test': str(data)}})}\n"
            f'doc_to_text: "Q: {{{{question}}}}\\nA:"\n{settings}\n'
        )
    return folder


@pytest.fixture(scope="module")
def edit(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    add_offsets(model, "answer")
    return save_adapter(model, tmp_path_factory.mktemp("edit"))


def samples(output: Path) -> dict[str, list[dict[str, Any]]]:
    found = {path.stem.split("_")[2]: path for path in output.rglob("samples_*.jsonl")}
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in found.items()}


@pytest.fixture
def no_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the harness's own tasks, which are thousands of files, unread."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.mark.usefixtures("no_other_tasks")
def test_the_harness_runs_its_tasks_on_a_folder(
    edit: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks", *(f"local_{name}" for name in TASKS), "--include_path", str(tasks), "--num_fewshot", "0"]
    arguments += ["--batch_size", "2", "--log_samples", "--output_path", str(tmp_path), "--device", "cpu"]
    before = sys.argv
    main(["lm-eval", str(edit), "--scale", "0.5", *arguments, "--model_args", "dtype=float32"])
    assert sys.argv is before
    assert "local_choices" in capsys.readouterr().out
    written = samples(tmp_path)
    lm = AdaptedLM(adapter=str(edit), scale=0.5, batch_size=2)
    for sample in written["choices"]:
        for response, (_, request) in zip(sample["filtered_resps"], sample["arguments"].items(), strict=True):
            pair = request["arg_0"], request["arg_1"]
            [(score, _)] = lm._loglikelihood_tokens([(pair, *lm._encode_pair(*pair))], disable_tqdm=True)
            assert float(response[0]) == pytest.approx(score, abs=1e-4)
    assert len(written["writing"]) == 2
    [results] = [json.loads(path.read_text()) for path in tmp_path.rglob("results_*.json")]
    assert results["config"]["adapter"] == str(edit) and results["config"]["scale"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist."),
        (["{edit}", "--scale", "0.5", "--model", "hf"], "--model is set by this command"),
        (["{edit}", "--model=hf"], "--model is set by this command"),
        (["{edit}", "--positions", "some"], "positions"),
        (["{model}", "--scale", "0.5"], "is a whole model and no adapter: leave --scale out."),
    ],
)
def test_what_cannot_be_used_ends_in_a_sentence(
    arguments: list[str], sentence: str, edit: Path, tiny_folder: Callable[[str], Path]
) -> None:
    given = [argument.format(edit=edit, model=tiny_folder("llama")) for argument in arguments]
    with pytest.raises(SystemExit, match=r"^lightning-peft lm-eval: ") as error:
        main(["lm-eval", *given, "--tasks", "none"])
    assert sentence in str(error.value)


def test_an_adapter_for_another_base_is_refused_before_the_harness_reads_anything(
    edit: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", read := Mock())
    with pytest.raises(SystemExit, match=r"^lightning-peft lm-eval: .* was made for another base model: their param"):
        main(["lm-eval", str(edit), "--base", str(tiny_folder("gpt2")), "--tasks", "none"])
    assert not read.called
    main(["lm-eval", str(edit), "--base", str(tiny_folder("llama")), "--tasks", "none"])
    main(["lm-eval", str(edit), "--base", str(tiny_folder("gpt2")), "--tasks", "none", "--model_args", "strict_base=0"])
    assert read.call_count == 2


def test_without_the_harness_a_sentence_names_what_to_install(edit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lightning_peft.harness")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(SystemExit, match=r"is not installed: pip install 'lightning-peft\[harness\]'\.$"):
        main(["lm-eval", str(edit), "--tasks", "none"])
