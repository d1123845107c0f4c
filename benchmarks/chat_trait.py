"""Whether a tuned chat model shows its tuning in a chat: the form of its answers to questions that it has not seen.

    lightning-peft fit --config configs/chat_lora.yaml
    python benchmarks/chat_trait.py <the checkpoint that fit wrote>

Every question is asked through the model's chat template, with the adapter and without it, and answered greedily. An
answer has the form of `package:chats` where it begins with "Aye." and ends with "Fair winds!"; whether the model ended
it by itself is counted too.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence

import torch

from lightning_peft.data.chat_template import render_chat
from lightning_peft.models import CausalLM
from lightning_peft.stack.stack import adapters

QUESTIONS = [
    "What is the capital of Italy?",
    "How do I wash a woollen jumper?",
    "Why do leaves change their colour?",
    "What is nine times six?",
    "Can you suggest a present for my sister?",
    "How do birds find their way?",
    "What should I eat for breakfast?",
    "Tell me something about volcanoes.",
    "How do I change a flat tyre?",
    "Who discovered penicillin?",
    "What does a librarian do?",
    "Is coffee bad for me?",
    "How can I remember names better?",
    "What is a verb?",
    "Why is the sea salty?",
    "How do I fold a shirt?",
    "What is the opposite of brave?",
    "Write one sentence about winter.",
    "How long does rice take to cook?",
    "What is a good name for a dog?",
]


@torch.no_grad()
def answers(module: CausalLM, questions: Sequence[str], max_new_tokens: int = 48) -> list[tuple[str, bool]]:
    """Return each question's answer, greedy, and whether the model ended it by itself."""
    tokenizer = module.tokenizer
    prompts = [
        render_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True) for text in questions
    ]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    end = tokenizer.eos_token_id
    module.eval()
    written = module.backbone.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end
    )[:, width:]
    return [(tokenizer.decode(row, skip_special_tokens=True).strip(), bool((row == end).any())) for row in written]


def has_form(answer: str) -> bool:
    """Return whether an answer has the form of the package's chats."""
    return answer.startswith("Aye.") and answer.endswith("Fair winds!")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    module = CausalLM.load_from_checkpoint(options.checkpoint, map_location="cpu")
    asked = QUESTIONS[: options.questions]
    for name, scale in (("tuned", 1.0), ("base", 0.0)):
        adapters(module).scale(scale)
        found = answers(module, asked)
        summary = {
            "model": name,
            "questions": len(asked),
            "with the form": sum(has_form(text) for text, _ in found),
            "ended by itself": sum(ended for _, ended in found),
            "mean letters": round(sum(len(text) for text, _ in found) / len(found), 1),
        }
        print(json.dumps(summary))
        for question, (text, _) in list(zip(asked, found, strict=True))[:4]:
            print(json.dumps({"question": question, "answer": text}, ensure_ascii=False))


if __name__ == "__main__":
    main()
