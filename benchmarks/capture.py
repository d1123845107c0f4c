"""Reading all heads at the last token of every statement, against the reference's way.

    python benchmarks/capture.py --data FOLDER_WITH_mc_task.json [--model FOLDER] [--limit QUESTIONS] [--rounds 3]

The reference (Li et al. 2023, honest_llama) runs one statement a forward, its language-model head too, and asks for
all hidden states. Both sides run in float32 on the same model with the same hooks' points; who comes first changes with
every round. Prints both times, their ratio, and how far the activations differ; and, for what it is worth, the time in
bfloat16. About 25 minutes for the 5,882 statements of the first release on two cores; `--limit 20` takes two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from pairs import alternately, machine, quiet, ratio, verdict
from torch import Tensor

from lightning_peft.editing import HeadSite, capture_texts, head_sites
from lightning_peft.truthfulqa.prompts import statement
from lightning_peft.truthfulqa.questions import load_questions

BOUND = 5.0


def one_by_one(model: Any, sites: Sequence[HeadSite], texts: Sequence[list[int]]) -> Tensor:
    """The reference's way, but for keeping all hidden states of all texts, for which there would be no room."""
    rows = []
    for tokens in texts:
        read: list[Tensor] = []
        modules = [model.get_submodule(site.name) for site in sites]
        handles = [m.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0])) for m in modules]
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        for handle in handles:
            handle.remove()
        rows.append(torch.stack([x[0, -1].float().cpu() for x in read]))
    return torch.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="package", help="folder or file of a TruthfulQA release")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--limit", type=int, help="questions, the first of them; default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    texts = [
        tokenizer(statement(question.text, choice.text))["input_ids"]
        for question in load_questions(options.data)[: options.limit]
        for choice in question.choices
        if choice.mc2 >= 0
    ]
    sites = head_sites(model)
    heads = sum(site.num_heads for site in sites)
    print(f"{machine()}\n{len(texts)} statements of {sum(map(len, texts))} tokens, {heads} heads")

    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["ours"] = capture_texts(model, sites, texts).values.flatten(2)

    def theirs() -> None:
        found["theirs"] = one_by_one(model, sites, texts)

    capture_texts(model, sites, texts[:8])  # warm up
    one_by_one(model, sites, texts[:8])
    mine, others = alternately(ours, theirs, options.rounds)
    times = ratio(others, mine)
    difference = float((found["ours"] - found["theirs"]).abs().max() / found["theirs"].abs().max())
    print(f"ours {statistics.median(mine):.1f} s, one by one {statistics.median(others):.1f} s: {times} times as fast")
    begin = time.perf_counter()
    coarse = capture_texts(model, sites, texts, autocast=True).values.flatten(2)
    cosine = torch.cosine_similarity(coarse, found["theirs"], dim=-1)
    print(f"in bfloat16 {time.perf_counter() - begin:.1f} s, cosine with float32 at least {float(cosine.min()):.4f}")
    verdict(f"the same activations to 1e-5 of the largest (they differ by {difference:.1e})", difference <= 1e-5)
    verdict(f"at least {BOUND} times as fast", times.median >= BOUND)


if __name__ == "__main__":
    main()
