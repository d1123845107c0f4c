"""Chats as they stand in files, read as messages with a role and a content, and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

from lightning_peft.files.data_error import DataError

Message = dict[str, str]

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def read_messages(value: object, where: str) -> list[Message]:
    """Return a chat as messages: at most one of the system, then a user's and an assistant's by turns.

    Roles and texts are read as OpenAI has them (`role`, `content`, which may be a list of parts of text) and as
    ShareGPT has them (`from`, `value`; `human` and `gpt`). Other keys with texts, such as `reasoning_content`, are
    kept, for some chat templates read them. What follows the last assistant's message is left out.

    Args:
        value: a list of mappings, or the same as JSON.
        where: the file and the row, for errors.

    Raises:
        DataError: in one sentence, what of it is not such a chat.

    Example:
        >>> read_messages([{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}], "my.jsonl, row 1")
        [{'role': 'user', 'content': 'Hi.'}, {'role': 'assistant', 'content': 'Hello.'}]
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError(f"{where}: the messages are a text that is no JSON: give a list of messages.") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        kind = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise DataError(f"{where}: the messages are {kind}: give a list of messages with role and content.")
    messages = [_message(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{where}: the chat has no message of the assistant's, so there is nothing to learn from it.")
    messages = messages[: len(roles) - roles[::-1].index("assistant")]
    check_turns(messages, where)
    return messages


def check_turns(messages: Sequence[Mapping[str, str]], where: str) -> None:
    """Raise `DataError` where messages are not one of the system, if any, then the user's and assistant's by turns."""
    roles = [message["role"] for message in messages]
    first = 1 if roles and roles[0] in ("system", "developer") else 0
    for number, role in enumerate(roles[first:], first + 1):
        if role in ("system", "developer"):
            raise DataError(f"{where}: message {number} is the system's, which can only be the first.")
    if roles[first : first + 1] != ["user"]:
        begins = f"the {roles[first]}'s" if len(roles) > first else "missing"
        raise DataError(
            f"{where}: the first message after the system's, if there is one, must be the user's; it is {begins}."
        )
    for number, (before, role) in enumerate(pairwise(roles[first:]), first + 2):
        if before == role:
            raise DataError(
                f"{where}: messages {number - 1} and {number} are both the {role}'s: the user's and the assistant's "
                "must alternate; put the two into one."
            )


def _message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}: give a mapping with role and content.")
    role, content = (next((message[key] for key in keys if key in message), None) for keys in _KEYS)
    if role is None or content is None:
        keys = ", ".join(map(str, message)) or "none"
        raise DataError(f"{where} needs role and content, or from and value; its keys are {keys}.")
    if role not in _ROLES:
        raise DataError(f"{where} has the role {role!r}: it must be one of {', '.join(_ROLES)}.")
    further = {
        str(key): text for key, text in message.items() if isinstance(text, str) and key not in (*_KEYS[0], *_KEYS[1])
    }
    return {"role": _ROLES[role], "content": _text(content, where), **further}


def _text(content: object, where: str) -> str:
    """Return a message's content as one text, that of its parts where it has several."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where} has parts that are no text, such as pictures, which are not read.")
        content = "".join(map(str, texts))
    if not isinstance(content, str) or not content.strip():
        kind = "empty" if isinstance(content, str) else f"a {type(content).__name__}"
        raise DataError(f"{where} has a content that is {kind}: give a text.")
    return content


_KEYS = (("role", "from"), ("content", "value"))
