"""The report: one table, one page, made from results alone."""

from __future__ import annotations

import base64
import copy
import io
import os
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from matplotlib import pyplot
from rich.console import Console

from lightning_peft.compare.page import write_html
from lightning_peft.compare.plots import by_method, head_accuracy_map
from lightning_peft.compare.terminal import table
from lightning_peft.compare.verdict import verdict

M = "\N{MINUS SIGN}"
BASE = {"mc0": 0.55, "mc1": 0.25, "mc2": 0.353, "mc3": 0.18}


def _row(method: str, label: str, kind: str, gain: float, **changes: Any) -> dict[str, Any]:
    metrics = {
        name: {"mean": mean + gain, "low": mean + gain - 0.03, "high": mean + gain + 0.03}
        for name, mean in BASE.items()
    }
    difference = {
        name: {"mean": gain, "low": gain - 0.04, "high": gain + 0.04, "p": 0.001 if gain > 0.04 else 0.4, "mde": 0.057}
        for name in BASE
    }
    row = {
        "method": method,
        "label": label,
        "kind": kind,
        "metrics": metrics,
        "difference": None if kind == "base" else difference,
        "trainable_parameters": 0,
        "edited_parameters": 0,
        "adapter_bytes": 0,
        "seconds": 61.4,
        "failed": None,
        "chosen": {},
    }
    return row | changes


def _category(mean: float) -> dict[str, Any]:
    return {metric: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for metric in ("mc1", "mc2")}


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "name": "Tune or edit",
        "data": {"source": "built-in", "label": "Common beliefs", "questions": 240, "hash": "d1ce", "folds": 2},
        "model": {
            "pretrained": "org/small-model",
            "fingerprint": "f00d",
            "parameters": 134_515_008,
            "layers": 4,
            "heads": 6,
        },
        "rows": [
            _row("base", "Base (6-shot primer)", "base", 0.0),
            _row("few", "More examples", "prompt", 0.02),
            _row(
                "lora",
                "LoRA r=8",
                "tuned",
                0.098,
                trainable_parameters=442_368,
                adapter_bytes=1_780_000,
                chosen={"learning_rate": [1e-4, 3e-4]},
            ),
            _row("iti", "ITI K=48", "edited", 0.061, edited_parameters=3072, adapter_bytes=13_400),
            _row("random", "Random directions", "control", -0.004, edited_parameters=3072),
        ],
        "contrasts": [
            {"a": "lora", "b": "iti", "metric": "mc2", "mean": 0.037, "low": -0.01, "high": 0.081, "p": 0.13}
        ],
        "categories": {
            "Health": {"base": _category(0.41), "lora": _category(0.52), "n": 30},
            "Law": {"base": _category(0.3), "iti": _category(0.35), "n": 6},
        },
        "head_accuracy": {
            "accuracy": [[0.5 + 0.01 * layer * head for head in range(6)] for layer in range(4)],
            "selected": [[3, 5], [2, 4]],
        },
        "settings": {"iti": {"alpha": [5, 15], "num_heads": [24, 48]}, "seed": 0},
        "versions": {"torch": "2.13.0", "peft": "0.19.0"},
        "caveats": ["One seed."],
    }


@pytest.fixture
def failed(results) -> dict[str, Any]:
    row = _row("ia3", "IA3", "tuned", 0.0, metrics={}, difference=None, seconds=None)
    results["rows"].append(row | {"failed": "The module 'k_porj' was not found; the nearest name is 'k_proj'."})
    return results


def _page(results: dict[str, Any], tmp_path: Any) -> str:
    return write_html(results, tmp_path / "report.html").read_text(encoding="utf-8")


def _terminal(results: dict[str, Any], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(results))
    return console.file.getvalue()


class _Text(HTMLParser):
    """Collects tags and visible text; raises nothing on bad HTML, so tags are checked for balance here."""

    void = frozenset({"meta", "img", "source", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.text.append(data)


def _parse(html: str) -> tuple[str, list[tuple[str, dict[str, str]]]]:
    parser = _Text()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return " ".join(" ".join(parser.text).split()), parser.tags


# --- the page ---


def test_the_page_shows_every_row_and_number(results, tmp_path):
    text, _ = _parse(_page(results, tmp_path))
    for row in results["rows"]:
        assert row["label"] in text
    assert ".451 +.098 [+.058, +.138]" in text
    assert f"{M}.004 [{M}.044, +.036]" in text
    assert "442,368" in text and "3,072" in text and "1.78 MB" in text and "13.4 kB" in text
    assert f"LoRA r=8 {M} ITI K=48 MC2 +.037 [{M}.010, +.081] .130 no" in text
    assert "Health 30 .410 .310 to .510 .410 .310 to .510 .520 .420 to .620" in text
    assert "One seed." in text and "torch 2.13.0" in text and '"alpha"' in text and '"learning_rate"' in text


def test_the_page_names_the_question_set_and_the_model(results, tmp_path):
    html = _page(results, tmp_path)
    text, _ = _parse(html)
    assert "Question set Common beliefs built-in" in text
    assert "240 in 2 folds" in text
    assert "org/small-model 135M parameters, 4 layers \N{MULTIPLICATION SIGN} 6 heads" in text
    assert "d1ce" in text and "f00d" in text
    assert "truthfulqa" not in html.lower()


def test_the_page_shows_what_could_not_have_been_detected(results, tmp_path):
    text, _ = _parse(_page(results, tmp_path))
    assert "What could not have been detected" in text
    # Holm over the four methods: .001 * 4 for LoRA, .001 * 3 for ITI that is not below it, .4 * 2 for the others.
    assert "LoRA r=8 .057 .057 .057 .057 .004 .004 .004 .004" in text
    assert "More examples .057 .057 .057 .057 .800 .800 .800 .800" in text


def test_the_page_needs_nothing_else(results, tmp_path):
    html = _page(results, tmp_path)
    _, tags = _parse(html)
    assert os.listdir(tmp_path) == ["report.html"]
    assert not re.search(r"""(src|srcset|href|action|data)\s*=\s*["']?\s*(https?:)?//""", html, re.IGNORECASE)
    assert "url(" not in html and "@import" not in html
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    sources = [attrs.get("src") or attrs.get("srcset") for tag, attrs in tags if tag in ("img", "source")]
    assert len(sources) == 4  # two pictures, each for a light and a dark page
    for source in sources:
        kind, content = source.split(",")
        assert kind == "data:image/svg+xml;base64" and b"<svg" in base64.b64decode(content, validate=True)


def test_categories_show_both_metrics_with_their_intervals_and_which_are_small(results, tmp_path):
    text, _ = _parse(_page(results, tmp_path))
    assert "MC1 and MC2 by category (2 categories)" in text
    shown = " ".join(text.split("MC1 and MC2 by category")[1].split("Settings and versions")[0].split())
    assert shown.count(".410 .310 to .510") == 2 and shown.count("few") == 1 and "Law 6 few" in shown


def test_every_value_is_escaped(results, tmp_path):
    attack = "<script>alert('&\"')</script>"
    results["rows"].append(_row("bad", "Bad", "tuned", 0, failed="Sentence."))
    results["name"] += attack
    results["caveats"][0] += attack
    for part in (results["data"], results["model"], *results["rows"]):
        for key in ("source", "label", "hash", "pretrained", "fingerprint", "failed"):
            if isinstance(part.get(key), str):
                part[key] += attack
    results["rows"][2]["chosen"] = {attack: attack}
    results["categories"][attack] = {"base": _category(0.2), "n": 3}
    results["versions"][attack] = attack
    results["settings"][attack] = attack

    text, tags = _parse(_page(results, tmp_path))
    assert "script" not in {tag for tag, _ in tags}
    for shown in ("Tune or edit", "Common beliefs", "built-in", "d1ce", "org/small-model", "f00d", "LoRA r=8"):
        assert shown + attack in text
    for shown in ("Sentence.", "One seed.", f"{attack} ", f'"{attack[:10]}'):
        assert shown in text
    assert text.count("<script>") == text.count("</script>") >= 20


def test_a_failed_row_says_why(failed, tmp_path):
    text, _ = _parse(_page(failed, tmp_path))
    assert "IA3 tuned Failed. The module 'k_porj' was not found; the nearest name is 'k_proj'." in text
    assert "Failed, and so not ranked: IA3." in text


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    assert _page(results, tmp_path) == _page(copy.deepcopy(results), tmp_path)


def test_a_crash_leaves_the_old_page(results, tmp_path, monkeypatch):
    path = write_html(results, tmp_path / "deep" / "report.html")
    before = path.read_text(encoding="utf-8")

    def no_rename(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="disk gone"):
        write_html(results | {"name": "Other"}, path)
    assert path.read_text(encoding="utf-8") == before
    assert os.listdir(path.parent) == ["report.html"]


def test_what_may_be_absent_may_be_absent(results, tmp_path):
    for row in results["rows"]:
        row["metrics"].pop("mc0")
        if row["difference"]:
            row["difference"].pop("mc0")
    results.update(contrasts=[], categories={}, head_accuracy=None, settings={}, versions={}, caveats=[])
    text, tags = _parse(_page(results, tmp_path))
    assert "MC0" not in text and "MC0" not in _terminal(results)
    assert "MC1" in text and ".451" in text
    assert len([tag for tag, _ in tags if tag == "img"]) == 1


def test_a_comparison_of_failures_only_is_still_a_page(results, tmp_path):
    for row in results["rows"]:
        row.update(failed="Out of memory.", metrics={}, difference=None)
    results.update(contrasts=[], categories={}, head_accuracy=None)
    text, _ = _parse(_page(results, tmp_path))
    assert text.count("Out of memory.") == 5
    assert "nothing to rank" in text


def test_other_content_is_one_sentence(tmp_path):
    for make in (table, verdict, lambda results: write_html(results, tmp_path / "report.html")):
        with pytest.raises(ValueError, match=r"have no data, model, rows; expected .* found the keys name"):
            make({"name": "x"})
    assert os.listdir(tmp_path) == []


# --- the verdict ---


def test_the_verdict_names_the_best_and_whether_it_is_resolved(results):
    best, pair, control = verdict(results)
    assert best == (
        "LoRA r=8 has the highest MC2, .451. Its difference to base is +.098 (95% interval +.058 to +.138): resolved."
        " Corrected for the 4 methods compared with base, p = .004 (Holm)."
    )
    # Stored as tuned minus edited, told as edited minus tuned.
    assert "Edited minus tuned is -.037 (95% interval -.081 to +.010): not resolved, the interval includes 0." in pair
    assert control.startswith("The control Random directions differs from base by -.004")


def test_an_unresolved_best_comes_with_what_could_be_detected(results):
    results["rows"] = results["rows"][:2]
    (best,) = verdict(results)
    assert "not resolved" in best and "a true difference of .057 would have been found four times in five" in best


def test_base_may_win(results):
    for row in results["rows"][1:]:
        row["metrics"]["mc2"]["mean"] = 0.3
    assert verdict(results)[0] == "Base (6-shot primer) has the highest MC2, .353: no method raised it."


def test_a_missing_contrast_is_not_made_up(results):
    results["contrasts"] = []
    assert "The difference between them was not measured." in verdict(results)[1]


# --- the terminal ---


def test_the_table_fits_and_shows_every_row(failed):
    text = _terminal(failed)
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text
    for row in failed["rows"]:
        assert row["label"] in text
    assert ".451 (+.098)" in text and "[+.058, +.138]" in text
    assert re.search(r"442,368 .*\n.* trained ", text) and "1.78 MB" in text
    assert "failed: The module" in text
    assert text.replace("─", "").isascii()  # rich swaps its lines where the terminal lacks them, not our text


def test_a_label_with_brackets_is_not_markup(results):
    results["rows"][1]["label"] = "[bold]few[/bold]"
    assert "[bold]few[/bold]" in _terminal(results)


# --- the pictures ---


def test_the_map_marks_the_selected_heads(results):
    figure = head_accuracy_map(results["head_accuracy"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().shape == (4, 6)
    marked = {tuple(patch.get_bbox().get_points().mean(axis=0)) for patch in axes.patches}
    assert marked == {(5, 3), (4, 2)}  # head to the right, layer upwards


def test_the_map_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"head \[2, 0\] is outside the map of 2 layers and 2 heads"):
        head_accuracy_map({"accuracy": [[0.5, 0.5], [0.5, 0.5]], "selected": [[2, 0]]})
    with pytest.raises(ValueError, match="rows differ"):
        head_accuracy_map({"accuracy": [[0.5], [0.5, 0.5]], "selected": []})


def test_methods_are_drawn_once_each_with_base_first(failed):
    score, difference = by_method(failed, "mc1").axes
    assert [tick.get_text() for tick in score.get_yticklabels()] == [row["label"] for row in failed["rows"][:-1]]
    assert score.get_ylim()[0] > score.get_ylim()[1]  # the first row is on top
    assert difference.get_xlabel() == "MC1 difference to base"


def test_dollars_in_a_label_are_dollars(results, tmp_path):
    results["rows"][1]["label"] = "costs $5 and $\\frac"
    assert "costs $5" in _page(results, tmp_path)


def test_no_figure_is_left_open(results, tmp_path):
    _page(results, tmp_path)
    assert pyplot.get_fignums() == []
