"""MC1 and MC2 of TruthfulQA: this package's scorer against lm-evaluation-harness, on the same questions.

    python benchmarks/harness.py --data FOLDER [--model FOLDER] [--questions 40] [--repeats 5]     the median of five
    python benchmarks/harness.py --data FOLDER --model models/gemma-3-270m --repeats 1 --times 20 --output FILE
    python benchmarks/harness.py --data FOLDER --questions 817 --repeats 1 --keep FILE              every question, once

Each side is a process of its own; `turns` says how they take turns. A side's time holds everything from questions to
scores: building prompts, tokenising, the model, the metrics. Printed are the ratios of wall and of CPU time, peak
memory, and the largest differences of log-probabilities and scores. With `--keep`, finished chunks are written to a
file and not done again by a later call.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pairs import machine, verdict
from turns import SIDES, Rows, Turns, Work, parser, report_costs, run

from lightning_peft.truthfulqa import Question


def ours(arguments: argparse.Namespace) -> Work:
    """This package's scorer, begun anew for each chunk: the primer is computed once a chunk."""
    from lightning_peft.models import CausalLM
    from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule
    from lightning_peft.truthfulqa.metrics import mc1, mc2

    module = CausalLM(arguments.model, dtype=arguments.dtype).eval()

    def score(questions: Sequence[Question]) -> Rows:
        data = TruthfulQADataModule(source="package", tokenizer=module.tokenizer)
        data.test_questions = list(questions)
        data.setup()
        scorer, found = ChoiceScorer(module.backbone), []
        for batch in data.test_dataloader():
            logprobs = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
            for question in batch["group"].unique_consecutive():
                rows = batch["group"] == question
                scores = logprobs[rows]
                row: dict[str, Any] = {"mc1": mc1(scores, batch["mc1"][rows], ties="lm_eval")}
                row["mc2"] = mc2(scores, batch["mc2"][rows])
                row["logprobs"] = scores.tolist()
                found.append(row)
        for question, row in zip(questions, found, strict=True):
            row["logprobs"] = dict(zip((choice.text for choice in question.choices), row["logprobs"], strict=True))
        return found

    return score


def lm_eval(arguments: argparse.Namespace) -> Work:
    """The harness, its two tasks; always in float32, which is what the other side is held against."""
    from lm_eval_side import METRICS, Harness

    harness = Harness(arguments.model)

    def score(questions: Sequence[Question]) -> Rows:
        samples, found = harness(questions), []
        for first, second in zip(samples["mc1"], samples["mc2"], strict=True):
            row: dict[str, Any] = {"logprobs": {}}
            for metric, sample in zip(METRICS, (first, second), strict=True):
                texts = sample["doc"][f"{metric}_targets"]["choices"]
                values = [float(response[0]) for response in sample["filtered_resps"]]
                row["logprobs"] |= dict(zip(texts, values, strict=True))
                row[metric] = float(sample["acc"])
            found.append(row)
        return found

    return score


def report(turns: Turns, arguments: argparse.Namespace) -> None:
    ratios, peaks = report_costs(turns, arguments)
    print(f"ours in {arguments.dtype}")
    drift = max(
        abs(value - theirs["logprobs"][text])
        for turn in turns
        for mine, theirs in zip(turn["ours"]["scores"], turn["lm_eval"]["scores"], strict=True)
        for text, value in mine["logprobs"].items()
        if text in theirs["logprobs"]
    )
    means = {
        (side, metric): statistics.fmean(row[metric] for turn in turns for row in turn[side]["scores"])
        for side in SIDES
        for metric in ("mc1", "mc2")
    }
    for metric in ("mc1", "mc2"):
        print(f"{metric}: ours {means['ours', metric]:.6f}, lm_eval {means['lm_eval', metric]:.6f}")
    apart = max(abs(means["ours", metric] - means["lm_eval", metric]) for metric in ("mc1", "mc2"))
    print(f"largest difference of a log-probability: {drift:.1e} nats")
    asked = arguments.times
    verdict(f"at least {asked:g} times as fast (wall time)", ratios["seconds"] >= asked)
    verdict(f"at least {asked:g} times as fast (CPU time)", ratios["cpu_seconds"] >= asked)
    verdict("peak memory not above lm_eval's", peaks["ours"] <= peaks["lm_eval"])
    if arguments.dtype == "float32":
        verdict("log-probabilities equal to 1e-3, scores to 1e-4", drift <= 1e-3 and apart <= 1e-4)
    if arguments.output:
        found = {"machine": machine(), "model": arguments.model, "dtype": arguments.dtype, "ratios": ratios}
        found |= {"questions": arguments.questions, "repeats": arguments.repeats, "peak_bytes": peaks}
        found |= {"scores": {f"{side}_{metric}": mean for (side, metric), mean in means.items()}}
        found |= {"largest_difference_of_log_probabilities": drift, "largest_difference_of_scores": apart}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", default="float32", help="of our side")
    options.add_argument("--times", type=float, default=15, help="how many times as fast it is asked to be")
    options.add_argument("--output", type=Path, help="also write the numbers there, as JSON")
    run(options.parse_args(), {"ours": ours, "lm_eval": lm_eval}, report, ["dtype"])


if __name__ == "__main__":
    main()
