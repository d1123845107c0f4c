"""lm-evaluation-harness on saved folders: a LoRA, an edit, a baked model, each against this package's own scorers.

    python benchmarks/harness_client.py [--model FOLDER] [--questions 8]

A LoRA is trained for a few steps and exported from its checkpoint, an ITI at answer positions is computed and baked.
Each folder then answers local tasks of the harness, multiple choice and generation, through the model type
`lightning-peft`. Printed are the harness's accuracy, the largest difference of a choice's log-probability from our
scorer's for the same folder, in nats, and how many written answers are the same; and, for comparison, how far off
choices are where the harness's `hf` is given the same folder as `peft=`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_peft import bake, edit_iti, export_checkpoint, load_adapter, save_adapter
from lightning_peft.effects.token_batches import padding_of
from lightning_peft.packing.batch_scores import by_logprob
from lightning_peft.packing.generation import GreedyWriter
from lightning_peft.truthfulqa import Question, load_questions
from lightning_peft.truthfulqa.prompts import encode_pair, statement

NEW_TOKENS = 16
_TASK = """task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
{rest}
"""
_CHOICES = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: 0\nmetric_list: [{metric: acc}]"
_WRITING = (
    "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\nmetric_list: [{metric: exact_match}]\n"
    f'generation_kwargs: {{until: ["\\n"], max_gen_toks: {NEW_TOKENS}, do_sample: false}}'
)


def write_tasks(questions: Sequence[Question], folder: Path) -> None:
    """Write two tasks of the harness, `local_choices` and `local_writing`, and their rows."""
    rows = [{"question": q.text, "choices": [q.best, *q.incorrect]} for q in questions]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in (("choices", _CHOICES), ("writing", _WRITING)):
        data = json.dumps(str(folder / "rows.jsonl"))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, data=data, rest=rest))


def make_folders(model: str, questions: Sequence[Question], folder: Path) -> dict[str, dict[str, str]]:
    """Make a folder of each kind, and return the arguments of the model type for each."""
    export_checkpoint(_trained(model, questions, folder), folder / "lora")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    backbone, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    rows = [(number, q, answer, label) for number, q in enumerate(questions) for answer, label in _labelled(q)]
    edit_iti(
        backbone,
        tokenizer,
        [statement(q.text, answer) for _, q, answer, _ in rows],
        [label for *_, label in rows],
        [number for number, *_ in rows],
        num_heads=16,
        alpha=8.0,
    )
    save_adapter(backbone, folder / "iti")
    bare = AutoModelForCausalLM.from_pretrained(model)
    bake(bare, folder / "iti", folder / "baked", tokenizer=model)
    return {
        "an exported LoRA": {"pretrained": model, "adapter": str(folder / "lora")},
        "an ITI at answer positions": {"pretrained": model, "adapter": str(folder / "iti")},
        "the ITI, baked": {"pretrained": str(folder / "baked")},
    }


def _labelled(question: Question) -> list[tuple[str, int]]:
    return [(answer, 1) for answer in question.correct[:2]] + [(answer, 0) for answer in question.incorrect[:2]]


def _trained(model: str, questions: Sequence[Question], folder: Path) -> Path:
    """Train a LoRA for two steps at a high rate, so that it shows; return the checkpoint."""
    import lightning as L

    from lightning_peft.callbacks import LoRA
    from lightning_peft.models import CausalLM

    module = CausalLM(model, learning_rate=1e-2)
    batches: Any = []
    for question in questions[:2]:
        ids, prompt = encode_pair(module.tokenizer, f"Q: {question.text}\nA:", f" {question.best}")
        row = torch.tensor([ids])
        labels = row.masked_fill(torch.arange(len(ids)) < prompt, -100)
        batches.append({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        callbacks=[LoRA(r=4)], max_epochs=1, accelerator="cpu", enable_checkpointing=False, log_every_n_steps=1, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def evaluate(lm: Any, tasks: Path) -> dict[str, Any]:
    """Run the harness's two tasks; return its results, samples among them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["local_choices", "local_writing"]
    return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0)


def choice_scores(results: Mapping[str, Any]) -> list[float]:
    """Return the harness's log-probability of every choice, question after question."""
    samples = sorted(results["samples"]["local_choices"], key=lambda sample: sample["doc_id"])
    return [float(response[0]) for sample in samples for response in sample["filtered_resps"]]


def our_scores(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[float]:
    """Return the same by this package's scorer, with prompts and tokens of its own."""
    score, scores = by_logprob(model), []
    for question in questions:
        pairs = [
            encode_pair(tokenizer, f"Q: {question.text}\nA:", f" {answer}")
            for answer in (question.best, *question.incorrect)
        ]
        rows = [torch.tensor(ids) for ids, _ in pairs]
        ids = pad_sequence(rows, batch_first=True, padding_value=padding_of(tokenizer))
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        prompts = torch.tensor([prompt for _, prompt in pairs])[:, None]
        labels = ids.masked_fill((torch.arange(ids.shape[1]) < prompts) | (mask == 0), -100)
        scores += score({"input_ids": ids, "attention_mask": mask, "labels": labels}).tolist()
    return scores


def our_answers(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    """Return what this package's writer writes after each question."""
    rows = [torch.tensor(tokenizer(f"Q: {question.text}\nA:")["input_ids"]) for question in questions]
    ids = pad_sequence(rows, batch_first=True, padding_side="left", padding_value=padding_of(tokenizer))
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    written = GreedyWriter(model, tokenizer).write(ids, mask, lambda text: "\n" in text, NEW_TOKENS)
    return [text.split("\n")[0] for text in written]


def compare(arguments: Mapping[str, str], questions: Sequence[Question], tasks: Path) -> dict[str, Any]:
    """Evaluate a folder by the harness and by this package, in float32.

    Returns:
        `acc` of the harness; `apart`, the largest difference of a choice's log-probability, in nats; `same` and
        `answers`, how many written answers are equal, of how many; `scores`, our log-probabilities.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_peft.harness import AdaptedLM

    results = evaluate(AdaptedLM(**arguments, dtype="float32", batch_size=8), tasks)
    base = arguments["pretrained"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if "adapter" in arguments:
        load_adapter(model, arguments["adapter"])
    model.eval()
    samples = sorted(results["samples"]["local_writing"], key=lambda sample: sample["doc_id"])
    theirs = [sample["filtered_resps"][0] for sample in samples]
    ours, scores = our_answers(model, tokenizer, questions), our_scores(model, tokenizer, questions)
    return {
        "acc": results["results"]["local_choices"]["acc,none"],
        "apart": _apart(choice_scores(results), scores),
        "same": sum(a == b for a, b in zip(theirs, ours, strict=True)),
        "answers": len(ours),
        "scores": scores,
    }


def as_hf(arguments: Mapping[str, str], tasks: Path) -> list[float]:
    """Return the choices' log-probabilities where the harness's own `hf` loads the folder by peft."""
    from lm_eval.models.huggingface import HFLM

    given = {"pretrained": arguments["pretrained"], "peft": arguments.get("adapter")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return choice_scores(evaluate(HFLM(**given, dtype="float32", batch_size=8, device="cpu"), tasks))


def _apart(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    options.add_argument("--questions", type=int, default=8)
    arguments = options.parse_args()
    questions = load_questions("package")[: arguments.questions]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(questions, folder)
        folders = make_folders(arguments.model, questions, folder)
        rows = []
        for kind, given in folders.items():
            row = compare(given, questions, folder)
            hf = _apart(as_hf(given, folder), row["scores"])
            rows.append((kind, f"{row['acc']:.3f}", f"{row['apart']:.1e}", f"{row['same']} of {row['answers']}", hf))
    print(f"{len(questions)} questions, {arguments.model}, float32; differences in nats")
    print(f"{'folder':<28}{'acc':>7}{'choices apart':>16}{'answers equal':>16}{'apart as hf':>14}")
    for kind, acc, apart, same, hf in rows:
        print(f"{kind:<28}{acc:>7}{apart:>16}{same:>16}{hf:>14.1e}")


if __name__ == "__main__":
    main()
