"""The navigation and the index of methods are made from the cards."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tuning import ROOT

import mkdocs_cards

DOCS = ROOT / "docs"
NAV = [{"Home": "index.md"}, {"Methods": []}]


def test_every_card_is_in_the_navigation_and_in_one_table_of_the_index() -> None:
    config = mkdocs_cards.on_config(SimpleNamespace(docs_dir=DOCS, nav=[dict(entry) for entry in NAV]))
    index, *cards = config.nav[1]["Methods"]
    assert index == "methods/index.md"
    files = {path for entry in cards for path in entry.values()}
    assert len(cards) == len(files) and files | {index} == {f"methods/{p.name}" for p in DOCS.glob("methods/*.md")}
    page = SimpleNamespace(file=SimpleNamespace(src_uri=index))
    text = mkdocs_cards.on_page_markdown((DOCS / index).read_text(), page, config, None)
    assert "<!-- cards" not in text
    assert all(text.count(f"]({path.removeprefix('methods/')}) |") == 1 for path in files)
    assert "| [`LoRA`](lora.md) | `W x + (alpha / r) B A x`" in text


def test_other_pages_stay_as_they_are() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="methods/lora.md"))
    assert mkdocs_cards.on_page_markdown("<!-- cards: x -->", page, None, None) == "<!-- cards: x -->"


def test_mkdocs_uses_the_hook() -> None:
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["hooks"] == ["mkdocs_cards.py"]


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("", "lacks family, merges, parameters, trains"),
        ("---\nfamily: scales\ntrains: a\nmerges: b\n---\n", "lacks parameters"),
        ("---\nfamily: scale\ntrains: a\nmerges: b\nparameters: c\n---\n", "family 'scale', and index.md has low rank"),
    ],
)
def test_a_card_that_the_index_cannot_take_is_refused_by_name(front: str, message: str, tmp_path: Path) -> None:
    shutil.copy(DOCS / "methods" / "index.md", tmp_path)
    (tmp_path / "new.md").write_text(f"{front}\n# New\n\n`lightning_peft.callbacks.New()`\n")
    with pytest.raises(ValueError, match=rf"new\.md .*{message}"):
        mkdocs_cards.families(tmp_path)
