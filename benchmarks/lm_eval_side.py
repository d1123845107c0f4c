"""lm-evaluation-harness's own TruthfulQA tasks on local questions."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.truthfulqa import Question

METRICS = ("mc1", "mc2")
_LEFT_OUT = ("task:", "dataset_path:", "dataset_name:", "include:", "tag:", "  - truthfulqa")


class Harness:
    """The real package: its YAML files and its functions, only the source of the rows replaced.

    Args:
        model: folder of a causal language model.
        batch_size: of its requests.
    """

    def __init__(self, model: str | Path, batch_size: int = 8) -> None:
        from lm_eval.models.huggingface import HFLM

        self._lm: Any = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=batch_size)

    @property
    def model(self) -> Any:
        """The model of transformers that it asks."""
        return self._lm.model

    def __call__(self, questions: Sequence[Question]) -> dict[str, list[dict[str, Any]]]:
        """Its logged samples of both tasks, `mc1` and `mc2`, in the order of the questions."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        with tempfile.TemporaryDirectory() as folder:
            _write_tasks(questions, Path(folder))
            results = lm_eval.simple_evaluate(
                self._lm,
                tasks=[f"local_{metric}" for metric in METRICS],
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                log_samples=True,
                bootstrap_iters=0,
            )
        samples = {metric: results["samples"][f"local_{metric}"] for metric in METRICS}
        return {metric: sorted(found, key=lambda sample: sample["doc_id"]) for metric, found in samples.items()}

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """What the model writes after each question in the task `truthfulqa_gen`, of which no metric is computed."""
        from lm_eval.tasks import TaskManager

        with tempfile.TemporaryDirectory() as folder:
            _write_tasks(questions, Path(folder))
            manager = TaskManager(include_path=folder, include_defaults=False)
            task = manager.load(["local_gen"])["tasks"]["local_gen"]
        task.build_all_requests()
        requests = sorted(task.instances, key=lambda request: request.doc_id)
        return self._lm.generate_until(requests, disable_tqdm=True)


def _write_tasks(questions: Sequence[Question], folder: Path) -> None:
    """The tasks' files with local rows in place of the hub's."""
    import lm_eval

    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(_row(question)) + "\n" for question in questions))
    tasks = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    shutil.copy(tasks / "utils.py", folder / "utils.py")
    source = json.dumps({"data_files": {"validation": str(data)}})
    for metric in (*METRICS, "gen"):
        lines = (tasks / f"truthfulqa_{metric}.yaml").read_text().splitlines()
        head = [f"task: local_{metric}", "dataset_path: json", f"dataset_kwargs: {source}"]
        if metric == "mc2":
            head.insert(0, "include: local_mc1.yaml")
        kept = [line for line in lines if not line.startswith(_LEFT_OUT)]
        (folder / f"local_{metric}.yaml").write_text("\n".join([*head, *kept]) + "\n")


def _row(question: Question) -> dict[str, Any]:
    row: dict[str, Any] = {"question": question.text, "correct_answers": list(question.correct)}
    row["incorrect_answers"] = list(question.incorrect)
    for metric in METRICS:
        # the harness takes the first mc1 choice for the true one
        chosen = sorted(
            (choice for choice in question.choices if getattr(choice, metric) >= 0),
            key=lambda choice: -getattr(choice, metric),
        )
        labels = [getattr(choice, metric) for choice in chosen]
        row[f"{metric}_targets"] = {"choices": [choice.text for choice in chosen], "labels": labels}
    return row
