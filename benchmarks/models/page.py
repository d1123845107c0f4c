"""The index of models, for a terminal and as a page of the documentation."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

ASPECTS = {
    "iti": "ITI",
    "caa": "CAA",
    "bake": "baked ITI",
    "bake_caa": "baked CAA",
    "packed": "packed scoring",
}
_TITLES = {"causal": "Causal language models", "image": "Image-text-to-text models"}
_MAPPINGS = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING", "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"}
_MARKS = {"equal": "yes", "refused": "no", "differs": "**differs**", "raises": "**fails**", "none": "–"}
_INTRODUCTION = """# Models

Every model type of transformers {version} that writes text, in small: its default configuration is shrunk by what its
fields mean (`lightning_peft.testing.shrunk`), with random weights, so that all its kinds of layers, windows, grouped
queries, experts and towers are there. On each, what the package does is compared with plain hooks and plain scoring
that know nothing of it:

- *ITI*, *CAA*: greedy text and its logits, to {relative:g} of the largest, under head offsets and under layer offsets
  from the last prompt token on, and the same vectors added by hooks. For two prompts, and for a picture with words,
  each with a cache and without; for two prompts of which one is padded on the left; as far as the model itself writes
  so.
- *baked ITI*, *baked CAA*: the logits of the folder that `bake` writes, loaded by transformers alone, and of hooks at
  every position.
- *packed scoring*: log-probabilities of answers, to {nats:g} nats, without an edit and with ITI, packed and each row in
  a call of its own. *plain*: the scorer warns that the model cannot be packed, and goes row by row.

*yes*: equal. *no*: the package says in a sentence that it cannot. **differs**, **fails**: it does not say so. –: there
is nothing to compare with. The sentences stand below each table. Tiny random models show that the mechanics are right
on an architecture; whether an edit does any good on a model of that type is another question.

```sh
python benchmarks/models/index.py --write
```
"""


def terminal(task: str, kind: str, row: Row) -> str:
    """Return one type's line."""
    if row["built"]:
        return f"{task} {kind}: not built: {row['built']}"
    ends = [f"{name} {' '.join(row[name]).strip()}" for name in ASPECTS]
    more = f" | picture {row['picture']}" if "picture" in row else ""
    return f"{task} {kind} {row['seconds']}s: {' | '.join(ends)}{more} | unable {row['unable']}"


def page(results: Mapping[str, Mapping[str, Row]], version: str, relative: float, nats: float) -> str:
    """Return the page, in Markdown.

    Args:
        results: by task and model type, what `index.run` returned.
        version: of transformers.
        relative, nats: what counts as equal.
    """
    parts = [_INTRODUCTION.format(version=version, relative=relative, nats=nats), _counts(results)]
    for task, rows in results.items():
        parts.append(f"## {_TITLES[task]}\n")
        parts.append(_table(rows, pictures=task == "image"))
        parts += _sentences(rows)
    return "\n".join(parts).rstrip() + "\n"


def _counts(results: Mapping[str, Mapping[str, Row]]) -> str:
    lines = [
        f"| | types | built | {' | '.join(ASPECTS.values())} | with a picture |",
        f"|---|{'---|' * (len(ASPECTS) + 3)}",
    ]
    for task, rows in results.items():
        built = [row for row in rows.values() if not row["built"]]
        ends = [_count([row[name] for row in built]) for name in ASPECTS]
        seen = sum("picture" in row and not _no_picture(row) for row in built)
        pictures = str(seen) if task == "image" else "–"
        lines.append(f"| `{_MAPPINGS[task]}` | {len(rows)} | {len(built)} | {' | '.join(ends)} | {pictures} |")
    return "\n".join([*lines, ""])


def _count(outcomes: Sequence[Sequence[str]]) -> str:
    """Return how many are equal, refused and wrong."""
    ends = [outcome for outcome, _ in outcomes]
    wrong = sum(end in ("differs", "raises") for end in ends)
    named = [
        (ends.count("equal"), "yes"),
        (ends.count("refused"), "no"),
        (wrong, "**wrong**"),
        (ends.count("none"), "–"),
    ]
    return ", ".join(f"{number} {name}" for number, name in named if number)


def _table(rows: Mapping[str, Row], pictures: bool) -> str:
    names = [*ASPECTS.values(), *(["picture"] if pictures else [])]
    lines = [f"| type | class | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for kind, row in sorted(rows.items()):
        if row["built"]:
            continue
        cells = [_cell(name, row[name]) for name in ASPECTS]
        if pictures:
            cells.append("–" if _no_picture(row) else str(row.get("picture", "–")))
        lines.append(f"| `{kind}` | {row['class']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(name: str, outcome: Sequence[str]) -> str:
    if name == "packed" and outcome[0] == "equal" and outcome[1].startswith("plainly"):
        return "plain"
    return _MARKS[outcome[0]]


def _sentences(rows: Mapping[str, Row]) -> list[str]:
    """Return the lists of what differs or fails, of what is refused, and of what could not be built."""
    wrong, refused, plain, none, pictures, unbuilt = (defaultdict(list) for _ in range(6))
    for kind, row in sorted(rows.items()):
        if row["built"]:
            unbuilt[_general(row["built"])].append(f"`{kind}`")
            continue
        if _no_picture(row):
            pictures[_general(row["picture"].removeprefix("no: "))].append(f"`{kind}`")
        for name, title in ASPECTS.items():
            outcome, detail = row[name]
            if outcome in ("differs", "raises"):
                wrong[_general(detail)].append(f"`{kind}` ({title})")
            elif outcome == "refused":
                refused[_general(detail)].append(f"`{kind}` ({title})")
            elif outcome == "none" and name in ("iti", "caa", "packed"):
                none[_general(detail)].append(f"`{kind}` ({title})")
            elif name == "packed" and detail.startswith("plainly"):
                plain[_general(detail.partition(": ")[2] or detail)].append(f"`{kind}`")
    lists = (
        ("Wrong", wrong),
        ("Refused, with the sentence", refused),
        ("Scored row by row", plain),
        ("Nothing to compare with", none),
        ("No picture could be made without the type's processor", pictures),
        ("Not built", unbuilt),
    )
    parts = []
    for title, by_sentence in lists:
        if by_sentence:
            lines = [f"- {_quoted(sentence)}: {', '.join(kinds)}" for sentence, kinds in sorted(by_sentence.items())]
            parts.append("\n".join([f"**{title}**", "", *lines, ""]))
    return parts


def _no_picture(row: Row) -> bool:
    return str(row.get("picture", "")).startswith("no: ")


def _general(sentence: str) -> str:
    """Return a sentence without what differs between models, so that those that say the same stand together."""
    sentence = re.sub(
        r"\b(model|transformer|backbone|bert|roberta|decoder|gpt_neox|language_model)\.[\w.]+", "…", sentence
    )
    sentence = re.sub(r"\b\w*(For\w+|LMHead\w*|DecoderLayer|Layer|Block|Wrapper)\b", "…", sentence)
    sentence = re.sub(r"\s*\[\w+\.py:\d+\]", "", sentence)
    return re.sub(r"\d+(\.\d+)?e[+-]\d+|\b\d+\b", "n", sentence).strip() or "no reason given"


def _quoted(sentence: str) -> str:
    return sentence.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
