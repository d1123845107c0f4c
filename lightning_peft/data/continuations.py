"""A prompt with an answer behind it, as token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_peft.data.chat_template import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], int]:
    """Encode a prompt and its answer as one text, and count the tokens of the prompt.

    A token that spans the boundary belongs to the answer, as do end tokens that the tokenizer adds behind a text.

    Args:
        tokenizer: of the model.
        prompt: the text before the answer; one that begins with the tokenizer's own first token is given no other.
        answer: the text behind it, with the space between the two, if any.

    Returns:
        All token ids, and how many are the prompt's.

    Raises:
        ValueError: the answer adds no token.
    """
    special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
    whole = list(tokenizer(prompt + answer, add_special_tokens=special)["input_ids"])
    alone = list(tokenizer(prompt, add_special_tokens=special)["input_ids"]) if prompt else []
    pairs = zip(whole, alone, strict=False)
    shared = next((i for i, (token, other) in enumerate(pairs) if token != other), min(len(whole), len(alone)))
    if len(whole) <= shared:
        raise ValueError(f"The answer {answer!r} adds no token to its prompt.")
    return whole, shared


def as_user_turn(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return a prompt as a user's turn in the tokenizer's chat template, up to where the assistant begins.

    The text is what the tokenizer takes: without the first token that it puts before every text by itself.
    """
    return prompt_text(tokenizer, [{"role": "user", "content": prompt}])
