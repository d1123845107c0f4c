"""Talking to an adapted model against the same work by transformers' own `generate`, side by side in one run.

    python benchmarks/first_token.py [--model FOLDER] [--pairs 15] [--quick]

Three things, each as a ratio of paired times (median, 95 % interval by bootstrap over pairs), who comes first changing
with every pair; both sides have the same adapter on the same model, a random edit of 48 heads at answer positions, or
none.

1. First token: from the turn of a user to the first piece of text, `Conversation.ask` against `generate` with
   transformers' `TextIteratorStreamer` in a thread, each with its own rendering of the chat template; and against one
   forward pass of the plain model on the same tokens, which is the least there is to do.
2. A streamed answer to its end, against the same.
3. Answers to many prompts as chats, `answers` against `generate` on the same padded batches. Ours computes the
   beginning that the prompts share once, and takes rows that have ended out of the batch; theirs does neither.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pairs import alternately, machine, milliseconds, quiet, ratio, verdict
from steered_generation import save_edit
from transformers import TextIteratorStreamer

from lightning_peft import load_adapter
from lightning_peft.generation import AdaptedModel, Conversation, answers
from lightning_peft.generation.answers import padded_left
from lightning_peft.generation.prompts import encode, turn_ends

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a short sentence about the sea.",
    "Why is the sky blue?",
    "Give me a recipe for tea.",
    "What should I do when I am tired?",
    "Who wrote Hamlet?",
    "Explain what a verb is.",
]
BOUND = 1.1  # of the time by transformers alone, for the interval's upper end


def load(folder: str, edit: Path | None) -> AdaptedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if edit is not None:
        load_adapter(model, edit)
    return AdaptedModel(model.eval(), AutoTokenizer.from_pretrained(folder))


def their_stream(adapted: AdaptedModel, question: str, new: int, whole: bool) -> str:
    """The first piece, or all, of an answer streamed as transformers' documentation does."""
    chat = [{"role": "user", "content": question}]
    inputs = adapted.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    streamer: Any = TextIteratorStreamer(adapted.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {**inputs, "streamer": streamer, "max_new_tokens": new, "do_sample": False}
    thread = threading.Thread(target=adapted.model.generate, kwargs=options)
    thread.start()
    text = ""
    for piece in streamer:
        text += piece
        if text.strip() and not whole:
            break
    thread.join()
    return text


def our_stream(adapted: AdaptedModel, question: str, new: int, whole: bool) -> str:
    talk, text = Conversation(adapted, max_new_tokens=new), ""
    for piece in talk.ask(question):
        text += piece
        if text.strip() and not whole:
            break
    return text


def forward(adapted: AdaptedModel, question: str) -> None:
    ids = torch.tensor([encode(adapted, question, chat=True)])
    with torch.no_grad():
        adapted.model(ids, logits_to_keep=1)


def their_batches(adapted: AdaptedModel, questions: list[str], new: int, batch: int) -> list[str]:
    rows = [encode(adapted, question, chat=True) for question in questions]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    texts = [""] * len(rows)
    for begin in range(0, len(order), batch):
        numbers = order[begin : begin + batch]
        ids, mask = padded_left([rows[number] for number in numbers], adapted)
        written = adapted.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        decoded = adapted.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        for number, text in zip(numbers, decoded, strict=True):
            texts[number] = text
    return texts


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int, bound: float | None) -> None:
    ours(), theirs()
    own, other = alternately(ours, theirs, pairs)
    found = ratio(own, other)
    print(f"{name}: {milliseconds(own)} against {milliseconds(other)}: {found}", flush=True)
    if bound is not None:
        verdict(f"{name} takes at most {bound} times as long (upper end)", found.high <= bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="few short answers, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.pairs, given.new, given.batch = 2, 4, 4
    quiet()
    print(machine())
    prompts = [f"{question}{more}" for more in ("", " Be brief.", " Be kind.", " Say why.") for question in QUESTIONS]
    prompts = prompts[:4] if given.quick else prompts
    with tempfile.TemporaryDirectory() as made:
        bare = load(given.model, None)
        save_edit(bare.model, Path(made, "edit"), "answer")
        for name, edit in (("no adapter", None), ("an edit of 48 heads", Path(made, "edit"))):
            adapted = bare if edit is None else load(given.model, edit)
            print(f"\n{name}")
            question = QUESTIONS[0]
            verdict(
                "the same streamed answer",
                our_stream(adapted, question, given.new, True) == their_stream(adapted, question, given.new, True),
            )
            compare(
                "first token in a chat / a forward pass of the plain model",
                lambda: our_stream(adapted, question, 1, False),  # noqa: B023 - called at once
                lambda: forward(bare, question),  # noqa: B023
                given.pairs,
                None,
            )
            compare(
                "first token in a chat / generate of one token with a streamer",
                lambda: our_stream(adapted, question, 1, False),  # noqa: B023
                lambda: their_stream(adapted, question, 1, True),  # noqa: B023
                given.pairs,
                BOUND,
            )
            compare(
                f"an answer of {given.new} tokens, streamed",
                lambda: our_stream(adapted, question, given.new, True),  # noqa: B023
                lambda: their_stream(adapted, question, given.new, True),  # noqa: B023
                given.pairs,
                BOUND,
            )
            options: dict[str, Any] = {"chat": True, "max_new_tokens": given.new, "batch_size": given.batch}
            own = answers(adapted, prompts, **options)
            other = their_batches(adapted, prompts, given.new, given.batch)
            print(f"equal answers: {sum(map(str.__eq__, own, other))} of {len(own)}")
            compare(
                f"{len(prompts)} answers in batches of {given.batch}",
                lambda: answers(adapted, prompts, **options),  # noqa: B023
                lambda: their_batches(adapted, prompts, given.new, given.batch),  # noqa: B023
                max(2, given.pairs // 3),
                1.0,
            )
    assert turn_ends(bare, [], chat=True), "the template ends turns"


if __name__ == "__main__":
    main()
