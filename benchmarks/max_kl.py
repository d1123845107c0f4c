"""What it costs to find the strength within a budget of KL, beside plain calls of the model on the same texts.

    python benchmarks/max_kl.py --model models/SmolLM2-135M-Instruct

For a CAA at the middle layer and an ITI it prints what `strength_within` takes, as a multiple of one plain forward call
on the texts (logits of every token, nothing measured), and what the same strengths take when each is measured by
`effects.kl`, which knows nothing of the others. Rounds of all three take turns; the median is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_peft import adapters, edit_caa, edit_iti, plain_text, strength_within
from lightning_peft.effects import TextSettings, kl
from lightning_peft.effects.token_batches import token_batches

THINGS = {"snow": "white", "coal": "black", "grass": "green", "blood": "red", "the sky": "blue", "a lemon": "yellow"}


def statements() -> tuple[list[str], list[int], list[int]]:
    """Return texts, labels and groups about colours."""
    rows = [
        (f"Q: What color is {thing}? A: It is {other}.", int(other == color), number)
        for number, (thing, color) in enumerate(THINGS.items())
        for other in THINGS.values()
    ]
    texts, label, group = zip(*rows, strict=True)
    return list(texts), list(label), list(group)


def seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of this process, which other processes on the machine change least."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--max_kl", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    text = TextSettings(tokens=options.tokens).text()
    assert text is not None
    batches = list(token_batches([tokenizer(document)["input_ids"] for document in text.documents]))
    given = (model, tokenizer, *statements())

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            with plain_text(model):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    print(f"{options.tokens} tokens, max_kl={options.max_kl:g}, {options.rounds} rounds")
    for name in ("caa", "iti"):
        if name == "caa":
            edit_caa(*given, multiplier=8.0)
        else:
            edit_iti(*given, num_heads=48, alpha=60.0, val_fraction=0.5)
        found = strength_within(model, options.max_kl, tokenizer, name, list(text.documents))

        def one_by_one(name: str = name, tried: Any = found.tried) -> None:
            for scale, _ in tried:
                adapters(model).scale(scale, name)
                kl(model, name, text, tokenizer)
            adapters(model).scale(1.0, name)

        def search(name: str = name) -> None:
            strength_within(model, options.max_kl, tokenizer, name, list(text.documents))

        rounds = [[seconds(work) for work in (plain, search, one_by_one)] for _ in range(options.rounds)]
        once, searched, each = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"{name}: KL {found.kl:.3f} at {found.scale:.4f} of the strength asked for, {len(found.tried)} tried; "
            f"search {searched / once:.1f} plain calls, one by one {each / once:.1f} ({each / searched:.2f} times as "
            f"long); a plain call takes {once:.2f} s"
        )
        adapters(model).remove(name)


if __name__ == "__main__":
    main()
