"""Streamed pieces are the answer, and the model stops when nobody listens."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from talkers import PROMPTS
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_peft.generation import AdaptedModel, Conversation, PromptError, answers, load, stream


@pytest.fixture(scope="module")
def stacked(talker: Path) -> AdaptedModel:
    return load(talker / "stack")


@pytest.mark.parametrize("chat", [False, True])
def test_pieces_put_together_are_the_answer(stacked: AdaptedModel, chat: bool) -> None:
    count = 0
    for prompt in PROMPTS:
        pieces = list(stream(stacked, prompt, chat=chat, max_new_tokens=20))
        assert ["".join(pieces)] == answers(stacked, [prompt], chat=chat, max_new_tokens=20)
        count += len(pieces)
    assert count > 15, "a piece for each token, special ones left out"


def test_a_drawn_answer_is_the_one_that_is_not_streamed(stacked: AdaptedModel) -> None:
    given = {"max_new_tokens": 12, "temperature": 1.2, "seed": 3}
    assert "".join(stream(stacked, "Who", **given)) == answers(stacked, ["Who"], **given)[0]


def test_characters_of_several_tokens_come_whole(stacked: AdaptedModel) -> None:
    from queue import SimpleQueue

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    from lightning_peft.generation.stream import _Written

    text = "é is ż, 水"
    tokens = tokenizer(text)["input_ids"]
    pieces: SimpleQueue[str] = SimpleQueue()
    written = _Written(tokenizer, pieces)
    written.put(torch.tensor([[1, 2]]))  # the prompt
    for token in tokens:
        written.put(torch.tensor([token]))
    written.end()
    found = [pieces.get() for _ in range(pieces.qsize())]
    assert found == list(text) and len(tokens) > len(text)


def test_the_model_stops_when_the_iterator_is_closed(stacked: AdaptedModel) -> None:
    calls: list[int] = []
    counted = stacked.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with closing(stream(stacked, "Who", max_new_tokens=100)) as pieces:
        next(pieces)
    counted.remove()
    assert len(calls) < 50
    assert not [thread for thread in threading.enumerate() if thread.name == "lightning-peft-stream"]


def test_an_error_of_the_model_is_raised_where_one_listens(stacked: AdaptedModel) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    failing = stacked.model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        list(stream(stacked, "Who", max_new_tokens=3))
    failing.remove()


def test_a_prompt_that_cannot_be_answered_is_named_at_once(stacked: AdaptedModel) -> None:
    with pytest.raises(PromptError, match=r"^The prompt is empty\.$"):
        stream(stacked, "")


# -- conversations ---------------------------------------------------------------------------------------------------


def test_each_turn_is_answered_from_all_that_was_said(stacked: AdaptedModel) -> None:
    talk = Conversation(stacked, "It is true.", max_new_tokens=6)
    first = "".join(talk.ask("Who is he?"))
    asked = [{"role": "user", "content": "Who is he?"}, {"role": "assistant", "content": first}]
    assert talk.messages == asked
    second = "".join(talk.ask("What"))
    whole = [{"role": "system", "content": "It is true."}, *asked, {"role": "user", "content": "What"}]
    assert [second] == answers(stacked, [whole], max_new_tokens=6)
    with stacked.as_base():
        expected = answers(stacked, [whole], max_new_tokens=6)
    kept = list(talk.messages)
    assert ["".join(talk.base())] == expected != [second] and talk.messages == kept
    talk.begin_anew()
    assert talk.messages == [] and talk.system is None


def test_strength_changes_between_turns(stacked: AdaptedModel) -> None:
    talk = Conversation(stacked, max_new_tokens=6)
    stacked.enable(False)
    off = "".join(talk.ask("Who is he?"))
    stacked.enable()
    assert off == "".join(talk.base())


def test_of_an_answer_that_is_cut_off_what_was_written_is_kept(stacked: AdaptedModel) -> None:
    talk = Conversation(stacked, max_new_tokens=100)
    written = ""
    with closing(talk.ask("Who")) as pieces:
        while not written.strip():
            written += next(pieces)
    assert talk.messages[-1] == {"role": "assistant", "content": written}


def test_what_cannot_be_said_changes_nothing(stacked: AdaptedModel) -> None:
    talk = Conversation(stacked, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^Nothing was asked yet\.$"):
        talk.base()
    "".join(talk.ask("Who"))
    kept = list(talk.messages)
    with pytest.raises(PromptError, match=r"^The conversation has [\d,]+ tokens, more than the 128"):
        talk.ask("It is true. " * 60)
    with pytest.raises(PromptError, match="The system message is empty"):
        talk.begin_anew(" ")
    assert talk.messages == kept


def test_an_edit_acts_on_the_answer_that_is_written(talker: Path) -> None:
    adapted = load(talker / "edit")
    talk = Conversation(adapted, max_new_tokens=5)
    seen: list[Tensor] = []
    from lightning_peft.positions import track

    positions = track(adapted.model)
    layer = adapted.model.model.layers[0]
    noted = layer.register_forward_pre_hook(lambda *_: seen.append(positions.mask("answer").clone()))
    "".join(talk.ask("Who"))
    seen.clear()
    "".join(talk.ask("What"))
    noted.remove()
    assert seen[0][0].nonzero().flatten().tolist() == [seen[0].shape[1] - 1], "earlier answers are a part of the prompt"
    assert all(bool(mask.all()) for mask in seen[1:])
