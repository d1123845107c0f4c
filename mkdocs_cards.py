"""Make the navigation and the index of methods from the cards in docs/methods; a hook of mkdocs.

A card begins with what the index says of it:

    ---
    family: low rank                  # the table it stands in, one of those of docs/methods/index.md
    trains: "`W x + B A x`"           # what is trained
    parameters: "`r (i + o)`"         # how many, for each adapted matrix with i inputs and o outputs
    merges: "yes"                     # whether it can be written into the weights
    title: LoRA                       # in the navigation; default, the heading
    ---
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FIELDS = {"family", "trains", "parameters", "merges"}
_TABLE = re.compile(r"^<!-- cards: (.+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """A page on a method.

    Args:
        file: its name in the folder.
        title: what the navigation calls it.
        callback: the class it is about, or its title.
        fields: see above.
    """

    file: str
    title: str
    callback: str
    fields: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Card:
        """Return the card in a file.

        Raises:
            ValueError: it does not begin with the fields.
        """
        text = path.read_text(encoding="utf-8")
        front = re.match(r"---\n(.*?)^---\n", text, re.DOTALL | re.MULTILINE)
        fields = yaml.safe_load(front[1]) if front else {}
        if missing := sorted(FIELDS - fields.keys()):
            raise ValueError(f"{path} lacks {', '.join(missing)} at its top: see mkdocs_cards.py.")
        heading = re.search(r"^# (.+)$", text, re.MULTILINE)
        title = fields.get("title") or (heading[1] if heading else path.stem)
        named = re.search(r"^`lightning_peft\.\w+\.(\w+)\(", text, re.MULTILINE)
        return cls(path.name, title, f"`{named[1]}`" if named else title, fields)

    @property
    def row(self) -> str:
        """Its row in the index."""
        cells = (f"[{self.callback}]({self.file})", *(self.fields[name] for name in ("trains", "parameters", "merges")))
        return f"| {' | '.join(cells)} |"


def families(folder: Path) -> dict[str, list[Card]]:
    """Return the cards of a folder by family, in the order of its index, and by title in each.

    Raises:
        ValueError: a card's family has no table in the index.
    """
    cards = [Card.read(path) for path in sorted(folder.glob("*.md")) if path.name != "index.md"]
    names = _TABLE.findall((folder / "index.md").read_text(encoding="utf-8"))
    if strange := [card for card in cards if card.fields["family"] not in names]:
        family = strange[0].fields["family"]
        raise ValueError(f"{strange[0].file} is of the family {family!r}, and index.md has {', '.join(names)}.")
    by_title = sorted(cards, key=lambda card: card.title.lower())
    return {name: [card for card in by_title if card.fields["family"] == name] for name in names}


def on_config(config: Any) -> Any:
    """Fill the entry Methods of the navigation."""
    cards = [card for family in families(Path(config.docs_dir, "methods")).values() for card in family]
    entry = next(entry for entry in config.nav if "Methods" in entry)
    entry["Methods"] = ["methods/index.md", *({card.title: f"methods/{card.file}"} for card in cards)]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the tables of the index."""
    if page.file.src_uri != "methods/index.md":
        return markdown
    cards = families(Path(config.docs_dir, "methods"))
    head = "| callback | what is trained | parameters | merges |\n|---|---|---|---|"
    return _TABLE.sub(lambda table: "\n".join([head, *(card.row for card in cards[table[1]])]), markdown)
