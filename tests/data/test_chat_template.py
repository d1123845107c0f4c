"""What a chat template asks for is what is learnt: the assistant's tokens, behind the prompt that asks for them."""

from __future__ import annotations

import pytest
from chat_templates import TEMPLATES, WRITTEN, chat_tokenizer

from lightning_peft.data.chat_template import (
    Messages,
    assistant_mask,
    assistant_rows,
    encode_turn,
    render_chat,
    render_text,
)

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [{"role": "user", "content": "What is it?"}]
CHAT = [*ASKED, {"role": "assistant", "content": "Hello you."}]
LONGER = [
    *ASKED,
    {"role": "assistant", "content": "It is so."},
    {"role": "user", "content": "And you?"},
    {"role": "assistant", "content": "Hello you."},
]


def learnt(tokenizer, row: tuple[list[int], list[bool]]) -> str:
    ids, mask = row
    return tokenizer.decode([token for token, mine in zip(ids, mask, strict=True) if mine])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_tokens_are_those_that_the_model_has_to_write(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    ids, mask = row = assistant_mask(tokenizer, CHAT)
    assert learnt(tokenizer, row) == WRITTEN[name]
    assert ids[: mask.index(True)] == render_chat(tokenizer, ASKED, add_generation_prompt=True)
    assert tokenizer.decode(ids) == render_text(tokenizer, CHAT)[: len(tokenizer.decode(ids))]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_a_longer_chat_is_learnt_behind_what_it_is_asked_by(name: str) -> None:
    """In one row, or in one for each turn, it makes no difference to the tokens nor to what stands before them."""
    tokenizer = chat_tokenizer(name)
    turns = []
    for end in (2, 4):
        prompt = render_chat(tokenizer, LONGER[: end - 1], add_generation_prompt=True)
        turns.append((prompt, encode_turn(tokenizer, LONGER[: end - 1], LONGER[end - 1]["content"])[0][len(prompt) :]))
    if name == "partly":  # whose mark leaves the first turn out
        del turns[0]
    found = []
    for ids, mask in assistant_rows(tokenizer, LONGER):
        place = 0
        while True in mask[place:]:
            begin = mask.index(True, place)
            place = mask.index(False, begin) if False in mask[begin:] else len(mask)
            found.append((ids[:begin], ids[begin:place]))
    assert found == turns


@pytest.mark.parametrize(
    ("name", "messages", "rows"),
    [
        *((name, LONGER, 1) for name in ("chatml", "qwen2.5", "llama2", "mistral", "gemma", "phi3")),
        *((name, LONGER, 1) for name in ("deepseek", "smollm3", "marked", "unprompted")),
        *((name, [SYSTEM, *LONGER], 1) for name in ("chatml", "llama2", "phi3", "deepseek")),
        *((name, LONGER, 2) for name in ("qwen3", "harmony")),
        # where a prompt ends, this tokenizer has other tokens than in a longer text, of two line ends or of a space
        *((name, LONGER, 2) for name in ("llama3", "plain")),
        ("mistral", [SYSTEM, *LONGER], 2),
    ],
)
def test_a_template_that_rewrites_earlier_turns_takes_a_row_for_each(name: str, messages: Messages, rows: int) -> None:
    assert len(assistant_rows(chat_tokenizer(name), messages)) == rows


def test_reasoning_is_learnt_in_the_turn_that_has_it_and_dropped_from_the_next_one_s_prompt() -> None:
    tokenizer = chat_tokenizer("qwen3")
    chat = [dict(message) for message in LONGER]
    chat[1]["content"] = "<think>\nWhat?\n</think>\n\nIt is so."
    first, second = assistant_rows(tokenizer, chat)
    assert learnt(tokenizer, first) == "<think>\nWhat?\n</think>\n\nIt is so.<|im_end|>"
    assert learnt(tokenizer, second) == "<think>\n\n</think>\n\nHello you.<|im_end|>"
    assert "What?" not in tokenizer.decode(second[0]).replace("What is", "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_to_be_scored_ends_with_its_text(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    ids, prompt = encode_turn(tokenizer, ASKED, "Hello you.", end=False)
    whole, same = encode_turn(tokenizer, ASKED, "Hello you.")
    assert prompt == same and ids[:prompt] == whole[:prompt]
    assert tokenizer.decode(ids[prompt:]) == WRITTEN[name][: WRITTEN[name].index("you.") + 4]


def test_spaces_that_a_template_strips_are_not_missed() -> None:
    tokenizer = chat_tokenizer("llama3")
    row = assistant_mask(tokenizer, [*ASKED, {"role": "assistant", "content": "  Hello\nyou. \n"}])
    assert learnt(tokenizer, row) == "Hello\nyou.<|eot_id|>"


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        (None, CHAT, r"^The tokenizer '\w+' has no chat template: take that of a chat model"),
        ("gemma", [SYSTEM, *CHAT], r"does not take messages of system, user: System role not supported\.$"),
        ("chatml", ASKED, r"^The chat has no message of the assistant's\.$"),
        (
            TEMPLATES["deepseek"][: -len("' }}{% endif %}")] + "<think>\\n' }}{% endif %}",
            CHAT,
            r"asks for an answer with '.*<think>\\n' at the end, but does not begin the assistant's turn so",
        ),
        (
            "{% for m in messages %}{{ m.content | upper + '<|end|>' }}{% endfor %}",
            CHAT,
            r"writes 'HELLO YOU\.' for the assistant's 'Hello you\.', which can therefore not be learnt",
        ),
    ],
)
def test_what_cannot_be_right_is_one_sentence(template: str | None, messages: Messages, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        assistant_rows(chat_tokenizer(template), messages)
