"""The model card of a saved folder: its base, its method, its numbers, how it was made, how to load and serve it.

A card is made from what is in the folder alone, so that any writer of an adapter can have one written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_peft.stack.adapter_files.adapter_facts import AdapterFacts, data, made, papers, read_facts, settings
from lightning_peft.stack.adapter_files.readme import (
    FRAMEWORKS,
    Metadata,
    code,
    hub_name,
    public_name,
    write_readme,
)
from lightning_peft.stack.adapter_files.serving_notes import serving_notes

FOLDER = "path/to/this/folder"
# of a task, transformers' class for the base and the hub's name for what it does
TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}


def write_adapter_card(folder: Path, config: Any, place: Path | None = None) -> None:
    """Write the card of an adapter's folder, from its weights and notes; see `may_write`.

    Args:
        folder: where the files are.
        config: the adapter's configuration.
        place: the folder that they are going to be in; default `folder`.
    """
    facts = read_facts(folder, config)
    subject = f" for {code(facts.base)}" if facts.base else ""
    text = [f"# {facts.title}{subject}", _first_lines(facts), _described(facts)]
    text += ["## With lightning-peft", _code_block(_here())] if not facts.compressed else []
    text += ["## In a server", *serving_notes(facts.config, facts.kind, facts.compressed), _frameworks()]
    metadata = _metadata(facts) | ({"library_name": "lightning-peft"} if facts.compressed else {})
    write_readme(folder, metadata, "\n\n".join(text), own_tags(), place)


def write_stack_card(folder: Path, configs: Mapping[str, Any], place: Path | None = None) -> None:
    """Write the card of a stack: what its parts are, and how to load them together.

    Args:
        folder: where the parts' folders are.
        configs: their configurations by name, innermost first.
        place: the folder that they are going to be in; default `folder`.
    """
    parts = {name: read_facts(folder / name, config) for name, config in configs.items()}
    base = next((facts.base for facts in parts.values() if facts.base), None)
    title = f"# {len(parts)} adapters{f' for {code(base)}' if base else ''}"
    rows = [f"{number}. [{code(name)}]({name}): {_summary(parts[name])}" for number, name in enumerate(parts, 1)]
    first = (
        f"A stack: these adapters act together, the first is the innermost. {code('lightning_peft')} loads it whole, "
        "which peft cannot; each folder in it is an adapter for itself, with a card that says how to load it."
    )
    text = [title, first, _code_block([*_base(next(iter(parts.values()))), *_here()]), "\n".join(rows), _frameworks()]
    metadata = _metadata(next(iter(parts.values())))
    metadata["tags"] = sorted({tag for facts in parts.values() for tag in _metadata(facts)["tags"]})
    write_readme(folder, metadata, "\n\n".join(text), own_tags(), place)


def write_written_card(folder: Path, configs: Mapping[Path, Any], base: object, cls: str, notes: Sequence[str]) -> None:
    """Write the card of a model that adapters were written into.

    Args:
        folder: of the model.
        configs: the configurations of its parts by their folders, innermost first.
        base: the model that they were written into: a folder, or a name on the hub.
        cls: the model's class.
        notes: sentences on how it was written and verified.
    """
    parts = [read_facts(part, config) for part, config in configs.items()]
    name = public_name(base) or next((facts.base for facts in parts if facts.base), None)
    names = " and ".join(facts.title for facts in parts)
    text = [f"# {names} in {code(name) if name else 'its base'}"]
    text += [
        f"A {code(cls)} of transformers with {'an adapter' if len(parts) == 1 else f'{len(parts)} adapters'} written "
        f"into its weights: it needs neither peft nor {code('lightning_peft')}."
    ]
    if cls.isidentifier():
        text += [_code_block([f"from transformers import {cls}", "", f'model = {cls}.from_pretrained("{FOLDER}")'])]
    lines = [f"**Written in:** {_summary(facts)}. Data: {data(facts)}" for facts in parts]
    text += [
        "\n".join(f"- {line}" for line in (*lines, *notes)),
        "## In a server",
        "Any server that runs its base runs it.",
    ]
    metadata = _metadata(parts[0]) | {"library_name": "transformers"}
    metadata["tags"] = sorted({tag for facts in parts for tag in _metadata(facts)["tags"]} | {"transformers"})
    metadata["tags"] = [tag for tag in metadata["tags"] if not tag.startswith("base_model:")]
    if (hub := hub_name(name)) is not None:
        metadata |= {"base_model": hub, "base_model_relation": "finetune"}
    write_readme(folder, metadata, "\n\n".join([*text, _frameworks(peft=False)]), own_tags())


def written_parts(adapter: str | Path) -> dict[Path, Any]:
    """Return the configurations of a saved adapter or stack by their folders, innermost first."""
    from lightning_peft.stack.adapter_files.folder import adapter_folders, read_folder

    return {path: read_folder(path)[0] for path in adapter_folders(Path(adapter))}


def own_tags() -> frozenset[str]:
    """Return every tag that cards of this package have, besides those that name a base."""
    from peft import PeftType

    return frozenset({"lightning-peft", "transformers", *map(_tag, papers()), *(_tag(kind.value) for kind in PeftType)})


def _metadata(facts: AdapterFacts) -> Metadata:
    metadata: Metadata = {"library_name": "peft"}
    made = facts.record.get("method")
    tags = {"lightning-peft", _tag(facts.kind), *([_tag(made)] if isinstance(made, str) and made in papers() else [])}
    if (name := hub_name(facts.base)) is not None:
        metadata["base_model"] = name
        tags.add(f"base_model:adapter:{name}")
    metadata["pipeline_tag"] = TASKS.get(facts.task, (None, None))[1]
    return {**metadata, "tags": sorted(tags)}


def _first_lines(facts: AdapterFacts) -> str:
    """Say what to import, which a reader of nothing else must have seen, and show it."""
    if facts.compressed:
        return "\n\n".join(
            [
                "**A compressed adapter, which peft cannot read**: load it with `lightning_peft` (`pip install "
                "lightning-peft`), or make a folder for peft of it with `lightning-peft decompress`.",
                _code_block([*_base(facts), *_here()]),
            ]
        )
    lines = [f"import {facts.package}  # first: peft does not know {facts.kind} by itself"] if facts.package else []
    lines += ["from peft import PeftModel", *_base(facts), f'model = PeftModel.from_pretrained(base, "{FOLDER}")']
    if facts.package is None:
        return "\n\n".join(["peft loads it by itself:", _code_block(lines)])
    name = "lightning-peft" if facts.package == "lightning_peft" else facts.package
    needed = (
        f"**`import {facts.package}` is needed** (`pip install {name}`) before peft or transformers load it. Without "
        f"it they end in `KeyError: '{facts.kind}'`, since the type is not one of peft's own."
    )
    return "\n\n".join([needed, _code_block(lines)])


def _base(facts: AdapterFacts) -> list[str]:
    """Return the lines of Python that load the base."""
    if (cls := _class(facts)) is None:
        kind = (facts.notes.get("fingerprint") or {}).get("model_type")
        what = f"the {kind} of transformers" if isinstance(kind, str) and kind.isidentifier() else "the model"
        return ["", f"base = ...  # {what} that it was made for"]
    return [f"from transformers import {cls}", "", f"base = {cls}.from_pretrained({facts.base or 'BASE'!r})"]


def _class(facts: AdapterFacts) -> str | None:
    """Return the name of transformers' class that loads the base."""
    if facts.notes.get("fingerprint") and facts.notes["fingerprint"].get("model_type") is None:
        return None
    if facts.task in TASKS:
        return TASKS[facts.task][0]
    mapping = facts.config.auto_mapping or {}
    name, library = str(mapping.get("base_model_class")), str(mapping.get("parent_library"))
    return name if library.startswith("transformers.") and name.isidentifier() else None


def _described(facts: AdapterFacts) -> str:
    lines = [f"**Base model:** {_linked(facts.base)}"]
    lines += [f"**Method:** {facts.cited}; peft's type {code(facts.kind)}"]
    if facts.parameters is not None:
        packed = ", compressed" if facts.compressed else ""
        lines += [f"**Parameters:** {facts.parameters:,} in {facts.size:,} bytes{packed}"]
    lines += [f"**Made:** {made(facts)}"]
    lines += [f"**Data:** {data(facts)}"]
    if changed := settings(facts.config):
        lines += [f"**Settings:** {changed}"]
    return "\n".join(f"- {line}" for line in lines)


def _here() -> list[str]:
    """Return the lines of Python that load an adapter or a stack by this package, given the base."""
    return [
        "import lightning as L",
        "from lightning_peft import load_adapter, steering",
        "from lightning_peft.callbacks import Steer",
        "",
        f'load_adapter(base, "{FOLDER}")  # on the base, or on a LightningModule around it',
        f'with steering(base, "{FOLDER}"):  # or for a while',
        "    ...",
        f'L.Trainer(callbacks=[Steer("{FOLDER}")])  # or while a Trainer validates, tests and predicts',
    ]


def _summary(facts: AdapterFacts) -> str:
    count = f"; {facts.parameters:,} parameters" if facts.parameters is not None else ""
    return f"{facts.cited}, peft's type {code(facts.kind)}{count}; {made(facts)}"


def _linked(base: str | None) -> str:
    if base is None:
        return "not recorded"
    name = hub_name(base)
    return f"[{code(name)}](https://huggingface.co/{name})" if name is not None and "/" in name else code(base)


def _code_block(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _frameworks(peft: bool = True) -> str:
    names = (*(["PEFT"] if peft else []), "lightning-peft")
    return "\n".join([FRAMEWORKS, "", *(f"- {name} {_version(name)}" for name in names)])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a copy that is not installed
        return "unknown"


def _tag(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
