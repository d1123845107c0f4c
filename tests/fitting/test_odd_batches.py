"""Labels, groups, masks and texts of one's own that an edit cannot use are one sentence, wherever they come from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from statements import Module, Statements, trainer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

import lightning_peft
from lightning_peft.callbacks import CAA, ITI, Ablation, RepE
from lightning_peft.fitting.seen_texts import SeenTexts

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*(litlogger|bottleneck|optimizer|log_ev)"
)

Change = Callable[[dict[str, Any]], Any]


class Quiet(Module):
    """A module that does not look at its batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass


def fit(callback: Any, change: Change = lambda batch: None, rows: Any = None) -> Any:
    """Compute an edit from batches that were changed."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_collate(rows)
        change(batch)
        return batch

    rows = Statements(drop=("prompt_end",)) if rows is None else rows
    trainer(callback).fit(Quiet(), DataLoader(rows, 9, collate_fn=collate))
    return callback


def put(key: str, make: Callable[[Tensor], Any]) -> Change:
    return lambda batch: batch.__setitem__(key, make(batch[key]))


ODD: dict[str, tuple[Change, str]] = {
    "labels are words": (
        put("label", lambda v: ["true" if x else "false" for x in v]),
        r"^ITI reads label as a tensor of integers, .* got a list of texts such as 'false' for 9 rows: label is `torch",
    ),
    "groups are words": (
        put("group", lambda v: [f"q{x}" for x in v]),
        r"^ITI reads group as .* got a list of texts such as 'q0' for 9 rows: group is `torch\.tensor\(\[0, 0",
    ),
    "labels are a column": (
        put("label", lambda v: v[:, None]),
        r"got \[9, 1\], torch\.int64 .*: give `label\.squeeze\(1\)`",
    ),
    "groups are a column": (
        put("group", lambda v: v[:, None]),
        r"got \[9, 1\], torch\.int64 .*: give `group\.squeeze\(1\)`",
    ),
    "labels are one-hot": (
        put("label", torch.nn.functional.one_hot),
        r"^ITI reads label .* got \[9, 2\], torch\.int64 for",
    ),
    "labels are shares": (
        put("label", lambda v: v * 0.5),
        r"^ITI reads label .* got \[9\], torch\.float32, 0\.5 among them",
    ),
    "labels are missing": (put("label", lambda v: None), r"^ITI reads label .* got a NoneType for 9 rows"),
    "labels are signs": (
        put("label", lambda v: 2 * v - 1),
        r"^ITI reads label as 1 \(wanted, true\) or 0 \(not\), got -1, 1",
    ),
    "texts are words": (
        put("input_ids", lambda v: ["a"] * len(v)),
        r"^ITI needs input_ids as the tokens .* such as 'a'\.$",
    ),
    "a text is empty": (
        put("attention_mask", lambda v: v * (torch.arange(len(v)) > 0).long()[:, None]),
        r"row 0 of a training batch, where attention_mask is 0",
    ),
    "a mask is short": (
        put("attention_mask", lambda v: v[:, 1:]),
        r"attention_mask of \[9, 7\] with input_ids of \[9, 8\]",
    ),
    "a mask is 4D": (
        put("attention_mask", lambda v: v[:, None, None]),
        r"^ITI needs attention_mask as a tensor \[B, T\]",
    ),
    "unknown tokens": (
        put("input_ids", lambda v: v + 900),
        r"but the model knows 0 to 63: encode the texts with the model's",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_batch_that_an_edit_cannot_read_is_one_sentence(name: str) -> None:
    change, sentence = ODD[name]
    with pytest.raises(ValueError, match=sentence) as raised:
        fit(ITI(num_heads=2), change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [lambda v: v.tolist(), lambda v: v.numpy(), Tensor.bool, Tensor.float])
def test_labels_of_other_types_are_the_same_labels(make: Callable[[Tensor], Any]) -> None:
    expected, got = (fit(CAA(), change) for change in (lambda batch: None, put("label", make)))
    assert torch.equal(expected.edit_.vectors, got.edit_.vectors)


EDITS = [ITI(num_heads=2), CAA(), RepE(), Ablation()]


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_the_same_texts_under_both_labels_are_no_edit(number: int) -> None:
    row = Statements()[0]
    alike = [row | {"label": i % 2, "group": i // 2} for i in range(18)]
    with pytest.raises(ValueError, match=r" read one text under label 1 and under label 0, so that there is nothing "):
        fit(EDITS[number], rows=alike)


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (CAA(), r"^No question has both a true and a false statement, .*: give texts that belong together, some true"),
        (
            RepE(),
            r"^A principal component needs at least two questions .*: give texts that belong together one group\.$",
        ),
        (
            ITI(num_heads=2, direction="ccs"),
            r"^direction 'ccs' needs at least two .*: give texts that belong together one",
        ),
    ],
)
def test_texts_of_groups_of_their_own_are_one_sentence_for_what_compares(callback: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(callback, rows=[row | {"group": i} for i, row in enumerate(Statements().rows)])


@pytest.mark.parametrize("method", [CAA, RepE])
def test_what_is_left_out_for_want_of_a_counterpart_is_said(method: Any) -> None:
    alone = [row | {"group": 90 + i} for i, row in enumerate(Statements().rows[:4])]
    with pytest.warns(
        UserWarning, match=r"^4 of 13 questions \(groups\) have no true or no false statement and are left"
    ):
        fit(method(), rows=[*Statements().rows, *alone])


def test_a_text_under_both_labels_among_others_is_said_once() -> None:
    seen = SeenTexts()
    ids = torch.tensor([[5, 6, 0], [5, 6, 7], [8, 9, 0]])
    seen.note(ids, (ids > 0).long(), torch.tensor([1, 1, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen.check("CAA")
    seen.note(ids[:1], None, torch.tensor([0]))  # without a mask the 0 counts: another text
    seen.note(ids[:1, :2], None, torch.tensor([0]))
    with pytest.warns(UserWarning, match=r"^CAA read 1 of 4 texts under label 1 and under label 0, which blurs what"):
        seen.check("CAA")


@pytest.mark.parametrize(
    ("texts", "label", "group", "sentence"),
    [
        (["a", "b"], ["yes", "no"], [0, 0], r"^CAA reads label .* got a list of texts such as 'yes' for 2 rows"),
        (["a", "b"], [1, 0], ["q", "q"], r"^CAA reads group .* got a list of texts such as 'q' for 2 rows"),
        (["a", "b"], [1, 0.5], [0, 0], r"^CAA reads label .* 0\.5 among them for 2 rows"),
        (["a", "a"], [1, 0], [0, 0], r"^CAA read one text under label 1 and under label 0"),
        (["a", ""], [1, 0], [0, 0], r"^Text 1, '', has no token to read: leave it out\.$"),
        ("ab", [1, 0], [0, 0], r"^texts must be a list of texts, got the one text 'ab'\.$"),
    ],
)
def test_texts_given_without_a_trainer_are_checked_alike(
    tiny_tokenizer: Any, texts: Any, label: Any, group: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        lightning_peft.edit(Module().backbone, tiny_tokenizer, texts, label, group, CAA())
