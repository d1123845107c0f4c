"""With a chat template the answer begins behind the template's own last token, in every turn before it too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from edits import add_offsets
from lm_eval.tasks import TaskManager

from lightning_peft import load_adapter, save_adapter
from lightning_peft.harness import AdaptedLM
from lightning_peft.packing.batch_scores import by_logprob

TEMPLATE = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
ROWS = [
    {"question": "What is it?", "choices": ["It is true.", "It is not false."], "answer": 0},
    {"question": "Who is he?", "choices": ["He is she.", "It is he."], "answer": 1},
]


@pytest.fixture(scope="module")
def adapter(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    add_offsets(model, "answer")
    return save_adapter(model, tmp_path_factory.mktemp("edit"))


def samples(lm: AdaptedLM, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """What the harness asks of a task of multiple choice, and is answered."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choices.yaml").write_text(
        "task: local_choices\ndataset_path: json\ntest_split: test\nfewshot_split: test\n"
        f"dataset_kwargs: {json.dumps({'data_files': {'test': str(data)}})}\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n"
    )
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    given = {"tasks": ["local_choices"], "task_manager": tasks, "bootstrap_iters": 0, "log_samples": True}
    results = lm_eval.simple_evaluate(lm, **given, **options)
    asked: list[dict[str, Any]] = results["samples"]["local_choices"]
    return asked


@pytest.mark.parametrize("shots", [0, 1])
def test_a_templated_prompt_is_scored_as_by_our_own_scorer(adapter: Path, tmp_path: Path, shots: int) -> None:
    lm = AdaptedLM(adapter=str(adapter), batch_size=4)
    lm.tokenizer.chat_template = TEMPLATE
    turns: dict[str, Any] = {"num_fewshot": shots, "fewshot_as_multiturn": bool(shots)}
    plain = samples(lm, tmp_path, num_fewshot=shots)
    templated = samples(lm, tmp_path, apply_chat_template=True, **turns)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lm.chosen.base).eval()
    load_adapter(model, adapter)
    for before, sample in zip(plain, templated, strict=True):
        assert before["filtered_resps"] != sample["filtered_resps"]
        for (score, _), request in zip(sample["filtered_resps"], sample["arguments"], strict=True):
            assert request[0].count("Q: ") == request[0].count("A:") == shots + 1 and request[0].endswith("\nA:")
            context, continuation = lm._encode_pair(*request)
            ids = torch.tensor([context + continuation])
            labels = torch.tensor([[-100] * len(context) + continuation])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            assert score == pytest.approx(by_logprob(model)(batch).item(), abs=1e-4)
