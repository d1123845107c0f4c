"""Prompts are the benchmark's to the letter, and an answer begins where lm-evaluation-harness has it begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lightning_peft.truthfulqa import QA_PRIMER, Question
from lightning_peft.truthfulqa.prompts import encode_pair, few_shot_primer, question_prompt, statement

QUESTIONS = [Question(i, f"Is it {i}?", "Tests", (), f"It is {i}.", (), ()) for i in range(9)]


def byte_tokenizer(bos: bool) -> PreTrainedTokenizerBase:
    """A byte-pair tokenizer that can write any text; with `bos` it begins each text with `<s>`, as LLaMA's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([QA_PRIMER], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {bos: byte_tokenizer(bos) for bos in (False, True)}


def harness(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The harness's causal model without its weights: only what encodes a pair."""
    from lm_eval.models.huggingface import HFLM

    model = object.__new__(HFLM)
    model.tokenizer, model.backend = tokenizer, "causal"
    model.add_bos_token = model.custom_prefix_token_id = None
    return model


def test_the_primer_is_the_harness_s() -> None:
    import lm_eval

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/truthfulqa/truthfulqa_mc1.yaml").read_text())
    written = task["doc_to_text"].split("prompt_qa = '")[1].split("'%}")[0]
    # YAML's line joins leave spaces at the two ends of the text; within it every character must be equal
    assert written.strip() == QA_PRIMER


def test_a_prompt_is_the_primer_a_blank_line_and_the_question() -> None:
    assert question_prompt("Why?", "") == "Q: Why?\nA:"
    assert question_prompt("Why?", "Before.") == "Before.\n\nQ: Why?\nA:"
    assert question_prompt("Why?") == QA_PRIMER + "\n\nQ: Why?\nA:"
    assert statement("Why?", "So.") == "Q: Why? A: So."


def test_demonstrations_are_drawn_once_each_with_the_seed() -> None:
    primer = few_shot_primer(QUESTIONS, 4, seed=3)
    parts = primer.split("\n\n")
    assert len(set(parts)) == 4 and set(parts) <= {f"Q: {q.text}\nA: {q.best}" for q in QUESTIONS}
    assert primer == few_shot_primer(QUESTIONS, 4, seed=3) != few_shot_primer(QUESTIONS, 4, seed=4)


@pytest.mark.parametrize("k", [-1, 0, 10])
def test_an_impossible_number_of_demonstrations_is_one_sentence(k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} demonstrations were asked for, but there are 9"):
        few_shot_primer(QUESTIONS, k)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("Q: Why?\nA:", " Because."),
        ("Q: Why?\nA: ", "Because."),
        ("Q: Why?\nA: \n ", " Because."),
        ("Q: Why?\nA:", "Because."),
        ("Q: What is the squ", "are root?"),  # the boundary stands within a word
        ("Q: Où?\nA:", " À l'été, 東京."),
        (question_prompt("Why?"), " I have no comment."),
        ("<s>Q: Why?\nA:", " Because."),  # the tokenizer's own first token is not given twice
    ],
)
def test_a_pair_is_encoded_as_the_harness_does(bos: bool, context: str, continuation: str) -> None:
    before, after = harness(TOKENIZERS[bos])._encode_pair(context, continuation)
    assert encode_pair(TOKENIZERS[bos], context, continuation) == (before + after, len(before))


@settings(max_examples=80, deadline=None)
@given(
    st.text("Qa ?\n:é", min_size=1, max_size=12).filter(lambda t: t.strip()),
    st.text("Ab .é", min_size=1, max_size=8).filter(lambda t: t.strip()),
    st.booleans(),
)
def test_any_pair_is_encoded_as_the_harness_does(context: str, continuation: str, bos: bool) -> None:
    before, after = harness(TOKENIZERS[bos])._encode_pair(context, continuation)
    if after:
        ids, prompt = encode_pair(TOKENIZERS[bos], context, continuation)
        assert (ids[:prompt], ids[prompt:]) == (before, after)


@pytest.mark.parametrize("bos", [False, True])
def test_nothing_to_score_is_one_sentence(bos: bool) -> None:
    for context in ("", "  \n"):
        with pytest.raises(ValueError, match="has no prompt before it"):
            encode_pair(TOKENIZERS[bos], context, " Because.")
    with pytest.raises(ValueError, match="adds no token to its prompt"):
        encode_pair(TOKENIZERS[bos], "Q: Why?", "")
