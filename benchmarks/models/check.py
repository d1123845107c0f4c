"""Compare what the package does to one small model with plain hooks and plain scoring."""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_peft
from benchmarks.models.pictures import picture_inputs
from benchmarks.models.places import missed_blocks, wrong_heads
from benchmarks.models.plain import Vectors, Written, answer_logprobs, logits, steered, write
from lightning_peft import bake, save_adapter
from lightning_peft.editing import (
    HeadSite,
    LayerSite,
    caa_vectors,
    capture_tokens,
    head_sites,
    layer_offsets_config,
    layer_sites,
)
from lightning_peft.editing.iti import compute_iti
from lightning_peft.packing.choices import ChoiceScorer
from lightning_peft.stack.computed import ComputedAdapter, saved_key
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.shrunk import WORDS

RELATIVE = 1e-4  # of the largest logit
NATS = 1e-4
NEW_TOKENS, PROMPT, PADS = 2, 10, 3
HEADS, ALPHA, MULTIPLIER = 6, 5.0, 2.0


@dataclass(frozen=True)
class Outcome:
    """How one comparison ended: `equal`, `refused` (a sentence of the package), `differs`, `raises`, or `none`.

    `none`: there is nothing to compare, since the model cannot do it without the package either.
    """

    outcome: str
    detail: str = ""

    def json(self) -> list[str]:
        return [self.outcome, self.detail]


@dataclass(frozen=True)
class Edit:
    """An edit both ways: as the package puts it on, and as plain vectors."""

    adapter: ComputedAdapter
    vectors: Vectors


def check(model: Any, sees_pictures: bool) -> dict[str, Any]:
    """Return all outcomes on one model, by what was compared, and how pictures were given."""
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    cases: dict[str, dict[str, Tensor]] = {"text": words(), "padded": words(PADS)}
    row: dict[str, Any] = {}
    if sees_pictures:
        try:
            row["picture"], cases["picture"] = picture_inputs(model)
        except Exception as error:
            row["picture"] = f"no: {sentence(error)}"
    base, unable = {}, {}
    for name, inputs in cases.items():
        for cached in (True, False):
            if name == "padded" and not cached:
                continue
            way = f"{name}, {'with' if cached else 'without'} cache"
            try:
                base[way] = (inputs, cached, write(model, inputs, cached, NEW_TOKENS))
            except Exception as error:
                unable[way] = sentence(error)
    row["ways"], row["unable"] = sorted(base), unable
    edits: dict[str, Edit] = {}
    for name, make in (("iti", iti), ("caa", caa)):
        if not base:
            row[name] = Outcome("none", f"it does not generate: {next(iter(unable.values()))}").json()
            continue
        if not any(way.startswith("text") for way in base):
            row[name] = Outcome("none", f"it writes no text without a picture: {next(iter(unable.values()))}").json()
            continue
        row[name] = _attempt(lambda make=make, name=name: _steering(model, make, edits, name, base, encodes)).json()
    row["bake"] = _attempt(lambda: _baking(model, edits.get("iti"))).json()
    row["bake_caa"] = _attempt(lambda: _baking(model, edits.get("caa"))).json()
    row["packed"] = _attempt(lambda: _scoring(model, edits.get("iti"), encodes)).json()
    return row


def words(pads: int = 0) -> dict[str, Tensor]:
    """Return two prompts, the second shorter by `pads` and padded on the left."""
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(WORDS.start, WORDS.stop, (2, PROMPT), generator=draw)
    mask = torch.ones_like(ids)
    ids[1, :pads], mask[1, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def statements() -> tuple[list[list[int]], Tensor, Tensor]:
    """Return random token rows in pairs, their labels and groups."""
    draw = torch.Generator().manual_seed(0)
    label = torch.arange(16) % 2
    rows = [torch.randint(WORDS.start, WORDS.stop, (5 + i % 4,), generator=draw).tolist() for i in range(16)]
    return [[*row, 5 if label[i] else 7] for i, row in enumerate(rows)], label, torch.arange(16) // 2


def iti(model: Any, encodes: bool) -> Edit:
    """Compute head offsets by the package's functions."""
    sites = head_sites(model, part="self")  # of decoders alone too, which have idle cross-attentions
    rows, label, group = statements()
    values = _read(model, sites, rows, encodes)
    made = compute_iti(values, label, group, num_heads=min(HEADS, values.shape[1] * values.shape[2]))
    by_module: dict[str, Tensor] = {}
    for (layer, head), direction, sigma in zip(made.heads, made.directions, made.sigma, strict=True):
        site = sites[layer]
        vector = by_module.setdefault(site.name, torch.zeros(site.num_heads * site.head_dim))
        vector[head * site.head_dim : (head + 1) * site.head_dim] = ALPHA * sigma * direction[: site.head_dim]
    return Edit(made.adapter(sites, ALPHA, "answer"), Vectors(by_module, to_input=True))


def caa(model: Any, encodes: bool) -> Edit:
    """Compute layer offsets by the package's functions."""
    sites = layer_sites(model, part="self")
    rows, label, group = statements()
    vectors = caa_vectors(_read(model, sites, rows, encodes), label, group)
    config = layer_offsets_config(sites, MULTIPLIER, "answer")
    tensors = {
        saved_key(site.name, "layer_edits.layer_offsets"): v[None] for site, v in zip(sites, vectors, strict=True)
    }
    plain = {site.name: MULTIPLIER * v for site, v in zip(sites, vectors, strict=True)}
    return Edit(ComputedAdapter(config, tensors), Vectors(plain, to_input=False))


def _read(model: Any, sites: list[HeadSite] | list[LayerSite], rows: list[list[int]], encodes: bool) -> Tensor:
    if not encodes:
        return capture_tokens(model, sites, rows)
    from lightning_peft.editing import Capture

    read = []
    with Capture(model, sites) as capture:
        for row in rows:
            read.append(capture(torch.tensor([row]), decoder_input_ids=torch.tensor([row])))
    return torch.cat(read)


def _steering(
    model: Any,
    make: Callable[[Any, bool], Edit],
    edits: dict[str, Edit],
    name: str,
    base: Mapping[str, tuple[dict[str, Tensor], bool, Written]],
    encodes: bool,
) -> Outcome:
    edit = make(model, encodes)
    edits[name] = edit
    places = sorted(edit.vectors.by_module)
    if edit.vectors.to_input:
        misplaced = wrong_heads(model, places, next(iter(base.values()))[0])
        if misplaced:
            return Outcome("differs", f"{len(misplaced)} sites are no attention's last projection: {misplaced[0]}")
    elif missed := missed_blocks(model, places):
        return Outcome("differs", f"its sites are {missed}")
    equal, wrong = [], []
    for way, (inputs, cached, unedited) in base.items():
        try:
            with steered(model, edit.vectors):
                expected = write(model, inputs, cached, NEW_TOKENS)
        except Exception as error:
            wrong.append(Outcome("none", f"{way}: the hooks fail: {sentence(error)}"))
            continue
        outcome = _attempt(lambda: _one_way(model, edit, inputs, cached, expected, unedited))  # noqa: B023
        (equal if outcome.outcome == "equal" else wrong).append(Outcome(outcome.outcome, f"{way}: {outcome.detail}"))
    inputs, cached, unedited = next(iter(base.values()))
    if not torch.equal(write(model, inputs, cached, NEW_TOKENS).logits, unedited.logits):
        wrong.append(Outcome("differs", "the model is not as before when the edit is taken off"))
    if wrong:
        worst = min(wrong, key=lambda o: ("raises", "differs", "refused", "none").index(o.outcome))
        ways = "" if not equal else f" ({len(equal)} of {len(base)} ways equal)"
        return Outcome(worst.outcome, worst.detail + ways)
    return Outcome("equal", f"{len(edit.vectors.by_module)} sites, {len(equal)} ways")


def _one_way(
    model: Any, edit: Edit, inputs: dict[str, Tensor], cached: bool, expected: Written, unedited: Written
) -> Outcome:
    with _put_on(model, edit):
        written = write(model, inputs, cached, NEW_TOKENS)
    moved = _relative(expected.logits, unedited.logits)
    if moved < 10 * RELATIVE:
        return Outcome("differs", f"the hooks themselves move logits by {moved:.0e} only")
    return _compare(written, expected)


def _compare(written: Written, expected: Written) -> Outcome:
    """Compare logits as long as the texts are one, then the texts."""
    distance = 0.0
    for place in range(expected.tokens.shape[1]):
        distance = max(distance, _relative(written.logits[:, place], expected.logits[:, place]))
        if not torch.equal(written.tokens[:, place], expected.tokens[:, place]):
            break
    if distance > RELATIVE:
        return Outcome("differs", f"logits by {distance:.0e} of the largest")
    if not torch.equal(written.tokens, expected.tokens):
        return Outcome("differs", "other tokens")
    return Outcome("equal")


@contextmanager
def _put_on(model: Any, edit: Edit) -> Iterator[None]:
    stack = stack_of(model)
    stack.put("edit", edit.adapter)
    try:
        yield
    finally:
        stack.remove("edit")


def _baking(model: Any, edit: Edit | None) -> Outcome:
    if edit is None:
        return Outcome("none", "there is no edit to bake")
    inputs = words()
    try:
        with steered(model, edit.vectors, 0):
            expected = logits(model, inputs)
    except Exception as error:
        return Outcome("none", f"no logits of text alone: {sentence(error)}")
    with tempfile.TemporaryDirectory() as folder:
        with _put_on(model, edit):
            save_adapter(model, Path(folder) / "edit")
        bake(model, Path(folder) / "edit", Path(folder) / "baked", verify=False)  # the comparison is ours
        baked = type(model).from_pretrained(Path(folder) / "baked").eval()
        distance = _relative(logits(baked, inputs), expected)
    return Outcome("equal") if distance <= RELATIVE else Outcome("differs", f"logits by {distance:.0e} of the largest")


def _scoring(model: Any, edit: Edit | None, encodes: bool) -> Outcome:
    if encodes:
        return Outcome("none", "an encoder-decoder")
    draw = torch.Generator().manual_seed(11)
    rows, prompts = [], []
    for end in (4, 7):
        prompt = [*range(20, 26), *torch.randint(WORDS.start, WORDS.stop, (end,), generator=draw).tolist()]
        for length in (3, 1, 4):
            rows.append([*prompt, *torch.randint(WORDS.start, WORDS.stop, (length,), generator=draw).tolist()])
            prompts.append(len(prompt))
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.where(mask.bool(), ids, -100)
    for line, prompt in zip(labels, prompts, strict=True):
        line[:prompt] = -100
    try:
        expected = answer_logprobs(model, rows, prompts, None)
    except Exception as error:
        return Outcome("none", f"no logits of text alone: {sentence(error)}")
    said, packs = [], []
    for edited in (None, edit) if edit else (None,):
        if edited is not None:
            expected = answer_logprobs(model, rows, prompts, edited.vectors)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scorer = ChoiceScorer(model)
            if edited is None:
                scores = scorer.score(ids, mask, labels)
            else:
                with _put_on(model, edited):
                    scores = scorer.score(ids, mask, labels)
        said += [str(w.message) for w in caught if w.category is UserWarning and type(model).__name__ in str(w.message)]
        packs.append(scorer.packs)
        distance = float((scores - expected).abs().max())
        if not distance <= NATS * max(1.0, float(expected.abs().max()) / 100):
            which = "unedited" if edited is None else "edited"
            return Outcome("differs", f"{which}, {'packed' if scorer.packs else 'plainly'}, by {distance:.0e} nats")
    if all(packs):
        return Outcome("equal", "packed")
    return Outcome("equal", f"plainly: {said[0]}" if said else "plainly")


def _relative(values: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in the largest finite value expected."""
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(values)):
        return float("inf")
    return float((values[finite] - expected[finite]).abs().max() / expected[finite].abs().max().clamp(min=1e-9))


def _attempt(compare: Callable[[], Outcome]) -> Outcome:
    try:
        return compare()
    except Exception as error:
        return Outcome("refused" if _is_sentence_of_ours(error) else "raises", sentence(error))


def _is_sentence_of_ours(error: Exception) -> bool:
    """Return whether the package itself raised the error, to say something."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(lightning_peft.__file__).parent in Path(last.filename).parents
    return ours and isinstance(error, ValueError | RuntimeError) and "raise" in (last.line or "raise")


def sentence(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" [{Path(last[0].filename).name}:{last[0].lineno}]" if last else ""
    if isinstance(error, Exception) and _is_sentence_of_ours(error):
        where = ""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:260]}{where}"
