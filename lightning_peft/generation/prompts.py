"""Prompts as tokens: plain text, or a chat in the model's own template; what cannot be answered is said first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_peft.backbone.window import context_window
from lightning_peft.data.chat_template import encode_turn, render_chat
from lightning_peft.generation.adapted import AdaptedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]  # with `role` and `content`
Prompt = str | Sequence[Message]


class PromptError(ValueError):
    """A prompt cannot be answered by this model; the message says which, and why."""


def encode(
    adapted: AdaptedModel, prompt: Prompt, system: str | None = None, chat: bool = False, where: str = "The prompt"
) -> list[int]:
    """Return a prompt's tokens.

    Args:
        adapted: the model.
        prompt: a text, or the messages of a chat (`{"role": "user", "content": "…"}`), the user's last.
        system: a message before the others, which tells a chat model how to behave.
        chat: whether a text is put as a user's turn in the model's chat template; messages always are.
        where: the prompt stands, for messages: `"my.jsonl, row 3"`.

    Raises:
        PromptError: it is empty, longer than the model can read, or the model has no chat template, or one that
            refuses such messages.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError(f"{where} is empty.")
        messages: Sequence[Message] = [{"role": "user", "content": prompt}]
    else:
        chat, messages = True, _checked(prompt, where)
    if chat:
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        ids = _render(adapted, messages, where)
    elif system is not None:
        raise PromptError(
            "A system message is part of a chat: ask for one (--chat, the argument chat), or leave it out."
        )
    else:
        ids = list(adapted.tokenizer(str(prompt))["input_ids"])
    if not ids:
        raise PromptError(f"{where} has no tokens.")
    room_behind(adapted, len(ids), where)
    return ids


def check_chats(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `PromptError` where a model has no chat template; `name` is what the message calls it."""
    if not tokenizer.chat_template:
        raise PromptError(
            f"{name} has no chat template, being no chat model: give it plain text (lightning-peft generate without "
            "--chat), or name a base that was tuned for chats."
        )


def turn_ends(adapted: AdaptedModel, prompts: Iterable[Prompt], chat: bool) -> list[int]:
    """Return the token that ends a turn in the model's chat template, where any of the prompts is a chat.

    A model that is tuned on chats of a template writes it, whether or not its configuration knows it for an end.
    """
    if not (chat or any(not isinstance(prompt, str) for prompt in prompts)):
        return []
    try:
        ids, _ = encode_turn(adapted.tokenizer, [{"role": "user", "content": "Hello."}], "Yes")
    except ValueError:  # a template that writes other turns than it asks for
        return []
    special = {token for token, added in adapted.tokenizer.added_tokens_decoder.items() if added.special}
    return [token for token in ids[-1:] if token in special]


def room_behind(adapted: AdaptedModel, length: int, where: str = "The prompt") -> int | None:
    """Return how many tokens the model can write behind a prompt; None where there is no limit.

    Raises:
        PromptError: the prompt fills the model's window or more.
    """
    window = context_window(adapted.model)
    if window is None:
        return None
    if adapted.is_encoder_decoder:  # what is written does not stand in the window of what is read
        if length > window.tokens:
            raise PromptError(_too_long(adapted, where, length, window.tokens))
        return None
    if length > window.tokens:
        raise PromptError(_too_long(adapted, where, length, window.tokens))
    return window.tokens - length + 1  # the last one is not read again


def _too_long(adapted: AdaptedModel, where: str, length: int, tokens: int) -> str:
    return (
        f"{where} has {length:,} tokens, more than the {tokens:,} that {type(adapted.model).__name__} reads at once: "
        "shorten it."
    )


def _checked(messages: Sequence[Message], where: str) -> Sequence[Message]:
    """Return messages that are a chat whose next turn is the model's.

    Raises:
        PromptError: they are something else.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise PromptError(f'{where}: each message needs "role" and "content", got {str(message)[:60]}.')
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise PromptError(f"{where}: a message of the {message['role']} is empty or no text.")
    if not messages or messages[-1]["role"] != "user":
        last = messages[-1]["role"] if messages else "nobody"
        raise PromptError(f"{where} ends with a message of {last}: the last one must be the user's, to be answered.")
    return messages


def _render(adapted: AdaptedModel, messages: Sequence[Message], where: str) -> list[int]:
    check_chats(adapted.tokenizer, adapted.name)
    try:
        return render_chat(adapted.tokenizer, messages, add_generation_prompt=True)
    except ValueError as error:
        raise PromptError(f"{where} is no chat for {adapted.name}: {str(error).rstrip('.')}.") from error
