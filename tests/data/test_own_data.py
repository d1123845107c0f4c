"""The data modules over files: what their batches hold, how they are split, and what rows they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from statements import trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_peft.callbacks import CAA, LoRA
from lightning_peft.data import Choices, ContrastPairs, LabelledText, Statements
from lightning_peft.files.data_error import DataError
from lightning_peft.models import CausalLM, SequenceClassifier
from lightning_peft.tasks import Split

pytestmark = pytest.mark.filterwarnings("ignore")

STATEMENTS = [
    {"text": f"It is {'he ' * n}{'true' if label else 'false'}", "label": label, "group": f"g{n}"}
    for n in range(10)
    for label in (1, 0)
]
PAIRS = [{"prompt": f"Who is {'he ' * n}?", "positive": "He is", "negative": "It is not"} for n in range(10)]
QUESTIONS = [
    {"question": f"What is {'it ' * n}?", "right": "It is true|It is", "wrong": ["It is false"]} for n in range(10)
]
LABELLED = [{"text": f"It is {'true ' * n}", "label": ("good", "bad", "so so")[n % 3]} for n in range(12)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], name: str = "my.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def batches(loader: Any) -> dict[str, list[Any]]:
    """The rows of all batches, by key, unpadded."""
    columns: dict[str, list[Any]] = {}
    for batch in loader:
        for name, values in batch.items():
            if values.dim() == 2:
                lengths = batch["attention_mask"].sum(-1).tolist()
                columns.setdefault(name, []).extend(row[:n].tolist() for row, n in zip(values, lengths, strict=True))
            else:
                columns.setdefault(name, []).extend(values.tolist())
    return columns


# -- statements ------------------------------------------------------------------------------------------------------


def test_statements_are_whole_groups_on_one_side_and_hold_every_text_with_its_label(
    write: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    data = Statements(write(STATEMENTS), tiny_tokenizer, batch_size=3, train="statements")
    data.setup()
    train, val = batches(data.train_dataloader()), batches(data.val_dataloader())
    assert len(train["group"]) == 16 and len(set(train["group"])) == 8 and sum(train["label"]) == 8
    assert not set(train["group"]) & set(val["group"]) and val["label"] == [1, 1], "losses are of what is wanted"
    assert all(set(labels) == {-100} for labels in train["labels"])
    texts = {tiny_tokenizer.decode(ids): label for ids, label in zip(train["input_ids"], train["label"], strict=True)}
    assert texts.items() <= {row["text"]: row["label"] for row in STATEMENTS}.items() and len(texts) == 16
    for ids, labels in zip(val["input_ids"], val["labels"], strict=True):
        assert labels == [-100, *ids[1:]]
    assert set(val["prompt_end"]) == {0} and data.prompts() == [] and len(data.rows) == 20


def test_the_seed_and_the_limit_choose_the_groups(
    write: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def parts(**options: Any) -> tuple[set[str], set[str]]:
        data = Statements(write(STATEMENTS), tiny_tokenizer, **options)
        data.setup()
        return tuple({data.rows[i]["group"] for i in data._parts[part]} for part in ("train", "val"))  # type: ignore[return-value]

    assert parts() == parts() != parts(seed=1)
    train, val = parts(limit=5)
    assert len(train) == 4 and len(val) == 1
    assert parts(val_fraction=0.0) == ({f"g{n}" for n in range(10)}, set())
    with pytest.raises(DataError, match=r"my\.jsonl has 1 group of rows to learn from, of which 1 would be held out"):
        parts(limit=1)


@pytest.mark.parametrize(
    ("spelling", "label"), [("TRUE", 1), ("yes", 1), ("1", 1), (1.0, 1), (True, 1), ("No", 0), ("false", 0), (0, 0)]
)
def test_labels_are_read_as_they_are_written(write: Callable[..., str], spelling: object, label: int) -> None:
    data = Statements(write([{"text": "a", "label": spelling}, {"text": "b", "label": 1}]), val_fraction=0.0)
    data.prepare_data()
    assert data.encode is not None and len(data.rows) == 2
    from lightning_peft.data.statements import read_label

    assert read_label(data.rows[0], "label") == label


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"label": "maybe"}, r"row 3: 'label' is 'maybe', but must be 1, true or yes .*, and 0, false or no"),
        ({"label": None}, r"row 3: 'label' is missing, but must be"),
        ({"label": 2}, r"row 3: 'label' is 2, but"),
        ({"text": ""}, r"row 3: 'text' is empty\.$"),
        ({"text": "it is  TRUE", "label": 0}, r"row 3: the text of .*row 1 stands here again with the other label"),
        ({"group": ""}, r"row 3: 'group' must say which texts this one belongs to, got ''"),
    ],
)
def test_a_statement_that_cannot_be_used_is_one_sentence_with_the_row(
    write: Callable[..., str], row: dict[str, Any], sentence: str
) -> None:
    path = write([*STATEMENTS[:2], STATEMENTS[2] | row, *STATEMENTS[3:]])
    with pytest.raises(DataError, match=sentence):
        Statements(path).prepare_data()


def test_a_text_that_is_too_long_is_left_out_with_one_warning(
    write: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        *STATEMENTS,
        {"text": "false " * 50, "label": 0, "group": "g0"},
        {"text": "he " * 50, "label": 1, "group": "g1"},
    ]
    data = Statements(write(rows), tiny_tokenizer, max_length=40, train="statements", val_fraction=0.0)
    data.setup()
    sentence = r"^2 of 22 train rows of .* more tokens than max_length=40 and are left out; the longest is .*, row 21, "
    with pytest.warns(UserWarning, match=sentence) as caught:
        train = batches(data.train_dataloader())
    assert len(train["label"]) == 20 and len(caught) == 1


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_two_statements_of_a_group_behind_their_prompt(
    write: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    data = ContrastPairs(write(PAIRS), tiny_tokenizer, train="statements")
    data.setup()
    train, val = batches(data.train_dataloader()), batches(data.val_dataloader())
    by_group = {group: set() for group in train["group"]}
    for ids, label, group, end in zip(*(train[n] for n in ("input_ids", "label", "group", "prompt_end")), strict=True):
        by_group[group].add((label, tiny_tokenizer.decode(ids[end + 1 :])))
    assert len(by_group) == 8 and set(map(frozenset, by_group.values())) == {
        frozenset({(1, " He is"), (0, " It is not")})
    }
    for ids, labels, end in zip(val["input_ids"], val["labels"], val["prompt_end"], strict=True):
        assert tiny_tokenizer.decode(ids[: end + 1]) in data.prompts()
        assert labels == [-100] * (end + 1) + ids[end + 1 :] and tiny_tokenizer.decode(ids).endswith("? He is")
    assert len(data.prompts()) == 2


def test_a_prompt_is_a_turn_of_the_template_and_prompts_are_what_training_texts_begin_with(
    write: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    import copy

    chatty = copy.deepcopy(tiny_tokenizer)
    turns = "{% for m in messages %}Q: {{ m.content }}\n{% endfor %}"
    chatty.chat_template = "{{ bos_token }}" + turns + "{% if add_generation_prompt %}A:\n{% endif %}"
    data = ContrastPairs(write(PAIRS), chatty, train="statements")
    data.setup()
    prompt = data.prompts()[0]
    assert prompt.startswith("<s>Q: Who is") and prompt.endswith("?\nA:\n"), "this tokenizer puts no <s> by itself"
    val = batches(data.val_dataloader())
    whole, end = val["input_ids"][0], val["prompt_end"][0]
    assert whole[: end + 1] == chatty(prompt)["input_ids"] and chatty.decode(whole[end + 1 :]) == "He is"
    plain = ContrastPairs(write(PAIRS), chatty, chat=False)
    plain.setup()
    assert plain.prompts()[0].startswith("Who is")
    with pytest.raises(DataError, match=r"row \d+: chat is True, but the tokenizer has no chat template"):
        wrong = ContrastPairs(write(PAIRS), tiny_tokenizer, chat=True)
        wrong.setup()
        wrong.train_dataloader()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"negative": "he  IS"},
            r"row 2: 'positive' and 'negative' are the same text, 'He is', so that there is nothing",
        ),
        ({"negative": None}, r"row 2: 'negative' is missing\.$"),
        ({"prompt": 3}, r"row 2: 'prompt' must be a text, got 3"),
    ],
)
def test_a_pair_that_cannot_be_used_is_one_sentence_with_the_row(
    write: Callable[..., str], row: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        ContrastPairs(write([PAIRS[0], PAIRS[1] | row])).prepare_data()


# -- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "options", "right", "wrong"),
    [
        ({"right": ["a", "b"], "wrong": "c|d"}, {}, ["a", "b"], ["c", "d"]),
        ({"right": "a", "wrong": "c\nd\n"}, {}, ["a"], ["c", "d"]),
        (
            {"best": "a", "more": "b|a", "x": 1, "y": ""},
            {"right": ["best", "more"], "wrong": ["x", "y"]},
            ["a", "b"],
            ["1"],
        ),
        ({"answer_matching_behavior": " (B)", "answer_not_matching_behavior": " (A)"}, {}, ["(B)"], ["(A)"]),
    ],
)
def test_answers_are_read_as_lists_separated_or_from_several_columns(
    write: Callable[..., str], row: dict[str, Any], options: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    data = Choices(write([{"question": "Q?"} | row, {"question": "R?"} | row]), **options)
    data.prepare_data()
    assert data.answers(data.rows[0], 1) == right and data.answers(data.rows[0], 0) == wrong


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"wrong": "It is|no"}, r"row 2: the answer 'It is' is both right and wrong\.$"),
        (
            {"question": QUESTIONS[0]["question"], "wrong": "it is TRUE"},
            r"row 2: the answer 'it is TRUE' is wrong here and right in .*row 1",
        ),
        ({"right": " | "}, r"row 2: 'right' has no answer"),
        ({"wrong": {"a": 1}}, r"row 2: 'wrong' must be a text or a list of texts, got \{'a': 1\}"),
    ],
)
def test_a_question_that_cannot_be_used_is_one_sentence_with_the_row(
    write: Callable[..., str], row: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        Choices(write([QUESTIONS[0], QUESTIONS[1] | row])).prepare_data()


def test_choices_train_on_right_answers_or_hold_all_of_them_as_statements(
    write: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def answers(**options: Any) -> set[tuple[int, str]]:
        data = Choices(write(QUESTIONS), tiny_tokenizer, template="Q: {question}\nA:", **options)
        data.setup()
        train = batches(data.train_dataloader())
        texts = [tiny_tokenizer.decode(ids) for ids in train["input_ids"]]
        assert all("?\nA: It is" in text for text in texts) and len(set(train["group"])) == 8
        return {(label, text.split("A: ")[1]) for label, text in zip(train["label"], texts, strict=True)}

    right = {(1, "It is true"), (1, "It is")}
    assert answers() == right and answers(train="statements") == right | {(0, "It is false")}


def test_choices_under_a_split_test_whole_questions_that_are_learnt_from_in_no_other_fold(
    write: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tested: list[int] = []
    for fold in range(2):
        data = Choices(write(QUESTIONS), tiny_tokenizer, units_per_batch=2).use_split(Split(fold=fold))
        data.setup()
        test = list(data.test_dataloader())
        assert all(len(batch["group"].unique()) <= 2 for batch in test)
        here = batches(test)
        assert len(here["group"]) == 15 and sum(here["right"]) == 10
        learnt = set(batches(data.train_dataloader())["group"]) | set(batches(data.val_dataloader())["group"])
        assert not learnt & set(here["group"]) and len(learnt) == 5
        tested += set(here["group"])
    assert sorted(tested) == list(range(10))
    inner = Choices(write(QUESTIONS), tiny_tokenizer).use_split(Split(inner=True, size=3))
    inner.setup()
    groups = [set(batches(loader)["group"]) for loader in (inner.train_dataloader(), inner.test_dataloader())]
    assert len(groups[0]) == 3 and len(groups[1]) == 1 and not groups[0] & groups[1]


# -- labelled texts --------------------------------------------------------------------------------------------------


def test_texts_have_the_number_of_their_class_and_the_names_come_back_from_a_checkpoint(
    write: Callable[..., str], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    module = SequenceClassifier(str(tiny_folder("llama")), num_labels=3)
    data = LabelledText(write(LABELLED), batch_size=4)
    run = trainer(LoRA(r=2), default_root_dir=tmp_path)
    run.fit(module, data)
    assert data.class_names == ["bad", "good", "so so"] and "val_accuracy" in run.callback_metrics
    loader = data.predict_dataloader()
    assert batches(loader)["labels"] == [data.class_names.index(row["label"]) for row in LABELLED]
    run.save_checkpoint(tmp_path / "last.ckpt")
    other = LabelledText(write([row for row in LABELLED if row["label"] != "bad"], "other.jsonl"), val_fraction=0.5)
    module = SequenceClassifier(str(tiny_folder("llama")), num_labels=3)
    with pytest.raises(ValueError, match=r"has 2 classes \(good, so so\), but num_labels is 3: set it to 2\.$"):
        trainer(LoRA(r=2)).fit(module, other)
    module = SequenceClassifier(str(tiny_folder("llama")), num_labels=3)
    trainer(LoRA(r=2)).test(module, other, ckpt_path=tmp_path / "last.ckpt")
    assert other.class_names == data.class_names and set(batches(other.predict_dataloader())["labels"]) == {1, 2}


def test_pairs_of_texts_are_encoded_together_and_cut(
    write: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"a": f"It is {n}", "b": "he " * 20, "label": n % 2} for n in range(4)]
    data = LabelledText(write(rows), tiny_tokenizer, "a", "b", max_length=12)
    data.setup()
    ids = batches(data.predict_dataloader())["input_ids"][0]
    assert ids == tiny_tokenizer("It is 0", "he " * 20, truncation=True, max_length=12)["input_ids"] and len(ids) == 12
    assert data.class_names == ["0", "1"]


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}],
            {},
            r"has rows of one class only, 'x': two or more",
        ),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            {"classes": ["x", "z"]},
            r"row 2: 'label' is 'y', none of x, z",
        ),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": None}],
            {},
            r"row 2: 'label' must be a word or a number, got None",
        ),
        ([{"text": "a", "label": "x"}], {"label": "class"}, r"my\.jsonl has no column 'class', but 'text', 'label'"),
    ],
)
def test_a_labelled_text_that_cannot_be_used_is_one_sentence(
    write: Callable[..., str], rows: list[dict[str, Any]], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        LabelledText(write(rows), **options).prepare_data()


def test_classes_for_a_language_model_are_one_sentence(
    write: Callable[..., str], tiny_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=r"CausalLM learns tokens: use SequenceClassifier with num_labels=3 "):
        trainer(LoRA(r=2)).fit(CausalLM(str(tiny_folder("llama"))), LabelledText(write(LABELLED)))


# -- what training batches hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("callback", "labels"), [(CAA(), {0, 1}), (LoRA(r=2), {1})], ids=["an edit", "LoRA"])
def test_the_callback_decides_whether_training_is_on_statements(
    write: Callable[..., str], tiny_folder: Callable[[str], Path], callback: L.Callback, labels: set[int]
) -> None:
    seen: set[int] = set()

    class Watch(L.Callback):
        def on_train_batch_start(self, *given: Any) -> None:
            seen.update(given[2]["label"].tolist())

    run = trainer(callback, Watch())
    run.fit(CausalLM(str(tiny_folder("llama"))), ContrastPairs(write(PAIRS)))
    assert seen == labels and run.global_step > 0 and float(run.callback_metrics["val_loss"]) > 0


def test_an_encoder_decoder_reads_prompts_and_answers_apart(
    write: Callable[..., str], tiny_folder: Callable[[str], Path]
) -> None:
    from lightning_peft.models import Seq2SeqLM

    data = Choices(write(QUESTIONS), template="Q: {question} A:")
    run = trainer(LoRA(r=2))
    run.fit(Seq2SeqLM(str(tiny_folder("t5"))), data)
    batch: dict[str, Tensor] = next(iter(data.val_dataloader()))
    assert "prompt_end" not in batch and torch.isfinite(run.callback_metrics["val_loss"])
    assert data.encoder.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]).endswith("A:")


def test_an_argument_that_no_data_module_has_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"^Statements has no argument 'batch_sise'; the nearest are batch_size"):
        Statements("package:politeness", batch_sise=4)  # type: ignore[call-arg]
