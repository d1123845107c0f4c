"""Chats as token ids, by the tokenizer's chat template, and which of the tokens are the assistant's.

The assistant's tokens are those that a model has to write when it is asked by the template: what follows the
generation prompt, up to and with the token that ends the turn. So a model that is tuned on them is asked for exactly
what it has learnt, and stops where it should.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the tag with which a template marks the assistant's tokens
_SHOWN = 40  # letters of a text that an error quotes


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template: take that of "
            "a chat model, or set its chat_template."
        )


def render_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> str:
    """Return messages as the text that the tokenizer's chat template makes of them.

    Args:
        tokenizer: with a chat template.
        messages: each with `role` and `content`.
        add_generation_prompt: end with what an answer of the assistant's begins behind.

    Raises:
        ValueError: the tokenizer has no chat template, or the template does not take the messages.
    """
    from jinja2 import TemplateError

    check_template(tokenizer)
    chat = [dict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise ValueError(f"The chat template does not take messages of {roles}: {error}.".replace("..", ".")) from error


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False
) -> list[int]:
    """Return messages as token ids; see `render_text`. Special tokens are those of the template alone."""
    return _encode(tokenizer, render_text(tokenizer, messages, add_generation_prompt))


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """Return what an answer to messages is asked by, as a text that the tokenizer takes.

    That is the template's text with its generation prompt, without the first token where the tokenizer puts that before
    every text by itself.
    """
    text, first = render_text(tokenizer, messages, add_generation_prompt=True), tokenizer.bos_token
    adds_first = first is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(first) if adds_first and first is not None else text


def encode_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: str, end: bool = True
) -> tuple[list[int], int]:
    """Encode messages with an answer to them as the assistant's turn, and count the tokens of what it is asked by.

    Args:
        tokenizer: with a chat template.
        messages: the last is the user's.
        answer: a text.
        end: with the token that ends the turn.

    Returns:
        All token ids, and how many of them are before the answer: those of `render_chat` with the generation prompt.
        What the template writes between this and the answer, such as the name of a channel, counts as the answer's.

    Raises:
        ValueError: as `render_text`, or the template does not write the answer as it is after its generation prompt.
    """
    turn = _turn(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    return _encode_turn(tokenizer, turn, turn.stop if end else turn.text_end)


def assistant_mask(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Encode a chat up to the end of its last assistant's turn, and say which tokens are the assistant's.

    They are those of all turns or, where the template writes earlier turns otherwise than it asks for them
    (without their reasoning, say), those of the last alone: see `assistant_rows`, which has a row for each turn then.

    Returns:
        Token ids `[T]`, and for each whether it is the assistant's `[T]`.

    Raises:
        ValueError: as `assistant_rows`.
    """
    return assistant_rows(tokenizer, messages)[-1]


def assistant_rows(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[tuple[list[int], list[bool]]]:
    """Encode a chat in one row, or in one for each of the assistant's turns where that takes several.

    One row is right where every turn stands in the whole chat as the model would have to write it: behind the same
    tokens as in its prompt, and the same to its end. Some templates write earlier turns otherwise: without reasoning,
    with another end token, with the system's text in the last of the user's. Then each turn has a row, in which the
    chat ends with it.

    Which tokens of a turn are the assistant's says the template's own mark (`{% generation %}`) where it has one, less
    what its generation prompt has already and with the token that ends the turn; else all that follow the generation
    prompt, up to and with that token.

    Args:
        tokenizer: with a chat template.
        messages: a user's and an assistant's by turns, perhaps after one of the system's.

    Returns:
        Of each row token ids `[T]`, and for each whether it is the assistant's `[T]`, as one or several turns have it.

    Raises:
        ValueError: as `render_text`, there is no message of the assistant's, or the template does not write one as it
            is after its generation prompt.
    """
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends:
        raise ValueError("The chat has no message of the assistant's.")
    turns = [_turn(tokenizer, messages[:end]) for end in ends]
    text = turns[-1].whole[: turns[-1].stop]
    places = [place for turn in turns for place in (len(turn.prompt), turn.stop)]
    if all(text.startswith(turn.whole[: turn.stop]) for turn in turns):
        ids = _encode(tokenizer, text)
        counts = [_count_prefix(ids, _encode(tokenizer, text[:place])) for place in places]
        if None not in counts:
            whole = [count for count in counts if count is not None]
            spans = list(zip(whole[::2], whole[1::2], strict=True))
            return [_row(tokenizer, messages[: ends[-1]], ids, spans)]
    rows = []
    for turn, end in zip(turns, ends, strict=True):
        ids, start = _encode_turn(tokenizer, turn, turn.stop)
        rows.append(_row(tokenizer, messages[:end], ids, [(start, len(ids))]))
    return rows


@dataclass(frozen=True)
class _Turn:
    """The last message of a chat, the assistant's.

    Args:
        prompt: what the model is shown when it is asked for it.
        whole: the same with the turn.
        text_end: the number of letters of `whole` at the end of the message's text.
        stop: the same with the token that ends the turn.
    """

    prompt: str
    whole: str
    text_end: int
    stop: int


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> _Turn:
    prompt = render_text(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = render_text(tokenizer, messages)
    if not whole.startswith(prompt):
        raise ValueError(
            f"The chat template asks for an answer with {prompt[-_SHOWN:]!r} at the end, but does not begin the "
            "assistant's turn so, so that what a model is to write cannot be told: give the tokenizer a chat_template "
            "whose turns begin as its generation prompt does."
        )
    turn = whole[len(prompt) :]
    text_end, stop = _turn_end(tokenizer, turn)
    if _bare(_last_line(messages[-1]["content"])) not in _bare(turn[:text_end]):
        raise ValueError(
            f"The chat template writes {turn[:text_end][-_SHOWN:]!r} for the assistant's "
            f"{messages[-1]['content'][-_SHOWN:]!r}, which can therefore not be learnt or scored through it."
        )
    return _Turn(prompt, whole, len(prompt) + text_end, len(prompt) + stop)


def _turn_end(tokenizer: PreTrainedTokenizerBase, turn: str) -> tuple[int, int]:
    """Return where the text of an assistant's turn ends, and where the turn does, with the token that ends it.

    What stands behind that token is not the model's to write: a new line, or the end of a whole chat. A turn without
    such a token ends where the template ends it.
    """
    ending = [re.escape(token) for token in _special_tokens(tokenizer, len(tokenizer)) if token in turn]
    trailing = re.search("(?:" + "|".join([r"\s", *ending]) + r")*\Z", turn)
    assert trailing is not None
    first = re.search("|".join(ending), trailing.group()) if ending else None
    return trailing.start(), len(turn) if first is None else trailing.start() + first.end()


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str, ...]:
    """Return the special tokens as texts, the longest first; `size` is that of the vocabulary, which may grow."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return tuple(sorted(filter(str.strip, special), key=len, reverse=True))


def _encode_turn(tokenizer: PreTrainedTokenizerBase, turn: _Turn, stop: int) -> tuple[list[int], int]:
    """Encode a turn with its prompt up to a letter, and count the prompt's tokens, which are as they are without it."""
    text, prompt = turn.whole[:stop], _encode(tokenizer, turn.prompt)
    ids = _encode(tokenizer, text)
    if _count_prefix(ids, prompt) is None:
        # a token would span the border, which a model that is asked by the prompt never sees
        joined, ids = ids, prompt + _encode(tokenizer, text[len(turn.prompt) :])
        if tokenizer.decode(ids) != tokenizer.decode(joined):
            raise ValueError(
                f"The tokenizer joins the end of the generation prompt, {turn.prompt[-_SHOWN:]!r}, to the answer's "
                "first token, and cannot encode the answer by itself: give it a chat_template whose generation "
                "prompt ends with a special token or a new line."
            )
    if len(ids) == len(prompt):
        raise ValueError(f"The answer {text[len(turn.prompt) :]!r} has no token.")
    return ids, len(prompt)


def _row(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, ids: list[int], spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Return ids with which of them are the assistant's, given where its last turns stand."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"][-len(spans) :]
    for (start, stop), answer in zip(spans, answers, strict=True):
        read = str(tokenizer.decode(ids[start:stop]))
        if _bare(str(tokenizer.decode(_encode(tokenizer, _last_line(answer))))) not in _bare(read):
            raise ValueError(
                f"The tokens taken for the assistant's {answer[-_SHOWN:]!r} are read as {read[-_SHOWN:]!r}: this "
                "tokenizer's chat template cannot be learnt through."
            )
    marked = _marked(tokenizer, messages, ids)
    if marked is None or not any(any(marked[start:stop]) for start, stop in spans):
        marked = [True] * len(ids)
    mask = [False] * len(ids)
    for start, stop in spans:
        mask[start:stop] = marked[start:stop]
        ends = str(tokenizer.decode(ids[stop - 1 : stop])).strip() in _special_tokens(tokenizer, len(tokenizer))
        mask[stop - 1] |= ends and any(mask[start:stop])
    return ids, mask


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Messages, ids: list[int]) -> list[bool] | None:
    """Return which tokens the template marks as the assistant's; None where it, or the tokenizer, cannot say."""
    if not tokenizer.is_fast or not _GENERATION.search(tokenizer.get_chat_template()):
        return None
    chat = [dict(message) for message in messages]
    encoded: Any = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    whole, mask = encoded["input_ids"], encoded["assistant_masks"]
    return list(map(bool, mask[: len(ids)])) if whole[: len(ids)] == ids else None


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _count_prefix(ids: list[int], prefix: list[int]) -> int | None:
    """Return the length of a prefix; None where it is none."""
    return len(prefix) if ids[: len(prefix)] == prefix else None


def _last_line(text: str) -> str:
    """Return the last line of a message, which templates keep where they leave out its reasoning."""
    return (text.strip().splitlines() or [""])[-1]


def _bare(text: str) -> str:
    """Return a text without what templates may change of it: its spaces."""
    return "".join(text.split())
