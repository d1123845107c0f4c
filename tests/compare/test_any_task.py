"""The report of a task of one's own: everything it shows comes from the measures, unit and sections of its results."""

from __future__ import annotations

import ast
import copy
import io
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tuning import ROOT

from lightning_peft.compare.measured import Measure, measured_table, measured_view
from lightning_peft.compare.page import write_html
from lightning_peft.compare.plots import by_method, save_pictures
from lightning_peft.compare.results import completed, ranked_rows
from lightning_peft.compare.sections import section_views
from lightning_peft.compare.terminal import table
from lightning_peft.compare.verdict import verdict

Content = dict[str, Any]
M = "\N{MINUS SIGN}"


def value(mean: float, reach: float = 0.05) -> Content:
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def change(mean: float, reach: float = 0.05, **more: Any) -> Content:
    return value(mean, reach) | {"p": 0.001 if abs(mean) > reach else 0.5, "mde": 0.07} | more


def row(method: str, kind: str, metrics: dict[str, float], differences: dict[str, float] | None = None) -> Content:
    return {
        "method": method,
        "label": method.upper(),
        "kind": kind,
        "metrics": {name: value(mean) for name, mean in metrics.items()},
        "difference": None if differences is None else {name: change(mean) for name, mean in differences.items()},
        "trainable_parameters": 325,
        "edited_parameters": 0,
        "adapter_bytes": 1300,
        "seconds": 2.0,
        "failed": None,
    }


NLL = {"label": "NLL", "meaning": "nats an image", "better": -1, "range": [0, None], "written": ".2f"}
ACCURACY = {"label": "Accuracy", "meaning": "share told right", "better": 1, "range": [0, 1], "written": ""}


@pytest.fixture
def digits() -> Content:
    """A comparison of three rows on images: the smaller NLL ranks them."""
    return {
        "name": "Digits",
        "data": {"label": "digits 5 to 9", "units": 300, "folds": 2},
        "model": {"pretrained": "Digits", "parameters": 13_000},
        "unit": "image",
        "measures": {"nll": NLL, "accuracy": ACCURACY},
        "primary": "nll",
        "rows": [
            row("head", "base", {"nll": 0.808, "accuracy": 0.7}),
            row("bitfit", "tuned", {"nll": 0.757, "accuracy": 0.733}, {"nll": -0.051, "accuracy": 0.033}),
            row("caa", "edited", {"nll": 1.2, "accuracy": 0.74}, {"nll": 0.392, "accuracy": 0.04}),
        ],
        "sections": [],
    }


def printed(what: Any, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def page(results: Content, folder: Path) -> str:
    """Return the page with the tags of numbers, without pictures and line breaks."""
    html = unescape(write_html(results, folder / "report.html").read_text(encoding="utf-8"))
    return " ".join(re.sub(r"data:image[^\"]*", "", html).split())


def visible(html: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html).split())


# -- a measure of which less is better ------------------------------------------------------------------------------


def test_the_smallest_is_the_best_where_less_is_better(digits: Content) -> None:
    assert [r["method"] for r in ranked_rows(completed(digits))] == ["bitfit", "head", "caa"]
    best, pair = verdict(digits)
    assert best.startswith("BITFIT has the lowest NLL, 0.76. Its difference to base is -0.05 (95% interval")
    assert pair.startswith("The best edited method is CAA (1.20), the best tuned one BITFIT (0.76).")
    digits["rows"] = [digits["rows"][0], digits["rows"][2]]
    assert verdict(digits) == ["HEAD has the lowest NLL, 0.81: no method lowered it."]


def test_the_same_numbers_rank_the_other_way_where_more_is_better(digits: Content) -> None:
    digits["measures"]["nll"] = NLL | {"better": 1}
    assert [r["method"] for r in ranked_rows(completed(digits))] == ["caa", "head", "bitfit"]
    assert verdict(digits)[0].startswith("CAA has the highest NLL, 1.20.")


def test_less_is_green_and_more_is_red_where_less_is_better(digits: Content, tmp_path: Path) -> None:
    cells = {c.header.plain: list(c.cells) for c in table(digits).columns if hasattr(c.header, "plain")}
    styles = {label: [str(span.style) for text in column for span in text.spans] for label, column in cells.items()}
    assert styles["NLL"] == ["green", "red"] and styles["Accuracy"] == []
    html = page(digits, tmp_path)
    assert f'<span class="up">{M}0.05</span>' in html and '<span class="down">+0.39</span>' in html


def test_table_page_and_picture_say_that_less_is_better(digits: Content, tmp_path: Path) -> None:
    assert "Lower is better: NLL" in printed(table(digits)) and "Lower is better: NLL." in page(digits, tmp_path)
    assert by_method(digits).axes[0].get_xlabel() == "NLL (lower is better)"
    assert by_method(digits, "accuracy").axes[1].get_xlabel() == "Accuracy difference to base"


# -- words and formats ----------------------------------------------------------------------------------------------


def test_every_number_is_written_as_its_measure_says(digits: Content, tmp_path: Path) -> None:
    digits["measures"]["accuracy"] = ACCURACY | {"written": ".1%"}
    digits["contrasts"] = [{"a": "caa", "b": "bitfit", "metric": "nll", **change(0.44)}]
    for shown in (printed(table(digits)), visible(page(digits, tmp_path))):
        assert "0.81" in shown and ".808" not in shown and "73.3%" in shown and "+3.3%" in shown
    assert f"CAA {M} BITFIT NLL +0.44 [+0.39, +0.49]" in visible(page(digits, tmp_path))
    assert verdict(digits)[1].endswith("Edited minus tuned is +0.44 (95% interval +0.39 to +0.49): resolved.")


def test_a_difference_that_is_rounded_to_nothing_has_no_sign(digits: Content, tmp_path: Path) -> None:
    digits["measures"]["nll"] = NLL | {"written": ".0f"}
    digits["rows"][1]["difference"]["nll"] = {"mean": 0.4, "low": -0.3, "high": 1.2, "p": 0.5, "mde": 1.0}
    assert "1 (+0)" in printed(table(digits)) and "[0, +1]" in printed(table(digits))
    assert "[0, +1]" in visible(page(digits, tmp_path))


def test_a_unit_is_called_what_the_results_call_it(digits: Content, tmp_path: Path) -> None:
    shown, text = printed(table(digits)), visible(page(digits, tmp_path))
    assert "(300 images, 2 folds)" in shown and "paired by image" in shown
    assert "Image set digits 5 to 9 Images 300 in 2 folds" in text and "question" not in text.lower()
    digits["rows"][1]["difference"]["nll"] = change(-0.01)
    assert "With these images a true difference of 0.07 would have been found" in verdict(digits)[0]
    digits |= {"unit": "person", "units": "people"}
    assert "(300 people, 2 folds)" in printed(table(digits)) and "People 300" in visible(page(digits, tmp_path))


def test_what_a_model_has_not_is_not_shown(digits: Content, tmp_path: Path) -> None:
    text = visible(page(digits, tmp_path))
    assert "13,000 parameters Verdict" in text
    assert not {"layers", "fingerprint", "hash", "unknown", "None"} & set(re.findall(r"\w+", text))


def test_a_function_of_all_predictions_is_no_mean(digits: Content, tmp_path: Path) -> None:
    for r in digits["rows"][1:]:
        r["difference"]["accuracy"]["mde"] = None
    assert "Below each value: difference to base" in printed(table(digits))
    text = visible(page(digits, tmp_path))
    assert "Points are values on all images" in text and "BITFIT 0.07 \N{EN DASH}" in text


def test_a_value_that_its_measure_cannot_have_is_told(digits: Content) -> None:
    digits["rows"][1]["metrics"]["accuracy"]["mean"] = 73.3
    sentence = "BITFIT: Accuracy is 73.300, but its least value is .000 and its greatest 1.000: do not rely on it."
    assert verdict(digits)[-1] == sentence
    digits["rows"][1]["metrics"] = {"nll": value(-0.5)}
    assert "its least value is 0.00 and its greatest any" in verdict(digits)[-1]


# -- few rows, many measures, nothing -------------------------------------------------------------------------------


def test_twelve_measures_stand_below_each_other_and_none_is_cut(digits: Content, tmp_path: Path) -> None:
    names = [f"measure {i}" for i in range(12)]
    digits["measures"] = {name: {"label": name.title(), "better": 1} for name in names}
    digits["primary"] = "measure 0"
    digits["rows"] = [
        row("base", "base", {name: 0.1 + i / 100 for i, name in enumerate(names)}),
        row("lora", "tuned", {name: 0.5 + i / 100 for i, name in enumerate(names)}, dict.fromkeys(names, 0.4)),
    ]
    shown = printed(table(digits))
    assert max(map(len, shown.splitlines())) <= 120
    for i in range(12):
        assert f"Measure {i} " in shown + " " and f".{10 + i}0" in shown and f".{50 + i}0 (+.400)" in shown
    assert shown.count("[+.350, +.450]") == 12 and shown.count("LORA") == 3 and shown.count("1.3 kB") == 2
    assert visible(page(digits, tmp_path)).count("+.400 [+.350, +.450]") == 12
    section = {"title": "More", "measures": digits["measures"]}
    assert (
        printed(measured_table(section_views(digits | {"sections": [section], "measures": {}})[0])).count("LORA") == 3
    )


def test_a_measure_that_only_some_rows_have_is_shown_for_these(digits: Content, tmp_path: Path) -> None:
    del digits["rows"][0]["metrics"]["nll"], digits["rows"][1]["difference"]["nll"]
    assert "HEAD - .700" in " ".join(printed(table(digits)).split())
    assert verdict(digits)[0] == "BITFIT has the lowest NLL, 0.76. Its difference to base was not measured."
    assert [t.get_text() for t in by_method(digits).axes[0].get_yticklabels()] == ["BITFIT", "CAA"]
    assert "HEAD base \N{EN DASH} .700" in visible(page(digits, tmp_path))


def test_without_a_value_of_the_primary_measure_the_others_are_shown(digits: Content, tmp_path: Path) -> None:
    for r in digits["rows"]:
        r["metrics"].pop("nll")
    assert verdict(digits) == ["No method has an NLL score, so there is nothing to rank."]
    assert ".733" in printed(table(digits)) and "Accuracy by method" in page(digits, tmp_path)
    assert by_method(digits).axes[0].get_xlabel() == "Accuracy"


def test_one_row_alone_is_a_report(digits: Content, tmp_path: Path) -> None:
    digits["rows"] = digits["rows"][:1]
    assert verdict(digits) == ["HEAD has the lowest NLL, 0.81: no other method was measured."]
    assert "0.81" in printed(table(digits)) and "What could not have been detected" not in page(digits, tmp_path)


def test_without_any_value_there_is_no_picture(digits: Content, tmp_path: Path) -> None:
    for r in digits["rows"]:
        r.update(metrics={}, difference=None, failed="Out of memory.")
    assert save_pictures(digits, tmp_path) == [] and "<img" not in page(digits, tmp_path)
    assert "failed: Out of" in printed(table(digits))
    with pytest.raises(ValueError, match="nothing to draw: no row has a value of any measure"):
        by_method(digits)
    with pytest.raises(ValueError, match="no row has a value of recall"):
        by_method(digits, "recall")


def test_a_value_that_is_undefined_is_shown_and_not_ranked(digits: Content, tmp_path: Path) -> None:
    digits["rows"][1]["metrics"]["nll"] = {"mean": math.nan, "low": math.nan, "high": math.nan}
    digits["rows"][2]["metrics"]["nll"] = {"mean": None, "low": None, "high": None}
    digits["rows"][2]["difference"]["nll"] = {"mean": None, "low": None, "high": None, "p": math.nan, "mde": None}
    assert [r["method"] for r in ranked_rows(completed(digits))] == ["head"]
    assert "nan" in printed(table(digits)) and "nan" in visible(page(digits, tmp_path))
    assert save_pictures(digits, tmp_path) != []


def test_numbers_that_are_missing_are_dashes(digits: Content, tmp_path: Path) -> None:
    digits["rows"][0] |= {"metrics": {"nll": None, "accuracy": {"low": 0.1}}, "draws": {"nll": None}}
    digits["rows"][1]["difference"] = {"nll": {"low": 0.1, "high": 0.2}, "accuracy": None}
    digits["measures"]["accuracy"] = {"label": "Accuracy", "better": 1, "written": None}
    assert "BITFIT 0.76 (-) .733" in " ".join(printed(table(digits)).split())
    assert "HEAD base \N{EN DASH} \N{EN DASH}" in visible(page(digits, tmp_path)) and verdict(digits)
    assert "HEAD - -" in " ".join(printed(table(digits)).split())


# -- what nothing describes -----------------------------------------------------------------------------------------


def test_measures_that_nothing_describes_are_shown_without_colour_or_rank(digits: Content, tmp_path: Path) -> None:
    del digits["measures"], digits["primary"], digits["unit"]
    assert "Nothing in the results says whether more or less nll is better, so nothing is ranked." in verdict(digits)
    shown, html = printed(table(digits)), page(digits, tmp_path)
    assert ".757 (-.051)" in shown and ".733 (+.033)" in shown and "(300 units, 2 folds)" in shown
    assert 'class="up"' not in html and 'class="down"' not in html and "nll by method" in html
    assert "neither ranked nor coloured" in html


def test_a_measure_that_came_from_nowhere_is_a_column_more(digits: Content, tmp_path: Path) -> None:
    digits["rows"][1]["metrics"]["calibration"] = value(0.123)
    assert "calibration" in printed(table(digits)) and "123" in page(digits, tmp_path)
    assert verdict(digits)[0].startswith("BITFIT has the lowest NLL")


def test_rows_of_unknown_kinds_and_with_few_keys_are_drawn(digits: Content, tmp_path: Path) -> None:
    digits["rows"] += [
        row("distilled", "distilled", {"nll": 0.5}),
        {"method": "bare", "metrics": {"nll": {"mean": 0.4}}},
    ]
    assert verdict(digits)[0] == "bare has the lowest NLL, 0.40. Its difference to base was not measured."
    text = visible(page(digits, tmp_path))
    assert "DISTILLED distilled 0.50" in text and "bare 0.40" in text and "0.40" in printed(table(digits))
    figure = by_method(digits)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][-2:] == ["DISTILLED", "bare"]
    colors = {line.get_color() for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert len(colors) == 4  # base, tuned, edited, and what is of no known kind


def test_categories_have_the_measures_that_they_are_given(digits: Content, tmp_path: Path) -> None:
    digits["categories"] = {"five": {"n": 9, "head": {"nll": value(0.8), "recall": value(0.6)}}, "six": {"n": 60}}
    text = visible(page(digits, tmp_path))
    assert "NLL and recall by category (2 categories)" in text
    assert "Category Images HEAD NLL recall five 9 few 0.80 0.75 to 0.85 .600 .550 to .650" in text
    assert "wider than need be where scores are not 0 or 1. Few: under 10 images." in text
    assert "Below each mean: as they say. Few" in visible(
        page(digits | {"category_note": "Below each mean: as they say."}, tmp_path)
    )
    digits["category_measures"] = ["nll"]
    assert "NLL by category" in visible(page(digits, tmp_path))


@pytest.mark.parametrize("written", [".2q", "{}", "d"])
def test_a_format_that_is_none_is_one_sentence(written: str, digits: Content) -> None:
    digits["measures"]["nll"] = NLL | {"written": written}
    with pytest.raises(ValueError, match=r"'nll' is written as '.*', which is no format of a number: use one such"):
        table(digits)


def test_the_results_are_left_as_they_were(digits: Content, tmp_path: Path) -> None:
    before = copy.deepcopy(digits)
    page(digits, tmp_path), verdict(digits), table(digits), section_views(digits)
    assert digits == before


# -- sections -------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(digits: Content) -> Content:
    """The comparison with a section: what a row forgot, whose price is told."""
    forgot = {"label": "Forgot", "meaning": "share of old digits", "better": -1, "written": ".1%"}
    digits["sections"] = [
        {
            "name": "memory",
            "title": "Memory",
            "measures": {"forgot": forgot, "never": {"label": "Never"}},
            "notes": ["On 100 old digits."],
            "below": {"bitfit": {"forgot": "of 50 classes"}},
            "price": "It forgets {forgot} of the old digits, {forgot:+}.",
        }
    ]
    digits["rows"][1]["metrics"]["forgot"], digits["rows"][1]["difference"]["forgot"] = value(0.2), change(0.2)
    return digits


def test_a_section_is_a_table_of_its_own(memory: Content, tmp_path: Path) -> None:
    (view,) = section_views(memory)
    shown, html = printed(measured_table(view)), page(memory, tmp_path)
    for words in ("Memory", "Forgot", "20.0%", "+20.0%", "[+15.0%, +25.0%]", "of 50 classes", "On 100 old digits."):
        assert words in shown and words in html
    assert view["rows"][0]["cells"][0]["change"] == "down" and len(view["columns"]) == len(view["rows"]) == 1
    assert "paired by image" in visible(html).partition("Memory")[2]
    assert "Forgot" not in printed(table(memory))


def test_the_price_of_the_best_row_is_told_where_it_was_measured(memory: Content) -> None:
    assert verdict(memory)[1] == "It forgets 20.0% of the old digits, +20.0% (95% interval +15.0% to +25.0%)."
    del memory["rows"][1]["difference"]["forgot"]
    assert not any("forgets" in sentence for sentence in verdict(memory))


def test_a_section_of_which_nothing_was_measured_says_so(memory: Content, tmp_path: Path) -> None:
    memory["rows"][1]["metrics"].pop("forgot")
    memory["sections"].append({"title": "Nothing"})
    for shown in ("".join(printed(measured_table(v)) for v in section_views(memory)), visible(page(memory, tmp_path))):
        assert "No row has a value of Forgot and Never." in shown and "It has no measures." in shown
        assert "Memory" in shown and "On 100 old digits." in shown


def test_measures_can_be_viewed_without_results_json(digits: Content) -> None:
    measures = {"nll": Measure("NLL", "nats an image", -1), "other": Measure("Other", "")}
    view = measured_view({"rows": digits["rows"]}, "Digits", measures, ["two folds"])
    assert view is not None and [c["change"] for r in view["rows"] for c in r["cells"]] == ["", "up", "down"]
    assert "two folds" in printed(measured_table(view)) and ".757 (-.051)" in printed(measured_table(view))
    assert measured_view({"rows": digits["rows"]}, "Digits", {"other": measures["other"]}, []) is None


# -- the source -----------------------------------------------------------------------------------------------------

REPORT = "categories columns function_statistics interval measured page plots results sections statistics terminal"
WORDS = r"truthful|\bmc[0-3]\b|bleu|rouge|true_info|true\*info|question"


@pytest.mark.parametrize("name", [*REPORT.split(), "verdict", "writing"])
def test_no_code_of_the_report_names_a_benchmark_or_its_measures(name: str) -> None:
    tree = ast.parse((ROOT / "lightning_peft" / "compare" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    words = set(re.findall(WORDS, ast.unparse(tree), re.IGNORECASE))
    assert words <= ({"question", "questions"} if name == "results" else set())  # a key of results of 0.1


def test_the_template_names_no_benchmark_or_its_measures() -> None:
    text = (ROOT / "lightning_peft" / "compare" / "report.html.jinja").read_text()
    assert re.findall(WORDS, text, re.IGNORECASE) == []
