"""Batches keep the contract, and no test question is ever trained on."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lightning_peft.truthfulqa import QA_PRIMER, TruthfulQADataModule, load_questions
from lightning_peft.truthfulqa.prompts import encode_pair, few_shot_primer, question_prompt, statement


def module(tokenizer: PreTrainedTokenizerBase, **arguments: object) -> TruthfulQADataModule:
    data = TruthfulQADataModule(source="package", tokenizer=tokenizer, limit=40, **arguments)  # type: ignore[arg-type]
    data.setup()
    return data


def seen(loader: object) -> set[int]:
    return {int(i) for batch in loader for i in batch["group"]}  # type: ignore[attr-defined]


def test_no_test_question_is_trained_or_chosen_on(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tested = []
    for fold in (0, 1):
        for kind in ("answers", "statements"):
            data = module(tiny_tokenizer, fold=fold, train=kind)
            train, val, test = seen(data.train_dataloader()), seen(data.val_dataloader()), seen(data.test_dataloader())
            assert (train | val).isdisjoint(test) and len(train | val) == len(test) == 20
            assert train.isdisjoint(val) if kind == "answers" else val < train
        tested.append(test)
    assert tested[0].isdisjoint(tested[1]) and len(tested[0] | tested[1]) == 40


def test_answers_are_the_true_ones_with_their_tokens_as_labels(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = module(tiny_tokenizer)
    by_id = {question.id: question for question in data.train_questions}
    rows = 0
    for batch in data.train_dataloader():
        assert (batch["label"] == 1).all()
        for row in range(len(batch["label"])):
            real = batch["attention_mask"][row].bool()
            ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
            start = int(batch["prompt_end"][row])
            assert (labels[: start + 1] == -100).all() and torch.equal(labels[start + 1 :], ids[start + 1 :])
            question = by_id[int(batch["group"][row])]
            text = tiny_tokenizer.decode(ids[start + 1 :])
            assert text in {tiny_tokenizer.decode(tiny_tokenizer(" " + c)["input_ids"]) for c in question.correct}
            rows += 1
    assert rows == sum(len(question.correct) for question in data.train_questions)


def test_statements_are_all_choices_on_one_line_sorted_by_length(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = module(tiny_tokenizer, train="statements", batch_size=8)
    lengths, truths = [], []
    for batch in data.train_dataloader():
        assert (batch["labels"] == -100).all()
        lengths += batch["attention_mask"].sum(-1).tolist()
        truths += batch["label"].tolist()
    assert lengths == sorted(lengths) and set(truths) == {0, 1}
    assert len(truths) == sum(len(question.choices) for question in data.fold_questions)
    assert data.kind == "statements" and statement("Why?", "So.") == "Q: Why? A: So."


@pytest.mark.parametrize("together", [1, 4])
def test_a_test_batch_is_whole_questions_after_the_primer(
    tiny_tokenizer: PreTrainedTokenizerBase, together: int
) -> None:
    data = module(tiny_tokenizer, questions_per_batch=together)
    primer = tiny_tokenizer(QA_PRIMER)["input_ids"]
    batches, asked = list(data.test_dataloader()), list(data.test_questions)
    assert len(batches) == -(-len(asked) // together)
    for batch in batches:
        questions, asked = asked[:together], asked[together:]
        choices = [choice for question in questions for choice in question.choices]
        assert batch["group"].tolist() == [question.id for question in questions for _ in question.choices]
        assert batch["choice"].tolist() == [i for question in questions for i in range(len(question.choices))]
        assert (batch["input_ids"][:, : len(primer) - 1] == torch.tensor(primer[:-1])).all()
        for metric in ("mc0", "mc1", "mc2"):
            assert batch[metric].tolist() == [getattr(choice, metric) for choice in choices]


def test_an_impossible_number_of_questions_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^questions_per_batch must be at least 1, got 0\.$"):
        TruthfulQADataModule(questions_per_batch=0)


def test_few_shot_demonstrations_come_from_training_questions(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = module(tiny_tokenizer, few_shot=5)
    primer = few_shot_primer(data.fold_questions, 5)
    assert primer.count("Q: ") == 5 and primer == few_shot_primer(data.fold_questions, 5)
    assert all(question.text not in primer for question in data.test_questions)
    begin = tiny_tokenizer(primer)["input_ids"]
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"][0, : len(begin) - 1].tolist() == begin[:-1]
    with pytest.raises(ValueError, match="demonstrations were asked for"):
        few_shot_primer(data.fold_questions, 999)


def test_the_boundary_is_that_of_the_whole_text(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ids, prompt = encode_pair(tiny_tokenizer, "Q: Who is he?\nA: ", "It is true.")
    assert ids == tiny_tokenizer("Q: Who is he?\nA: It is true.")["input_ids"]
    assert prompt == len(tiny_tokenizer("Q: Who is he?\nA:")["input_ids"]), "the space belongs to the answer"
    with pytest.raises(ValueError, match="adds no token"):
        encode_pair(tiny_tokenizer, "Q: Who?", "")
    with pytest.raises(ValueError, match="has no prompt"):
        encode_pair(tiny_tokenizer, "", "It is")
    assert question_prompt("Who?").startswith(QA_PRIMER + "\n\nQ: Who?")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"train": "both"}, 'train must be "answers" or "statements"'),
        ({"fold": 2}, "fold must be from 0 to 1"),
        ({"few_shot": 3, "primer": "x"}, "not both"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TruthfulQADataModule(**arguments)  # type: ignore[arg-type]


def test_without_a_tokenizer_there_is_one_sentence() -> None:
    data = TruthfulQADataModule(source="package")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        data.setup()


def test_a_seed_gives_the_same_batches(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = (next(iter(module(tiny_tokenizer).train_dataloader())) for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert len(load_questions("package")) >= 40
