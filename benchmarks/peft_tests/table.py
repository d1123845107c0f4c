"""The table of how peft's tests ended on our types, as Markdown."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from rules import Entry, reason_of

_ROW = "| {} | {} | {} | {} | {} | {} |"


def table(entries: Sequence[Entry]) -> str:
    """Return the table, and below it what does not apply and why, what failed, and what passed against a rule."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    failed, unexpected, skipped = [], [], Counter[str]()
    for entry in entries:
        outcome, reason = entry["outcome"], reason_of(entry)
        if outcome == "failed" and reason is not None:
            outcome = "does not apply"
            reasons[reason][entry["type"]] += 1
        elif outcome == "failed":
            failed.append(entry)
        elif outcome == "passed" and reason is not None:
            unexpected.append(entry)
        elif outcome == "skipped":
            skipped[_general(entry["error"])] += 1
        counts[entry["file"], entry["type"]][outcome] += 1
    columns = ("passed", "failed", "does not apply", "skipped")
    lines = [
        _ROW.format("peft's file", "type", "passed", "failed", "does not apply", "peft skips"),
        "|---|---|---|---|---|---|",
    ]
    lines += [
        _ROW.format(f"`{file}`", kind, *(counted[c] for c in columns))
        for (file, kind), counted in sorted(counts.items())
    ]
    lines += ["", "Does not apply:", ""]
    lines += [f"- {reason} ({_numbers(counted)})." for reason, counted in sorted(reasons.items())] or ["- nothing."]
    lines += ["", "Failed:", ""]
    lines += [f"- `{e['id']}`: {e['error'].splitlines()[0][:200]}" for e in failed] or ["- nothing."]
    lines += ["", "Passed, although a rule says that it does not apply:", ""]
    passed = Counter((e["type"], e["test"]) for e in unexpected)
    lines += [f"- {kind}, `{test}` ({n})." for (kind, test), n in sorted(passed.items())] or ["- nothing."]
    lines += ["", "Skipped by peft's own tests, in their words:", ""]
    lines += [f"- {words} ({n})." for words, n in skipped.most_common()] or ["- nothing."]
    return "\n".join(lines)


def _general(words: str) -> str:
    """Return a skip's words without the names of classes and models."""
    return re.sub(r"<class '[\w.]+\.(\w+)'>", "this method", words.splitlines()[0]).rstrip(".")


def _numbers(counted: Counter[str]) -> str:
    return ", ".join(f"{kind} {n}" for kind, n in sorted(counted.items()))
