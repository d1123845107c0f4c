"""Answers are greedy, the same alone and in company, and with the primer shared or not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from edits import edited
from tiny_models import tiny
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from tuning import trainer

from lightning_peft.models import CausalLM
from lightning_peft.packing.generation import GreedyWriter
from lightning_peft.truthfulqa import (
    Answer,
    AnswerGenerator,
    Prompting,
    TruthfulQADataModule,
    cut_answer,
    encode_prompts,
    load_questions,
)

PRIMER = "Q: Who is he?\nA: He is true."
SHORT = Prompting(primer=PRIMER, max_new_tokens=12)


def one_by_one(model: nn.Module, ids: list[int], new: int, end: int) -> list[int]:
    """Greedy decoding by the definition: no cache, no padding, no batch."""
    written: list[int] = []
    while len(written) < new and (not written or written[-1] != end):
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("kind", ["llama", "wide_llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_batch_writes_what_each_prompt_writes_alone(
    kind: str, batch_size: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(kind).eval()
    generator, found = AnswerGenerator(model, tiny_tokenizer), []
    questions = load_questions("package")[:7]
    for batch in encode_prompts(questions, SHORT, tiny_tokenizer, batch_size):
        found += generator.answer(batch)
    assert bool(generator._writer._prefix) is (batch_size > 1)  # one prompt alone shares nothing
    assert sorted(answer.question_id for answer in found) == [question.id for question in questions]
    for answer in found:
        ids = SHORT.encode(tiny_tokenizer, questions[answer.question_id].text)
        alone = one_by_one(model, ids, SHORT.max_new_tokens, end=2)
        # where a row stopped at its answer's end, the rest of what it would have written is missing
        assert tiny_tokenizer.decode(alone, skip_special_tokens=True).startswith(answer.raw)
        assert cut_answer(tiny_tokenizer.decode(alone, skip_special_tokens=True)) == answer.text


def test_the_models_own_generation_settings_do_not_count(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def answers(model: Any) -> list[Answer]:
        batches = encode_prompts(load_questions("package")[:4], SHORT, tiny_tokenizer, 4)
        return AnswerGenerator(model, tiny_tokenizer).answer(batches[0])

    plain, model = answers(tiny("llama").eval()), tiny("llama").eval()
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=3, max_length=9)
    model.generation_config = own
    assert answers(model) == plain and model.generation_config is own


class Writes(nn.Module):
    """A causal language model that writes a given text after any prompt, whatever it is shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *texts: str) -> None:
        super().__init__()
        self.texts = [tokenizer(text)["input_ids"] for text in texts]
        self.weight = nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig()
        self.steps = 0

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, stopping_criteria: Any) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        while not done.all() and self.steps < 99:
            column = [text[self.steps] if self.steps < len(text) else 0 for text in self.texts]
            column = [0 if finished else token for token, finished in zip(column, done.tolist(), strict=True)]
            input_ids = torch.cat([input_ids, torch.tensor(column)[:, None]], dim=1)
            done |= stopping_criteria(input_ids, None)
            self.steps += 1
        return input_ids


def test_a_row_stops_as_soon_as_its_answer_has_ended(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = Writes(tiny_tokenizer, "\nA: It is true.\n\nQ: Who is he?", "\nA: He is. Q: It is not. It is not.")
    batch = {"input_ids": torch.tensor([[9], [9]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    texts = AnswerGenerator(model, tiny_tokenizer).write(**batch)
    assert [cut_answer(text) for text in texts] == ["It is true.", "He is."]
    assert texts[0].endswith("\n\n") and "not" not in texts[1]
    assert model.steps == max(len(tiny_tokenizer(text)["input_ids"]) for text in texts)


def test_prompts_are_padded_on_the_left_in_batches_of_like_length(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    questions = load_questions("package")[:9]
    batches = encode_prompts(questions, SHORT, tiny_tokenizer, 4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 1]
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(-1).tolist()]
    assert lengths == sorted(lengths) and (torch.cat([b["attention_mask"][:, -1] for b in batches]) == 1).all()
    for batch in batches:
        assert torch.equal(batch["prompt_end"], batch["attention_mask"].sum(-1) - 1)
        for row, mask, number in zip(*(batch[n] for n in ("input_ids", "attention_mask", "group")), strict=True):
            assert row[mask.bool()].tolist() == SHORT.encode(tiny_tokenizer, questions[number].text)


@pytest.mark.parametrize("positions", ["answer", "generated", "all", "prompt[-2:]"])
def test_an_edit_acts_with_the_primer_shared_as_without(
    positions: str, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = encode_prompts(load_questions("package")[:4], SHORT, tiny_tokenizer, 4)[0]
    model = edited("llama", positions)[0].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model may refuse to share; the answers must not differ either way
        shared = AnswerGenerator(model, tiny_tokenizer).answer(batch)
        monkeypatch.setattr(GreedyWriter, "_share", lambda *_: [])
        whole = AnswerGenerator(model, tiny_tokenizer).answer(batch)
    assert shared == whole != AnswerGenerator(tiny("llama").eval(), tiny_tokenizer).answer(batch)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("positions", ["all", "answer", "generated[1:]", "prompt[-2:]"])
def test_rows_that_have_ended_leave_the_batch_and_the_others_write_on_as_before(
    kind: str, positions: str, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = encode_prompts(load_questions("package")[:8], SHORT, tiny_tokenizer, 8)[0]
    model: Any = edited(kind, positions)[0].eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20 if weight.dim() > 1 else 1)  # so that rows differ in what they write
    model.generation_config.eos_token_id = list(range(2, model.config.vocab_size, 6))  # and in when they end
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    together = AnswerGenerator(model, tiny_tokenizer).answer(batch)
    assert sizes[-1] < max(sizes) == 8
    monkeypatch.setattr(GreedyWriter, "_share", lambda *_: [])
    assert together == AnswerGenerator(model, tiny_tokenizer).answer(batch)
    assert sizes[-1] == 8  # whole prompts stay together


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_peft_model_answers_as_the_model_that_it_wraps(
    task: str | None, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = encode_prompts(load_questions("package")[:4], SHORT, tiny_tokenizer, 4)[0]
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(tiny("llama"), peft.LoraConfig(task_type=task, r=2, init_lora_weights=False)).eval()
    generator = AnswerGenerator(wrapped, tiny_tokenizer)
    assert generator.answer(batch) == AnswerGenerator(wrapped.get_base_model(), tiny_tokenizer).answer(batch)
    assert generator._writer._prefix  # its primer is shared as well


def test_a_model_that_sharing_would_change_answers_from_whole_prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batch = encode_prompts(load_questions("package")[:4], SHORT, tiny_tokenizer, 4)[0]
    model = peft.get_peft_model(
        tiny("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    with pytest.warns(UserWarning, match="answers from whole prompts"):
        generator = AnswerGenerator(model, tiny_tokenizer)
        assert len(generator.answer(batch)) == 4 and not generator._writer._prefix


def test_predict_yields_an_answer_to_each_question_of_the_test_fold(tiny_folder: Any, tmp_path: Path) -> None:
    module = CausalLM(str(tiny_folder("llama")))
    data = TruthfulQADataModule("package", limit=12, batch_size=4, prompting=SHORT, fold=1)
    predicted = trainer(default_root_dir=tmp_path).predict(module, data)
    answers = [answer for batch in predicted or [] for answer in batch]
    assert all(isinstance(answer, Answer) for answer in answers)
    assert sorted(answer.question_id for answer in answers) == [q.id for q in data.test_questions]


def test_demonstrations_from_training_questions_stand_in_the_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = TruthfulQADataModule("package", limit=12, tokenizer=tiny_tokenizer, few_shot=2)
    data.setup()
    batch = next(iter(data.predict_dataloader()))
    assert tiny_tokenizer.decode(batch["input_ids"][0]).count("Q:") == 3
    assert batch["ending"] == "paragraph" and batch["max_new_tokens"] == 50
