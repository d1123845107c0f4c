"""A behaviour in pairs: how much likelier an edit makes what is wanted, at what KL, beside shuffled-label directions.

    python benchmarks/behaviour.py cells --model FOLDER [--pairs docs/mending.jsonl] [--draws 19] [--output FOLDER]
    python benchmarks/behaviour.py report [--output FOLDER]

The first adapts one model: CAA and ITI computed from the training pairs, and from the same pairs with labels shuffled
within pairs, draw after draw. Each direction's strength is found at which KL(base || edited) on neutral text is as
asked, and the held-out pairs are scored there. Each direction is a cell, a small JSON file that is not made again. The
second reads the cells of all models and prints and writes `results.json`. What was expected of it is in the output
folder's `plan.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pairs import quiet
from torch import Tensor

from lightning_peft.backbone.heads import head_sites
from lightning_peft.callbacks import CAA, ITI
from lightning_peft.data import ContrastPairs
from lightning_peft.editing.collect import capture_texts
from lightning_peft.effects.predictions import Predictions
from lightning_peft.effects.slices import TextSlice, text_batches, text_slice
from lightning_peft.files.records import write_record
from lightning_peft.models import CausalLM
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.positions import plain_text
from lightning_peft.stack.computed import ComputedAdapter
from lightning_peft.stack.stack import adapters, stack_of

BUDGETS = (0.1, 0.25, 0.5)  # nats a token
TOLERANCE = 0.05  # of a budget, within which a strength is taken
MOST_STEPS = 8  # measurements of KL for one budget
HELD_OUT = 0.4  # of the pairs
SHARE = 1 / 6  # of the heads that ITI moves
METHODS = ("caa", "iti")
_CHUNK = 128  # tokens whose log-probabilities over the vocabulary are compared at once


class NeutralText:
    """KL(base || edited) per token of a slice of neutral text, of which the base is run once.

    Args:
        module: a language model with its tokenizer, without adapters.
        text: the slice.
    """

    def __init__(self, module: CausalLM, text: TextSlice) -> None:
        self.backbone = module.backbone
        self.batches = list(text_batches(text, module.tokenizer))
        with torch.no_grad():
            self.base = [logits.log_softmax(-1) for logits in self._logits()]
        self.probabilities = [logprobs.exp() for logprobs in self.base]

    @torch.no_grad()
    def kl(self) -> float:
        """Return the KL of the model as it is now, in nats a token."""
        total, tokens = 0.0, 0
        for base, p, logits in zip(self.base, self.probabilities, self._logits(), strict=True):
            # log E exp(d - E d), d = logits - log p: no two large sums are subtracted, and p may sum to 1 + 1e-5
            mass, d = p.sum(-1, keepdim=True), logits.sub_(base)
            d.sub_((p * d).sum(-1, keepdim=True) / mass)
            total += float(((p * d.exp_()).sum(-1, keepdim=True) / mass).double().log().sum())
            tokens += len(base)
        return total / tokens

    def _logits(self) -> Iterator[Tensor]:
        """Yield float32 logits `[N, vocabulary]` of some tokens after the other."""
        for batch in self.batches:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            rows, columns = (mask[:, :-1] * mask[:, 1:]).nonzero(as_tuple=True)
            with plain_text(self.backbone):
                predictions = Predictions(self.backbone, ids, mask)
            for start in range(0, len(rows), _CHUNK):
                states = predictions.kept[rows[start : start + _CHUNK], columns[start : start + _CHUNK]]
                logits = states if predictions.head is None else predictions.head(states[None])[0]
                yield logits.float()


def strength_at(
    kl: Callable[[float], float], budget: float, tried: dict[float, float], start: float = 1.0
) -> tuple[float, float]:
    """Return the strength at which KL is a budget, and the KL measured there.

    Small strengths cost in proportion to their square, so the next one tried is on the line through the two nearest
    measurements in logarithms, or on one of slope 2 through a single one; between a strength too small and one too
    large it never leaves the two.

    Args:
        kl: measures a strength.
        budget: in nats a token.
        tried: measurements so far by strength, to which new ones are added.
        start: the first strength, where there is none yet.

    Example:
        >>> alpha, found = strength_at(lambda alpha: 0.01 * alpha**2, 0.25, {})
        >>> round(alpha, 6), round(found, 6)
        (5.0, 0.25)
    """
    for _ in range(MOST_STEPS):
        if tried:
            nearest = min(tried, key=lambda alpha: abs(math.log(max(tried[alpha], 1e-12) / budget)))
            if abs(tried[nearest] / budget - 1) <= TOLERANCE:
                break
            below = max((alpha for alpha, value in tried.items() if value < budget), default=None)
            above = min((alpha for alpha, value in tried.items() if value >= budget), default=None)
            if below is not None and above is not None and below < above:
                slope = math.log(tried[above] / max(tried[below], 1e-12)) / math.log(above / below)
                alpha = below * math.exp(math.log(budget / max(tried[below], 1e-12)) / max(slope, 0.1))
                if not below < alpha < above:
                    alpha = math.sqrt(below * above)
            else:
                ends = sorted(tried, reverse=below is not None)[:2]  # the two nearest to where it must lie
                slope = 2.0
                if len(ends) == 2 and tried[ends[0]] != tried[ends[1]]:
                    slope = math.log(tried[ends[0]] / max(tried[ends[1]], 1e-12)) / math.log(ends[0] / ends[1])
                ratio = (budget / max(tried[ends[0]], 1e-12)) ** (1 / min(max(slope, 0.5), 8.0))
                alpha = ends[0] * min(max(ratio, 0.05), 20.0)
        else:
            alpha = start
        if alpha in tried:
            break
        tried[alpha] = kl(alpha)
    nearest = min(tried, key=lambda alpha: abs(math.log(max(tried[alpha], 1e-12) / budget)))
    return nearest, tried[nearest]


@dataclass
class Pairs:
    """The pairs of a file, encoded for a model: what edits are computed from, and what they are scored on."""

    train: dict[str, Tensor]
    held_out: dict[str, Tensor]
    prompts: list[str]  # of the held-out pairs

    @classmethod
    def of(cls, path: str, module: CausalLM) -> Pairs:
        data = ContrastPairs(path, tokenizer=module.tokenizer, val_fraction=HELD_OUT)
        data.setup()
        train = data.collate(data.examples("train", "statements"))
        held_out = data.collate(data.examples("val", "statements"))
        places = torch.arange(held_out["input_ids"].shape[1])
        answer = (places > held_out["prompt_end"][:, None]) & held_out["attention_mask"].bool()
        held_out["labels"] = held_out["input_ids"].where(answer, -100)
        return cls(train, held_out, data.prompts())


class Subject:
    """One model, with what all of its directions share.

    Args:
        folder: the model's.
        pairs: the file of pairs.
        tokens: of neutral text.
    """

    def __init__(self, folder: str, pairs: str, tokens: int) -> None:
        self.module = CausalLM(folder).eval()
        self.backbone = self.module.backbone
        self.pairs = Pairs.of(pairs, self.module)
        self.neutral = NeutralText(self.module, text_slice(tokens=tokens, length=32))
        self.read: dict[str, Tensor] = {}

    def computed(self, name: str, draw: int | None) -> ComputedAdapter:
        """Return an edit of strength 1, from the labels or from those of a draw, shuffled within pairs."""
        method: CAA | ITI = CAA(name="edit")
        if name == "iti":
            heads = sum(site.num_heads for site in head_sites(self.backbone))
            method = ITI(num_heads=max(1, round(SHARE * heads)), alpha=1.0, name="edit")
        sites, batch = method.find_sites(self.backbone), self.pairs.train
        if name not in self.read:
            masks = batch["attention_mask"].bool()
            rows = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
            self.read[name] = capture_texts(self.backbone, list(sites), rows).values
        return method.edit(self.read[name], shuffled(batch["label"], batch["group"], draw), batch["group"], sites)

    def score(self) -> dict[str, list[float]]:
        """Return the log-probabilities of both texts of each held-out pair, in nats."""
        batch, scorer = self.pairs.held_out, ChoiceScorer(self.backbone)
        scores = scorer.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
        return {
            "wanted": [round(float(score), 5) for score in scores[batch["label"] == 1]],
            "unwanted": [round(float(score), 5) for score in scores[batch["label"] == 0]],
        }

    def answers(self, count: int = 4, tokens: int = 40) -> list[str]:
        """Return what the model writes to the first held-out prompts, greedily."""
        tokenizer, written = self.module.tokenizer, []
        for prompt in self.pairs.prompts[:count]:
            special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=special)["input_ids"]
            end = self.backbone.generate(ids, max_new_tokens=tokens, do_sample=False)
            written.append(tokenizer.decode(end[0, ids.shape[1] :], skip_special_tokens=True))
        return written


def shuffled(label: Tensor, group: Tensor, draw: int | None) -> Tensor:
    """Return the labels, or with a draw those of which each pair's two are exchanged with probability one half."""
    if draw is None:
        return label
    flips = torch.rand(int(group.max()) + 1, generator=torch.Generator().manual_seed(draw)) < 0.5
    return torch.where(flips[group], 1 - label, label)


def cell(subject: Subject, method: str, draw: int | None, budgets: Sequence[float], start: float) -> dict[str, Any]:
    """Compute a direction, find its strengths, and score the held-out pairs at each."""
    begin = time.perf_counter()
    stack = stack_of(subject.backbone)
    stack.put("edit", subject.computed(method, draw))
    tried: dict[float, float] = {}

    def kl(alpha: float) -> float:
        stack.scale(alpha, "edit")
        return subject.neutral.kl()

    points = []
    for budget in budgets:
        alpha, value = strength_at(kl, budget, tried, start)
        stack.scale(alpha, "edit")
        points.append({"budget": budget, "alpha": alpha, "kl": value, **subject.score()})
        if draw is None and budget == budgets[len(budgets) // 2]:
            points[-1]["answers"] = subject.answers()
    adapters(subject.backbone).remove("edit")
    return {"points": points, "tried": sorted(tried.items()), "seconds": round(time.perf_counter() - begin, 1)}


def run_cells(arguments: argparse.Namespace) -> None:
    name = Path(arguments.model).name
    key = hashlib.sha256(Path(arguments.pairs).read_bytes()).hexdigest()[:16]
    key += f"-{arguments.tokens}-{'-'.join(map(str, arguments.budgets))}"
    folder = Path(arguments.output) / "cells"
    subject: Subject | None = None
    wanted: list[tuple[str, int | None]] = [("base", None)]
    wanted += [(method, draw) for draw in (None, *range(arguments.draws)) for method in METHODS]
    start = dict.fromkeys(METHODS, 1.0)
    for method, draw in wanted:
        path = folder / f"{name}-{method}-{'labels' if draw is None else f'draw{draw:02}'}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("key") != key:
            subject = subject or Subject(arguments.model, arguments.pairs, arguments.tokens)
            if method == "base":
                found = {"points": [{"budget": 0.0, "kl": 0.0, **subject.score(), "answers": subject.answers()}]}
                found["prompts"] = subject.pairs.prompts
            else:
                found = cell(subject, method, draw, arguments.budgets, start[method])
            found = {"model": name, "method": method, "draw": draw, "key": key, **found}
            write_record(path, found)
            print(f"{path.stem}: {found.get('seconds', 0)} s", flush=True)
        if method != "base":
            start[method] = found["points"][0]["alpha"]  # of the last direction, which saves a measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cells", "report"))
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", default="docs/mending.jsonl")
    parser.add_argument("--output", default="docs/results/behaviour")
    parser.add_argument("--draws", type=int, default=19)
    parser.add_argument("--tokens", type=int, default=256, help="of neutral text")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="of KL, in nats a token")
    arguments = parser.parse_args()
    quiet()
    if arguments.what == "cells":
        run_cells(arguments)
    else:
        from behaviour_report import report

        report(Path(arguments.output))


if __name__ == "__main__":
    main()
