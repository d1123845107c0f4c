"""Free answers to TruthfulQA: this package's generation against lm-evaluation-harness's task `truthfulqa_gen`.

    python benchmarks/generation.py --data FOLDER [--model FOLDER] [--questions 40] [--repeats 5] [--keep FILE]

Each side is a process of its own; `turns` says how they take turns. Both write greedily, in float32, after the same
prompt, at most as many tokens as lm_eval lets a model write, 256. A side's time holds everything from questions to
texts: building prompts, tokenising, the model, cutting. BLEU and ROUGE of the texts, which the task computes too, are
left out on both sides: they are the same libraries' work.

Where they stop is not the same. lm_eval looks for a blank line and cuts there. Ours ends a row at a blank line or at
the next `Q:`, and passes over blank lines before the answer. So what is compared are answers: both texts cut as ours
are judged. Of a batch of several, lm_eval's go on until every row has had a blank line, which a row that ended with the
end token never has, so that others often run to 256 tokens; its own default, a batch of one, is therefore the default
here too, and `--their_batch 8` shows the other. Ours takes rows that have ended out of the batch.

Printed are the ratios of wall and of CPU time, the tokens of the answers and all those that went through the model, and
peak memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from pairs import verdict
from torch import nn
from turns import SIDES, Rows, Turns, Work, parser, report_costs, run

from lightning_peft.truthfulqa import Question, cut_answer


class Through:
    """Counts the tokens that a model is given, padding included."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()

    def rows(self, answers: Sequence[str], before: int) -> Rows:
        """A row for each answer, to which an equal part of the tokens since `before` is ascribed."""
        share = (self.tokens - before) / len(answers)
        return [{"answer": answer, "through": share} for answer in answers]


def ours(arguments: argparse.Namespace) -> Work:
    """This package's generator, begun anew for each chunk: the primer is computed once a chunk."""
    from lightning_peft.models import CausalLM
    from lightning_peft.truthfulqa import AnswerGenerator, Prompting, TruthfulQADataModule

    module = CausalLM(arguments.model).eval()
    through = Through(module.backbone)

    def write(questions: Sequence[Question]) -> Rows:
        prompting = Prompting("qa", max_new_tokens=arguments.tokens)
        data = TruthfulQADataModule("package", tokenizer=module.tokenizer, prompting=prompting)
        if arguments.batch:
            data.batch_size = arguments.batch
        data.test_questions = list(questions)
        data.setup()
        before, generator = through.tokens, AnswerGenerator(module.backbone, module.tokenizer)
        found = {a.question_id: a.text for batch in data.predict_dataloader() for a in generator.answer(batch)}
        return through.rows([found[question.id] for question in questions], before)

    return write


def lm_eval(arguments: argparse.Namespace) -> Work:
    """The harness and its task."""
    from lm_eval_side import Harness

    harness = Harness(arguments.model, arguments.their_batch)
    through = Through(harness.model)

    def write(questions: Sequence[Question]) -> Rows:
        before = through.tokens
        return through.rows([cut_answer(text) for text in harness.answers(questions)], before)

    return write


def report(turns: Turns, arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ratios, peaks = report_costs(turns, arguments)
    for side in SIDES:
        rows = [row for turn in turns for row in turn[side]["scores"]]
        seconds = sum(turn[side]["seconds"] for turn in turns)
        tokens = sum(len(tokenizer(row["answer"])["input_ids"]) for row in rows)
        through = sum(row["through"] for row in rows)
        print(
            f"{side}: {tokens / len(rows):.1f} tokens an answer, {through / len(rows):.0f} through the model for it; "
            f"{len(rows) / seconds:.2f} answers and {tokens / seconds:.1f} of their tokens a second"
        )
    pairs = [
        (mine["answer"], theirs["answer"])
        for turn in turns
        for mine, theirs in zip(turn["ours"]["scores"], turn["lm_eval"]["scores"], strict=True)
    ]
    equal = sum(mine == theirs for mine, theirs in pairs)
    print(f"equal answers: {equal} of {len(pairs)}")
    for mine, theirs in dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]):
        print(f"  ours    {mine!r}\n  lm_eval {theirs!r}")
    verdict("at least as fast (wall time)", ratios["seconds"] >= 1)
    verdict("at least as fast (CPU time)", ratios["cpu_seconds"] >= 1)
    verdict("peak memory not above lm_eval's", peaks["ours"] <= peaks["lm_eval"])
    verdict("the same answers", equal == len(pairs))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=256, help="that our answers have at most, as lm_eval's do")
    options.add_argument("--batch", type=int, help="questions of a batch of ours; default the data module's")
    options.add_argument("--their_batch", type=int, default=1, help="lm_eval's batch_size")
    run(options.parse_args(), {"ours": ours, "lm_eval": lm_eval}, report, ["tokens", "batch", "their_batch"])


if __name__ == "__main__":
    main()
