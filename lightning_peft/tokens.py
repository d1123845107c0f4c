"""A language of selections: the tokens of a text to capture or to steer.

A selection is a phase and a half-open window of it, in Python's own notation:

| phase | tokens |
|---|---|
| `all` | every token |
| `prompt` | up to and with the last prompt token |
| `answer` | from the last prompt token on: its output predicts the first answer token |
| `generated` | after the last prompt token |

`answer[0:3]` are the last prompt token and the first two answer tokens, `prompt[-1:]` the last prompt token, and
`all[-1:]` the last token; these two are also called `last_prompt` and `last`. Padding never counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

PHASES = ("all", "prompt", "answer", "generated")
_SHORT = {"last": "all[-1:]", "last_prompt": "prompt[-1:]"}
_FORM = re.compile(r"(\w+)(?:\[(-?\d+)?:(-?\d+)?\])?")


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a text.

    Args:
        phase: one of `PHASES`.
        start: the window's first token, counted from the phase's beginning, or from its end where negative.
        stop: the token after the window's last.

    Example:
        >>> Tokens.parse("prompt[-2:]")
        Tokens(phase='prompt', start=-2, stop=None)
        >>> places = torch.arange(5)[None]
        >>> Tokens.parse("answer[0:2]").mask(places, start=torch.tensor([2])).int()
        tensor([[0, 0, 1, 1, 0]], dtype=torch.int32)
    """

    phase: str
    start: int | None = None
    stop: int | None = None

    @staticmethod
    @lru_cache
    def parse(text: str) -> Tokens:
        """Read a selection such as `"answer"`, `"prompt[-3:]"` or `"last"`.

        Raises:
            ValueError: an unknown phase, or a window that is none.
        """
        match = _FORM.fullmatch(_SHORT.get(text, text))
        if match is None or match[1] not in PHASES:
            raise ValueError(
                f"positions must be one of {', '.join((*PHASES, *_SHORT))}, or a phase with a window such as "
                f"'answer[0:3]', got {text!r}."
            )
        start, stop = (None if bound is None else int(bound) for bound in match.group(2, 3))
        return Tokens(match[1], start, stop)

    @property
    def needs_start(self) -> bool:
        """True where it must be known where the prompt ends."""
        return self.phase != "all"

    @property
    def needs_end(self) -> bool:
        """True where it must be known where the text ends, which it is not while the text is generated."""
        return self.phase != "prompt" and any(bound is not None and bound < 0 for bound in (self.start, self.stop))

    def mask(self, places: Tensor, start: Tensor | None = None, length: Tensor | None = None) -> Tensor:
        """Return the selected tokens, bool `[B, T]`; padding, at whatever places, is for the caller to leave out.

        Args:
            places: `[B, T]`, each token's number in its text, from 0.
            start: `[B]`, the number of the last prompt token; `[B, T]` where a row holds several texts.
            length: `[B]`, the number of tokens of each text.

        Raises:
            ValueError: `start` or `length` is needed and not given.
        """
        if self.needs_start and start is None:
            raise ValueError(f"{self.phase!r} tokens need to know where each prompt ends.")
        if self.needs_end and length is None:
            raise ValueError(
                "A window counted from the end of a text needs the text's length, which is not known while it grows."
            )
        if start is not None and start.dim() == 1:
            start = start[:, None]
        first = torch.zeros_like(places[:, :1])
        if self.phase in ("answer", "generated"):
            assert start is not None
            first = start + (self.phase == "generated")
        if self.phase == "prompt":
            assert start is not None
            size = start + 1
        else:
            size = torch.full_like(first, torch.iinfo(torch.long).max) if length is None else length[:, None] - first
        index = places - first
        inside = (index >= 0) & (index < size)
        for bound, after in ((self.start, True), (self.stop, False)):
            if bound is not None:
                edge = bound if bound >= 0 else (size + bound).clamp(min=0)
                inside = inside & ((index >= edge) if after else (index < edge))
        return inside
