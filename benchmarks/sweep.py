"""A 6 x 7 grid of ITI on SmolLM2: all points together against one after the other, and against lm-evaluation-harness.

    python benchmarks/sweep.py --data FOLDER [--questions 20] [--lm_eval]

The sides take turns at a few questions, who comes first changing each time, so whatever else the machine does falls on
both. One after the other means this package's own scorer with each point as an adapter, all questions of a turn in one
call; each point has a scorer of its own, in which the primer is already computed, and putting the adapter on is not
timed. Together, the primer is computed anew each turn, and the base is scored besides, and both are timed. With
`--lm_eval` the harness scores the same questions with the base, which takes it as long as an edited model would.

Printed are the ratios of wall and of CPU time and the largest difference of a log-probability.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pairs import machine, quiet, ratio, verdict
from torch import Tensor

from lightning_peft.editing import head_sites
from lightning_peft.stack.stack import stack_of
from lightning_peft.sweep.fit import Statements, best_heads, fit
from lightning_peft.sweep.grid import Grid
from lightning_peft.sweep.settings import Sweep
from lightning_peft.sweep.texts import read_split
from lightning_peft.truthfulqa import ChoiceScorer, TruthfulQADataModule
from lightning_peft.truthfulqa.task import TruthfulQA

COUNTS, ALPHAS = [4, 8, 16, 32, 48, 96], [1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0]
Batch = dict[str, Tensor]


class Clock:
    """Wall and CPU seconds of what is done under it."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def __exit__(self, *_: Any) -> None:
        self.wall += time.perf_counter() - self._begin[0]
        self.cpu += time.process_time() - self._begin[1]


def one_by_one(backbone: Any, edit: Any, plan: Sweep, first: Batch) -> Callable[[Batch, Clock], Tensor]:
    """Scores a question at each point in turn, `[points, C]`."""
    stack, sites = stack_of(backbone), head_sites(backbone)
    warm = ChoiceScorer(backbone)
    warm.score(first["input_ids"], first["attention_mask"], first["labels"])
    # the primer is before every answer, so each point may begin with a copy of its keys and values
    scorers = {point: copy.deepcopy(warm, {id(backbone): backbone}) for point in plan.points}

    def score(batch: Batch, clock: Clock) -> Tensor:
        found = []
        for count in plan.num_heads:
            stack.put("iti", best_heads(edit, count).adapter(sites, 1.0, plan.positions))
            for alpha in plan.alphas:
                stack.scale(alpha)
                with clock:
                    scores = scorers[count, alpha].score(batch["input_ids"], batch["attention_mask"], batch["labels"])
                found.append(scores)
            stack.remove("iti")
        return torch.stack(found)

    return score


def batches_of(data: TruthfulQADataModule, questions: Sequence[Any], size: int) -> list[Batch]:
    data.test_questions, data.questions_per_batch = list(questions), size
    return list(data.test_dataloader())


def harness(model: str) -> Callable[[Sequence[Any], Clock], None]:
    from lm_eval_side import Harness

    harness = Harness(model)

    def score(questions: Sequence[Any], clock: Clock) -> None:
        with clock:
            harness(questions)

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="package", help="a folder or file of TruthfulQA, or this package's own")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--turn", type=int, default=4, help="questions of one turn")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of heads")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help="strengths")
    parser.add_argument("--learn", type=int, default=120, help="questions the interventions are computed from")
    parser.add_argument("--rows", type=int, default=7, help="points of one call")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lm_eval", action="store_true", help="time lm-evaluation-harness on the same questions too")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(arguments.threads)

    task = TruthfulQA(arguments.model, arguments.data)
    plan = Sweep("benchmark", task, arguments.counts, arguments.alphas, rows=arguments.rows)
    module = task.module().eval()
    backbone, sites = module.backbone, head_sites(module.backbone)
    data = TruthfulQADataModule(arguments.data, "statements", tokenizer=module.tokenizer)
    data.setup()
    learnt = data.fold_questions[: arguments.learn]
    data.train_questions, data.val_questions = learnt, []
    warm_up, *asked = data.test_questions[: 1 + arguments.questions]
    data.test_questions = []  # whose batches are made turn by turn
    texts = read_split(data)
    edit = fit(plan, Statements(backbone, sites, [texts]), texts)
    (first,) = batches_of(data, [warm_up], 1)  # so that what is done once only is not timed

    grid = Grid(backbone, sites, [(best_heads(edit, k), alpha) for k, alpha in plan.points], rows=plan.rows)
    list(grid.scores([first]))
    alone = one_by_one(backbone, edit, plan, first)
    other = harness(arguments.model) if arguments.lm_eval else None
    clocks: dict[str, list[Clock]] = {"together": [], "alone": [], "lm_eval": []}
    apart = 0.0
    for number, begin in enumerate(range(0, len(asked), arguments.turn)):
        turn = asked[begin : begin + arguments.turn]
        clock = {side: Clock() for side in clocks}
        (whole,), each = batches_of(data, turn, len(turn)), batches_of(data, turn, 1)

        def together(each: list[Batch] = each, clock: Clock = clock["together"]) -> Tensor:
            with clock:
                return torch.cat([scores[1:] for scores in grid.scores(each)], dim=1)

        sides: list[Callable[[], Tensor]] = [together, partial(alone, whole, clock["alone"])]
        one, two = (side() for side in (sides if number % 2 else sides[::-1]))
        apart = max(apart, float((one - two).abs().max()))
        if other is not None:
            other(turn, clock["lm_eval"])
        for side, of in clock.items():
            clocks[side].append(of)
        seconds = ", ".join(f"{side} {of.wall:.1f} s ({of.cpu:.1f} s CPU)" for side, of in clock.items() if of.wall)
        print(f"questions {begin + 1} to {begin + len(turn)}: {seconds}", flush=True)

    print(machine())
    firsts = {count: min(layer for layer, _ in best_heads(edit, count).heads) for count in plan.num_heads}
    print(f"{len(plan.points)} points, {len(asked)} questions; first edited layer by number of heads: {firsts}")
    for kind in ("wall", "cpu"):
        times = {side: [getattr(clock, kind) for clock in clocks[side]] for side in clocks}
        total = sum(times["alone"]) / sum(times["together"])
        pairs = ratio(times["alone"], times["together"])
        print(f"{kind} time, one after the other / together: all {total:.2f}, median {pairs}")
        verdict(f"at least 1.15 times as fast as one after the other ({kind} time)", total >= 1.15)
        if arguments.lm_eval:
            each = len(plan.points) * sum(times["lm_eval"]) / sum(times["together"])
            print(f"{kind} time of a point, lm_eval / together: {each:.1f}")
            verdict(f"at least 15 times as fast per point as lm_eval ({kind} time)", each >= 15)
    print(f"largest difference of a log-probability: {apart:.1e} nats")
    verdict("log-probabilities equal to 1e-3", apart <= 1e-3)


if __name__ == "__main__":
    main()
