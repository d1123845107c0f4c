"""Choices as the assistant's turns: scored packed as each is alone, and learnt with the end of the turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_templates import chat_tokenizer
from choice_rows import definition
from transformers import LlamaConfig, LlamaForCausalLM
from tuning import trainer

from lightning_peft.data import Choices
from lightning_peft.data.chat_template import encode_turn
from lightning_peft.models import CausalLM
from lightning_peft.tasks import Split
from lightning_peft.tasks.choice_units import ChoiceUnitScores

CSV = """question,right,wrong
What is it?,It is so,Hello you.|Hello
Who are you?,Hello you.,It is it
And what is that?,It is that,you
Is it so?,It is so.,It is so not|Hello
"""
END = {"llama2": " </s>", "llama3": "<|eot_id|>", "harmony": "<|return|>"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "my.csv").write_text(CSV)
    return str(tmp_path / "my.csv")


@pytest.mark.parametrize("name", END)
@pytest.mark.filterwarnings("ignore")
def test_turns_are_scored_packed_as_each_is_alone(tmp_path: Path, path: str, name: str) -> None:
    tokenizer = chat_tokenizer(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    module = CausalLM(str(tmp_path / "model"))
    scored = {}

    def score(logprobs: torch.Tensor, columns: object) -> dict[str, float]:
        scored[len(scored)] = sorted(logprobs.tolist())
        return {"best": float(logprobs.max())}

    data = Choices(path, units_per_batch=2).use_split(Split(fold=0))
    trainer(ChoiceUnitScores(score)).test(module, data, verbose=False)
    alone = []
    tested = dict.fromkeys(data.rows[number]["question"] for number in data._parts["test"])
    for row in (row for row in data.rows if row["question"] in tested):
        turns = [{"role": "user", "content": row["question"]}]
        pairs = [encode_turn(tokenizer, turns, a, end=False) for side in (1, 0) for a in data.answers(row, side)]
        assert not any(tokenizer.decode(ids).endswith(END[name]) for ids, _ in pairs)
        alone.append(sorted(definition(module.backbone, ids, prompt) for ids, prompt in pairs))
    assert len(scored) == len(alone) == 2
    for found, expected in zip(sorted(scored.values()), sorted(alone), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", END)
def test_right_answers_are_learnt_with_the_end_of_their_turn_and_edits_read_none_without(path: str, name: str) -> None:
    ends = {}
    for kind in ("answers", "statements"):
        data = Choices(path, chat_tokenizer(name), train=kind, val_fraction=0.0)
        data.setup()
        ends[kind] = {data.encoder.decode(example["input_ids"]) for example in data.examples("train", kind)}
    assert all(text.endswith(END[name]) for text in ends["answers"]) and len(ends["answers"]) == 4
    assert not any(text.endswith(END[name]) for text in ends["statements"]) and len(ends["statements"]) == 10
