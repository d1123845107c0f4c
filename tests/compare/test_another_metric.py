"""A hand-written `results.json` of texts, ranked by NLL, with macro-F1 and a section, prints this table and no more."""

from __future__ import annotations

import io
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_peft.compare.measured import measured_table
from lightning_peft.compare.page import write_html
from lightning_peft.compare.sections import section_views
from lightning_peft.compare.terminal import table
from lightning_peft.compare.verdict import verdict

TERMINAL = """\
        Reviews: TextClassifier on reviews of books (120 texts, 3 folds)

 Method                       NLL        Macro-F1  Parameters  Adapter  Seconds
 ──────────────────────────────────────────────────────────────────────────────
 Linear head                 0.61            .702         770  3.08 kB      4.0
                                                      trained
 BitFit              0.64 (+0.03)    .711 (+.009)      43,000   172 kB       31
                   [+0.01, +0.05]  [-.040, +.060]     trained
 LoRA, r=8           0.38 (-0.23)    .851 (+.149)     148,226   593 kB       59
                   [-0.30, -0.16]  [+.070, +.230]     trained

      Below each value: difference to base, paired by text, [95% interval]
                              Lower is better: NLL
             Speed

 Method                 Latency
 ──────────────────────────────
 Linear head               12.0
 BitFit             12.2 (+0.2)
                   [-0.3, +0.7]
 LoRA, r=8          14.6 (+2.6)
                   [+2.1, +3.1]

In brackets: difference to base,
         [95% interval]
        On one CPU core.
LoRA, r=8 has the lowest NLL, 0.38. Its difference to base is -0.23 (95% interval -0.30 to -0.16):
resolved. Corrected for the 2 methods compared with base, p < .001 (Holm)."""

PAGE = [
    "Text set reviews of books Texts 120 in 3 folds Model TextClassifier 22.7M parameters",
    "Method NLL Macro-F1 Trained parameters Edited parameters Adapter Seconds",
    "Linear head base 0.61 .702 770 – 3.08 kB 4.0",
    "BitFit tuned 0.64 +0.03 [+0.01, +0.05] .711 +.009 [−.040, +.060] 43,000 – 172 kB 31",
    "LoRA, r=8 tuned 0.38 −0.23 [−0.30, −0.16] .851 +.149 [+.070, +.230] 148,226 – 593 kB 59",
    "Below each value: the difference to base, paired by text, with its 95% bootstrap interval;",
    "Lower is better: NLL. NLL nats a text Macro-F1 mean over labels",
    "Speed Method Latency Linear head 12.0 BitFit 12.2 +0.2 [−0.3, +0.7] LoRA, r=8 14.6 +2.6 [+2.1, +3.1]",
    "Method NLL Macro-F1 p, NLL p, Macro-F1 BitFit 0.03 – .004 .710 LoRA, r=8 0.10 – < .001 < .001",
]


@pytest.fixture
def results() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "results-nll-f1.json").read_text())
    return content


def test_the_terminal_prints_the_table_the_section_and_the_verdict(results: dict[str, Any]) -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(table(results))
    for view in section_views(results):
        console.print(measured_table(view))
    console.print(*verdict(results), sep="\n")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\n".join(line.rstrip() for line in text.splitlines()) == TERMINAL


def test_the_page_shows_the_same(results: dict[str, Any], tmp_path: Path) -> None:
    html = write_html(results, tmp_path / "report.html").read_text(encoding="utf-8")
    text = " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)).split())
    for line in PAGE:
        assert line in text
    better = re.findall(r'class="up">([^<]*)<', html), re.findall(r'class="down">([^<]*)<', html)
    assert "−0.23" in better[0] and "+0.03" in better[1] and "+0.03" not in better[0]
