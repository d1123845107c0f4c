"""How few questions ITI needs, and whether a direction learnt on one question set serves another.

    python benchmarks/few_examples.py --data FOLDER_WITH_mc_task.json [--model FOLDER_OR_NAME] [--questions 150]

ITI is computed from the training half of TruthfulQA, from 40 questions of it (5% of all), and from the training half of
this package's own questions; each edit is scored on unseen questions of both sets. Prints the gain over the base model
in MC1 and MC2 with 95% paired bootstrap intervals over questions, and the difference between few and many examples.
About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import lightning as L
from torch import Tensor

from lightning_peft.callbacks import ITI
from lightning_peft.compare.statistics import paired_difference
from lightning_peft.models import CausalLM
from lightning_peft.stack.stack import adapters
from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule
from lightning_peft.truthfulqa.metrics import mc1, mc2
from lightning_peft.truthfulqa.questions import subset

Scores = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or file of a TruthfulQA release")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--few", type=int, default=40, help="questions of the small training set")
    parser.add_argument("--questions", type=int, default=150, help="questions tested, of each set")
    parser.add_argument("--num-heads", type=int, default=48)
    parser.add_argument("--alpha", type=float, default=15.0)
    parser.add_argument("--output", type=Path, help="also write the scores there, as JSON")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    L.seed_everything(0, verbose=False)
    module = CausalLM(options.model)
    sets = {"TruthfulQA": options.data, "package": "package"}
    data = {name: prepared(module, source) for name, source in sets.items()}
    few = prepared(module, options.data)
    few.train_questions, few.val_questions = subset(few.fold_questions, options.few), []
    trained = {f"TruthfulQA, {options.few}": few}
    trained |= {f"{name}, {len(each.fold_questions)}": each for name, each in data.items()}

    found: dict[str, dict[str, Scores]] = {"base": {n: scores(module, d, options.questions) for n, d in data.items()}}
    for name, source in trained.items():
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "max_epochs": 1}
        iti = ITI(num_heads=options.num_heads, alpha=options.alpha)
        trainer = L.Trainer(callbacks=[iti], accelerator="cpu", limit_val_batches=0, enable_progress_bar=False, **quiet)  # type: ignore[arg-type]
        trainer.fit(module, datamodule=source)
        found[name] = {n: scores(module, d, options.questions) for n, d in data.items()}
        for tested in data:
            report(name, tested, found[name][tested], found["base"][tested])
        adapters(module).remove("iti")
    small, large, *_ = trained
    for tested in data:
        report(f"{small} - {large}", tested, found[small][tested], found[large][tested])
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def prepared(module: CausalLM, source: str) -> TruthfulQADataModule:
    """Questions in two halves, the first of them tested."""
    data = TruthfulQADataModule(source=source, train="statements", tokenizer=module.tokenizer, questions_per_batch=1)
    data.setup()
    return data


def scores(module: CausalLM, data: TruthfulQADataModule, questions: int) -> Scores:
    """MC1 and MC2 of the first test questions, one number a question."""
    scorer, found = ChoiceScorer(module.backbone.eval()), Scores(mc1=[], mc2=[])
    for batch, _ in zip(data.test_dataloader(), range(questions), strict=False):
        logprobs: Tensor = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
        found["mc1"].append(mc1(logprobs, batch["mc1"]))
        found["mc2"].append(mc2(logprobs, batch["mc2"]))
    return found


def report(name: str, tested: str, scored: Scores, base: Scores) -> None:
    """One line: the mean differences and their intervals."""
    parts = []
    for metric in ("mc1", "mc2"):
        gain = paired_difference(scored[metric], base[metric])
        parts.append(f"{metric.upper()} {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
    print(f"ITI from {name:<24} tested on {tested:<11} ({len(base['mc1'])})  {'  '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
