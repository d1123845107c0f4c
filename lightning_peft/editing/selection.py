"""Sites and tokens in one description for capturing and for steering, as it stands in a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Self

from torch import nn

from lightning_peft.backbone.heads import Part, head_sites
from lightning_peft.backbone.layers import KINDS, layer_sites
from lightning_peft.editing.capture import Capture, Site
from lightning_peft.tokens import Tokens


@dataclass(frozen=True)
class Selection:
    """Sites of a model and tokens of a text.

    Args:
        sites: `"heads"` (the heads' outputs), or what layers give: `"block"`, `"attention"`, `"mlp"`.
        layers: which of the sites, by number, or a half-open window in Python's notation such as `"4:12"` or `"-8:"`;
            default all.
        positions: which tokens, in the language of `lightning_peft.tokens`; an edit's adapter takes the same text.
        part: of an encoder-decoder: `"encoder"`, `"self"` or `"cross"`.
        within: only sites of this part of the model: `"vision"`, `"all"` or a submodule's name; default the language
            model's.
        pattern: for heads of unknown architectures, as in `head_sites`.
        num_heads: the same.

    Example:
        >>> Selection.of({"sites": "block", "layers": "1:", "positions": "answer[0:3]"})
        Selection(sites='block', layers='1:', positions='answer[0:3]', part=None, within=None, pattern=None, \
num_heads=None)
    """

    sites: str = "heads"
    layers: tuple[int, ...] | str | None = None
    positions: str = "last"
    part: Part | None = None
    within: str | None = None
    pattern: str | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        if self.sites not in ("heads", *KINDS):
            raise ValueError(f"sites must be one of heads, {', '.join(KINDS)}, got {self.sites!r}.")
        if self.sites != "heads" and (self.pattern or self.num_heads):
            raise ValueError(f"pattern and num_heads are for heads, but the sites are {self.sites!r}.")
        Tokens.parse(self.positions)
        if isinstance(self.layers, str):
            _window(self.layers)
        elif self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Self:
        """Make a selection from a mapping.

        Raises:
            ValueError: a key that is none of the arguments, or a value that none can have.
        """
        known = [field.name for field in fields(cls)]
        for key in described:
            if key not in known:
                near = get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
                raise ValueError(f"A selection has no {key!r}: {hint}")
        return cls(**described)

    def find(self, model: nn.Module) -> list[Site]:
        """Find the sites in a model, numbered anew from 0.

        Raises:
            ValueError: there is none, or a layer is named that the model does not have.
        """
        candidates: list[Site] = []
        if self.sites == "heads":
            candidates += head_sites(model, self.pattern, self.num_heads, self.part, self.within)
        else:
            candidates += layer_sites(model, self.sites, self.part, self.within)  # type: ignore[arg-type]
        if isinstance(self.layers, str):
            chosen = candidates[_window(self.layers)]
        elif self.layers is not None:
            if wrong := [number for number in self.layers if not -len(candidates) <= number < len(candidates)]:
                raise ValueError(f"Layer {wrong[0]} was asked for, but there are {len(candidates)}, from 0.")
            chosen = [candidates[number] for number in self.layers]
        else:
            chosen = candidates
        if not chosen:
            raise ValueError(f"No site is left of the model's {len(candidates)}: {self}.")
        return [replace(site, layer=i) for i, site in enumerate(chosen)]

    def capture(self, model: nn.Module) -> Capture:
        """Return a `Capture` of this selection."""
        return Capture(model, self.find(model), self.positions)


def _window(text: str) -> slice:
    parts = text.split(":")
    try:
        start, stop = (int(part) if part.strip() else None for part in parts)
    except ValueError:
        raise ValueError(f"layers must be numbers or a window such as '4:12', got {text!r}.") from None
    return slice(start, stop)
