"""The package's own prose is what it is said to be, and a slice of text is the same for every method and model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lightning_peft.effects import TextSettings
from lightning_peft.effects.slices import NEUTRAL_SHA256, document_hash, load_documents, text_batches, text_slice
from lightning_peft.files.data_error import DataError

OWN = load_documents("package")


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_the_prose_has_twenty_thousand_words_in_a_hundred_documents_and_many_registers() -> None:
    assert sum(len(document.text.split()) for document in OWN) >= 20_000
    assert len(OWN) >= 100 and min(len(document.text.split()) for document in OWN) >= 200
    assert len({document.register for document in OWN}) >= 18


def test_the_prose_is_the_one_that_was_recorded() -> None:
    assert document_hash(document.text for document in OWN) == NEUTRAL_SHA256


def test_no_two_documents_share_twelve_words_in_a_row() -> None:
    found = Counter(shingle for document in OWN for shingle in shingles(document.text, 12))
    assert [shingle for shingle, count in found.items() if count > 1] == []


def test_no_document_says_twelve_words_twice() -> None:
    for document in OWN:
        assert len(shingles(document.text, 12)) == len(re.findall(r"\w+", document.text)) - 11


def test_the_prose_varies_its_words_as_prose_does() -> None:
    for document in OWN:
        words = re.findall(r"\w+", document.text.lower())
        assert len(set(words)) / len(words) > 0.45, document.text[:60]


@pytest.mark.data
def test_no_question_or_answer_of_truthfulqa_is_in_the_prose(truthfulqa_data: Path) -> None:
    asked: set[tuple[str, ...]] = set()
    for file in truthfulqa_data.rglob("mc_task.json"):
        for entry in json.loads(file.read_text(encoding="utf-8")):
            for text in (entry["question"], *entry["mc2_targets"]):
                asked |= shingles(text, 6)
    assert len(asked) > 10_000
    assert {shingle for document in OWN for shingle in shingles(document.text, 6)} & asked == set()


# -- slices --------------------------------------------------------------------------------------------------------


def test_a_slice_holds_the_tokens_asked_for_in_beginnings_of_documents() -> None:
    slice = text_slice(tokens=1000, length=128)
    lengths = [len(re.findall(r"\w+|[^\w\s]", text)) for text in slice.documents]
    assert lengths == [128] * 7 + [1000 - 7 * 128]
    assert all(any(document.text.startswith(text) for document in OWN) for text in slice.documents)


def test_the_default_slice_is_a_hundred_documents() -> None:
    assert len(text_slice().documents) == 100


def test_seed_and_source_alone_decide_and_the_hash_tells() -> None:
    first, again, other = (text_slice(tokens=512, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.sha256 == document_hash(first.documents) and other.sha256 != first.sha256
    # recorded: results of one version can be compared with those of another
    assert first.sha256 == "3befc661a360567c40097b250bd6eed8aa4c2d3df1a63e51e760ac359bf82a82"


def test_settings_draw_the_slice_of_their_values_or_none() -> None:
    assert TextSettings(tokens=60, seed=3, length=12).text() == text_slice("package", 60, 3, 12)
    assert TextSettings(tokens=0).text() is None


def test_a_small_slice_is_of_many_registers() -> None:
    register = {document.text: document.register for document in OWN}
    slice = text_slice(tokens=20 * 128)
    found = {next(r for text, r in register.items() if text.startswith(part)) for part in slice.documents}
    assert len(found) == 20


def test_folders_and_files_of_text_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# one\nFirst words here.\n# two\nSecond words here.\n")
    (tmp_path / "b.txt").write_text("A document without heading.\n\nTwo paragraphs.")
    (tmp_path / "c.jsonl").write_text('{"text": "Line one."}\n\n{"text": "Line two.", "id": 2}\n')
    (tmp_path / "ignored.md").write_text("no")
    texts = [document.text for document in load_documents(tmp_path)]
    assert texts[:2] == ["First words here.", "Second words here."] and texts[3:] == ["Line one.", "Line two."]
    assert texts[2].startswith("A document") and texts[2].endswith("paragraphs.")
    assert [d.text for d in load_documents(tmp_path / "c.jsonl")] == ["Line one.", "Line two."]
    assert len(text_slice(tmp_path, tokens=8, length=4).documents) == 2


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": 3}\n', r'a\.jsonl, line 2: it must be a JSON object with a "text"\.'),
        ("a.jsonl", b'{"text": "go', r"a\.jsonl, line 1: it must be"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text: byte 3"),
        ("a.md", b"text", r"holds no text"),
        ("a.txt", b"few words only", r"has 3 tokens in documents of up to 128, but 900 were asked for\."),
    ],
)
def test_text_that_cannot_be_used_is_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        text_slice(tmp_path, tokens=900)


def test_without_the_hub_there_is_one_sentence() -> None:
    with pytest.raises(DataError, match="OpenWebText could not be had from the Hugging Face hub"):
        text_slice("hub")


def test_batches_hold_every_document_once_padded_on_the_right(tiny_tokenizer) -> None:
    slice = text_slice(tokens=100, length=16)
    batches = list(text_batches(slice, tiny_tokenizer, batch_size=3))
    assert [int(i) for batch in batches for i in batch["document"]] == list(range(len(slice.documents)))
    for batch in batches:
        for ids, mask, document in zip(batch["input_ids"], batch["attention_mask"], batch["document"], strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            assert ids[mask.bool()].tolist() == tiny_tokenizer(slice.documents[document])["input_ids"]
