"""Answers to many prompts are those that each gets alone; edits begin at the last token of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from talkers import PROMPTS, make_base
from torch import Tensor

from lightning_peft import answering
from lightning_peft.generation import AdaptedModel, Decoding, PromptError, answer_each, answers, load
from lightning_peft.generation.prompts import encode

MANY = [*PROMPTS, "Q: Who", "It is", "Q: What is it?\nA: It is"]


@pytest.fixture(scope="module")
def stacked(talker: Path) -> AdaptedModel:
    return load(talker / "stack")


@torch.no_grad()
def by_definition(adapted: AdaptedModel, ids: list[int], count: int) -> str:
    """Greedy decoding without a cache, the edit from the last prompt token on."""
    start, written = torch.tensor([len(ids) - 1]), list(ids)
    for _ in range(count):
        with answering(adapted.model, start=start):
            logits: Tensor = adapted.model(input_ids=torch.tensor([written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return str(adapted.tokenizer.decode(written[len(ids) :], skip_special_tokens=True))


def test_the_edit_starts_at_the_last_token_of_each_prompt(talker: Path) -> None:
    adapted = load(talker / "edit")
    expected = [by_definition(adapted, encode(adapted, prompt), 8) for prompt in MANY]
    assert answers(adapted, MANY, max_new_tokens=8, batch_size=4) == expected
    assert expected != answers(load(talker / "everywhere"), MANY, max_new_tokens=8)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_of_a_batch_are_those_of_each_alone(stacked: AdaptedModel, chat: bool) -> None:
    together = answers(stacked, MANY, chat=chat, max_new_tokens=10, batch_size=4)
    alone = [answers(stacked, [prompt], chat=chat, max_new_tokens=10)[0] for prompt in MANY]
    assert together == alone and len(set(alone)) > 2


def test_a_text_in_a_chat_is_the_users_message(stacked: AdaptedModel) -> None:
    messages = [{"role": "system", "content": "It is true."}, {"role": "user", "content": "Who is he?"}]
    assert encode(stacked, "Who is he?", "It is true.", chat=True) == encode(stacked, messages)
    rendered = "Q: It is true.\nQ: Who is he?\nA: "
    assert stacked.tokenizer.decode(encode(stacked, messages)) == rendered


def test_the_base_answers_beside_the_adapted_model(stacked: AdaptedModel) -> None:
    found = sorted(answer_each(stacked, MANY, Decoding(6), beside_base=True, batch_size=4))
    with stacked.as_base():
        expected = answers(stacked, MANY, max_new_tokens=6)
    assert [answer.base for answer in found] == expected
    assert [answer.text for answer in found] == answers(stacked, MANY, max_new_tokens=6) != expected


def test_drawn_answers_come_again_with_the_seed_and_leave_random_numbers_alone(stacked: AdaptedModel) -> None:
    def drawn(**given: Any) -> list[str]:
        return answers(stacked, MANY[:2], **{"max_new_tokens": 8, "temperature": 1.5, **given})

    torch.manual_seed(5)
    first, after = drawn(seed=1), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after) and drawn(seed=1) == first != drawn(seed=2)
    likeliest = answers(stacked, MANY[:2], max_new_tokens=8)
    assert drawn(temperature=1e-4) == likeliest != first
    assert drawn(top_p=1e-6) == likeliest


def test_an_answer_ends_where_a_turn_of_the_template_does(tiny_tokenizer: Any, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<s>{% endfor %}"  # an end that the configuration does not know
    adapted = load(make_base(tmp_path / "base", tiny_tokenizer, template=template))
    with torch.no_grad():
        weight = adapted.model.get_output_embeddings().weight
        last = adapted.model.model(torch.tensor([encode(adapted, "What", chat=True)])).last_hidden_state[0, -1]
        weight[1] = 10 * last  # the turn's end is the likeliest token
    calls: list[int] = []
    adapted.model.register_forward_pre_hook(lambda *_: calls.append(1))
    answers(adapted, ["What"], chat=True, max_new_tokens=5)
    assert len(calls) == 1
    answers(adapted, ["What<s>"], max_new_tokens=5)  # the same tokens, which are no chat
    assert len(calls) == 1 + 5


# -- the window ------------------------------------------------------------------------------------------------------


def test_an_answer_ends_with_the_window_and_others_go_on(tiny_tokenizer: Any, tmp_path: Path) -> None:
    adapted = load(make_base(tmp_path / "base", tiny_tokenizer, "gpt2"))
    long = adapted.tokenizer("It is true. " * 40)["input_ids"][:120]
    prompts = [adapted.tokenizer.decode(long), "Q: Who"]
    assert len(encode(adapted, prompts[0])) == 120
    first, second = answers(adapted, prompts, max_new_tokens=30)
    lengths = [len(adapted.tokenizer(text)["input_ids"]) for text in (first, second)]
    assert lengths[0] <= 9 < lengths[1], "128 positions, and the last token written is not read"
    assert second == answers(adapted, prompts[1:], max_new_tokens=30)[0]


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": (["What", " \n"], {}, r"^Prompt 2 is empty\.$"),
    "one that is empty": ([""], {}, r"^The prompt is empty\.$"),
    "too long": (
        ["What", "It is true. " * 90],
        {},
        r"^Prompt 2 has [\d,]+ tokens, more than the 128 that Llama.* reads",
    ),
    "a system without a chat": (["What"], {"system": "It is"}, r"^A system message is part of a chat"),
    "no role": ([[{"content": "What"}]], {}, r'^The prompt: each message needs "role" and "content", got'),
    "no user last": ([[{"role": "assistant", "content": "It is"}]], {}, r"ends with a message of assistant"),
    "no messages": ([[]], {}, r"ends with a message of nobody"),
    "an empty message": ([[{"role": "user", "content": ""}]], {}, r"a message of the user is empty"),
    "a role that is refused": (
        [[{"role": "tool", "content": "What"}, {"role": "user", "content": "What"}]],
        {},
        r"^The prompt is no chat for .*base: The chat template does not take .* tool, user: no tools here\.$",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_prompt_that_cannot_be_answered_is_named_before_any_is(stacked: AdaptedModel, case: str) -> None:
    prompts, given, sentence = WRONG[case]
    with pytest.raises(PromptError, match=sentence) as caught:
        answer_each(stacked, prompts, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [{"max_new_tokens": 0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"batch_size": 0}],
)
def test_settings_out_of_range_are_refused(stacked: AdaptedModel, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(given))} must be"):
        answers(stacked, ["What"], **given)


def test_an_edit_that_cannot_know_where_answers_begin_says_so(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from lightning_peft.editing import head_offsets_config, head_sites
    from lightning_peft.stack.stack import stack_of

    adapted = load(make_base(tmp_path / "base", tiny_tokenizer, "t5"))
    sites = head_sites(adapted.model)
    stack = stack_of(adapted.model)
    stack.add(head_offsets_config(sites, [(0, 0)], 1.0, "answer"), "edit", computed=True)
    with pytest.raises(ValueError, match=r"edit the sites of its decoder"):
        answers(adapted, ["What"], max_new_tokens=3)
