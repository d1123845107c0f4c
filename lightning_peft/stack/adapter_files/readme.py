"""The README.md of a saved folder: metadata for the hub and a text, written unless the user has written one.

A text of this package ends in a comment with its hash. A later save replaces it as long as it fits its hash, and keeps
what else stands in the metadata. So is the empty form that peft writes; any other README is the user's and stays.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning_peft.files.records import write_atomically
from lightning_peft.stack.adapter_files.names import README

Metadata = dict[str, Any]

FRAMEWORKS = "### Framework versions"  # under which peft adds its version to any card
_OURS = frozenset({"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"})
_BASE_TAG = "base_model:"  # tags of this beginning name a base
_FRONT = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_SIGNATURE = re.compile(r"^<!-- Written by lightning-peft.*? ([0-9a-f]{64}) -->$", re.MULTILINE)
_BLANK = "[More Information Needed]"


def write_readme(
    folder: Path, metadata: Metadata, text: str, own_tags: Collection[str] = (), place: Path | None = None
) -> None:
    """Write the README of a folder, whatever stands there; see `may_write`.

    Args:
        folder: where to write.
        metadata: for the hub: `base_model`, `library_name`, `pipeline_tag`, `tags` and the like.
        text: Markdown.
        own_tags: every tag that this package gives; others in the README from before stay.
        place: the folder that it is going to be in, whose README may hold further metadata; default `folder`.
    """
    from huggingface_hub import ModelCardData

    before = _metadata(_read(place or folder))
    tags = (tag for tag in _strings(before.get("tags")) if tag not in own_tags and not tag.startswith(_BASE_TAG))
    kept = {key: value for key, value in before.items() if key not in _OURS}
    metadata = {**kept, **metadata, "tags": sorted({*tags, *metadata["tags"]})}
    front = ModelCardData(**metadata).to_yaml(line_break="\n").strip()
    write_atomically(folder / README, f"---\n{front}\n---\n\n{text.strip()}\n\n{_signature(text)}\n")


def may_write(folder: Path) -> bool:
    """Return whether a folder has no README, or one that nobody has written a word of."""
    file = folder / README
    if not file.exists() and not file.is_symlink():
        return True
    if (content := _read(folder)) is None:
        return False
    body = _FRONT.sub("", content, count=1)
    if signature := _SIGNATURE.search(body):
        own, after = body[: signature.start()], body[signature.end() :]
        return not _lines(after) and _hash(own) == signature[1]
    return _BLANK in body and _lines(body) == _lines(_blank())


def public_name(name: object) -> str | None:
    """Return a base model's name as others may read it: of a folder on this machine its last component.

    Example:
        >>> public_name("HuggingFaceTB/SmolLM2-135M"), public_name("/home/me/models/mine/"), public_name("")
        ('HuggingFaceTB/SmolLM2-135M', 'mine', None)
    """
    if not isinstance(name, str) or not name.strip():
        return None
    parts = [part for part in re.split(r"[/\\]", name) if part.strip(". \t\n~")]
    if not parts:
        return None
    local = len(parts) > 2 or name[0] in "/\\.~" or re.match(r"[A-Za-z]:|.*\\", name, re.DOTALL) or _is_folder(name)
    return parts[-1] if local else name


def hub_name(name: str | None) -> str | None:
    """Return a name if it can be a repository's on the hub, which refuses cards that give another."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)  # type: ignore[arg-type]
    except HFValidationError:
        return None
    return name


def code(value: object) -> str:
    """Return a value as a code span of Markdown that nothing in it can end.

    Example:
        >>> code("q_proj"), code("a `b`\\n# c")
        ('`q_proj`', '`` a `b` # c ``')
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}" if longest else f"`{text}`"


def _read(folder: Path) -> str | None:
    """Return the content of a folder's README; None where it is none, a link, or no text."""
    file = folder / README
    try:
        return None if file.is_symlink() else file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _metadata(content: str | None) -> Metadata:
    """Return the metadata of a README; nothing where they cannot be read."""
    import yaml

    front = _FRONT.match(content or "")
    try:
        metadata = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        return {}
    return metadata


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _signature(text: str) -> str:
    return f"<!-- Written by lightning-peft, and anew at each save until this text is changed. {_hash(text)} -->"


def _hash(text: str) -> str:
    return hashlib.sha256("\n".join(_lines(text)).encode()).hexdigest()


def _lines(text: str) -> list[str]:
    """Return the lines of a text, without those that peft adds to any card."""
    lines = (line.rstrip() for line in text.splitlines())
    return [line for line in lines if line and line != FRAMEWORKS and not line.startswith("- PEFT ")]


def _blank() -> str:
    from huggingface_hub import ModelCard, ModelCardData

    return ModelCard.from_template(ModelCardData()).text


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False
