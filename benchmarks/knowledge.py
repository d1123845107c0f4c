"""Facts rewritten by ROME, each alone, and by MEMIT, all at once, against the base.

    python benchmarks/knowledge.py [--model FOLDER_OR_NAME] [--layer 5] [--choose 2,5,9]

The facts are this package's own counterfactual ones. Every thirteenth is set aside to choose the layer on: `--choose`
prints the causal trace and ROME's scores on those alone, for each layer named, and ends. Otherwise the key covariance
is read from the package's neutral prose and one value a fact is searched for; ROME writes each fact alone, MEMIT writes
the same values all at once into the layers that end there. Prints efficacy, paraphrase and neighbourhood with Wilson
intervals at 95% and the mean difference of probabilities, and the cross-entropy on prose that the covariance was not
read from. About ten minutes on one idle core.
"""

from __future__ import annotations

import argparse
import functools
import logging
import operator
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.editing.facts import (
    Fact,
    FactScores,
    Search,
    causal_trace,
    compute_memit,
    compute_rome_each,
    find_values,
    key_moments,
    random_prefixes,
    read_facts,
    score_facts,
)
from lightning_peft.effects import text_slice
from lightning_peft.models import CausalLM
from lightning_peft.stack.stack import stack_of

KINDS = ("efficacy", "paraphrase", "neighbourhood")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--facts", type=Path, help="a JSON file of facts; default the package's")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--choose", help="layers to compare on the facts set aside, e.g. 2,5,9")
    parser.add_argument("--layers", type=int, default=4, help="how many layers MEMIT changes, the last being --layer")
    parser.add_argument("--tokens", type=int, default=4000, help="that the key covariance is read from")
    parser.add_argument("--shrinkage", type=float, default=0.01)
    parser.add_argument("--prefixes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clamp", type=float, default=4.0)
    parser.add_argument("--stop", type=float, default=0.3, help="the loss at which the search of a value ends")
    parser.add_argument("--weight", type=float, help="MEMIT's mom2_update_weight; default the width of the keys")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    module = CausalLM(options.model)
    model, tokenizer = module.backbone, module.tokenizer
    facts = read_facts(options.facts)
    aside = facts[::13]
    edited = [fact for fact in facts if fact not in aside]
    documents = text_slice().documents
    held_out, read = documents[:10], documents[10:]
    prefixes = random_prefixes(read, options.prefixes, words=4)
    search = Search(v_num_grad_steps=options.steps, clamp_norm_factor=options.clamp, stop=options.stop)

    if options.choose:
        trace = causal_trace(model, tokenizer, aside, samples=2)
        print("causal trace: " + " ".join(f"{effect:.3f}" for effect in trace.tolist()), flush=True)
        for layer in map(int, options.choose.split(",")):
            moments = key_moments(model, tokenizer, read, [layer], options.tokens)
            edits = compute_rome_each(model, tokenizer, aside, moments, prefixes, search, options.shrinkage)
            show(f"layer {layer}", each_alone(model, tokenizer, aside, edits))
        return

    print(
        f"{len(edited)} facts, {len(edited[0].paraphrases)} paraphrases and {len(edited[0].neighbours)} neighbours each"
    )
    layers = list(range(options.layer - options.layers + 1, options.layer + 1))
    show("base", score_facts(model, tokenizer, edited), entropy(model, tokenizer, held_out))
    begun = time.perf_counter()
    moments = key_moments(model, tokenizer, read, layers, options.tokens)
    print(f"key covariance: {moments.count} tokens for {moments.sums.shape[-1]} features, "
          f"{time.perf_counter() - begun:.0f} s", flush=True)  # fmt: skip
    begun = time.perf_counter()
    values = find_values(model, tokenizer, edited, moments.sites[-1], prefixes, search)
    print(f"values: {sum(value.steps for value in values)} steps, {time.perf_counter() - begun:.0f} s", flush=True)
    last = moments.only(len(layers) - 1)
    edits = compute_rome_each(model, tokenizer, edited, last, prefixes, search, options.shrinkage, values)
    show(f"ROME, layer {layers[-1]}, each fact alone", each_alone(model, tokenizer, edited, edits))
    begun = time.perf_counter()
    edit = compute_memit(model, tokenizer, edited, moments, prefixes, search, options.shrinkage, options.weight, values)
    seconds = time.perf_counter() - begun
    edit.install(model, "memit")
    name = f"MEMIT, layers {layers[0]} to {layers[-1]}, all at once"
    show(name, score_facts(model, tokenizer, edited), entropy(model, tokenizer, held_out))
    print(f"MEMIT without the values: {seconds:.0f} s")


def each_alone(model: nn.Module, tokenizer: Any, facts: Sequence[Fact], edits: Sequence[Any]) -> FactScores:
    """Each fact scored with its own edit on the model and no other."""
    found = []
    for fact, edit in zip(facts, edits, strict=True):
        edit.install(model, "rome")
        found.append(score_facts(model, tokenizer, [fact]))
    stack_of(model).remove("rome")
    return functools.reduce(operator.add, found)


@torch.no_grad()
def entropy(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    """Cross-entropy in nats a token."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def show(name: str, scores: FactScores, nats: float | None = None) -> None:
    cells = []
    for kind in KINDS:
        score = scores[kind]
        share = f"{100 * score.success:.0f} [{100 * score.low:.0f}, {100 * score.high:.0f}]"
        cells.append(f"{kind} {share} % ({score.magnitude:+.2f})")
    print(f"{name:<34}" + "  ".join([*cells, f"S {100 * scores.overall:.0f}"])
          + ("" if nats is None else f"  cross-entropy {nats:.3f}"), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
