"""Read what a model computes inside, in many texts, computing what they share only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_peft.packing.attention import attention_of
from lightning_peft.packing.fallback import objection
from lightning_peft.packing.packed_call import Beginning, float_dtype, packed_inputs
from lightning_peft.packing.prefix_tree import common_prefix, pack

_TOLERANCE = 1e-3  # of the largest value: packed and plain reading must agree to this
_TRIAL = 12  # tokens of a text in the trial of packing
_LONG = 32  # a common beginning of so many tokens is worth a cache of its own
Values = Iterator[tuple[list[int], Tensor]]
Sequences = Sequence[Sequence[int]]


class Reader(Protocol):
    """What notes values inside a model while it runs, such as `lightning_peft.editing.Capture`."""

    def run(self, forward: Callable[[], object], index: Tensor) -> Tensor:
        """Call `forward` and return what was noted of the call's tokens `index`, counted over the batch, `[M, ...]`."""
        ...


@dataclass(frozen=True)
class Way:
    """The settings with which texts are read.

    Args:
        autocast: compute in bfloat16 where the model's matrix products can.
        share: pack texts; default where the model can be packed and no edit of some positions is on it, since which
            positions depends on the text.
        batch_size: texts a batch, unpacked.
        row_tokens: tokens a row, packed.
        rank: of this process, which reads its part.
        ranks: of all.
    """

    autocast: bool = False
    share: bool | None = None
    batch_size: int = 32
    row_tokens: int = 256
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Reading:
    """Reads texts plainly or packed.

    Args:
        backbone: the model.
        reader: notes values inside it.
        trunk: runs it without its head; takes `input_ids [B, T]`, `attention_mask`, and by keyword `position_ids`,
            `past_key_values` and `use_cache`.
        device: where its tokens go.
        way: the settings.
    """

    backbone: nn.Module
    reader: Reader
    trunk: Callable[..., object]
    device: torch.device
    way: Way

    def plain(self, sequences: Sequences, wanted: Sequence[list[int]]) -> Values:
        """Read batches of texts of like length, padded on the right.

        Args:
            sequences: token ids, one list a text.
            wanted: for each text, the numbers of the tokens to read, ascending.

        Yields:
            Some texts by number, and what was read of them, `[M, ...]`, text after text.
        """
        size, way = self.way.batch_size, self.way
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for begin in range(way.rank * size, len(order), way.ranks * size):
            texts = order[begin : begin + size]
            width = max(len(sequences[i]) for i in texts)
            lengths = [len(sequences[i]) for i in texts]
            rows = [[*sequences[i], *[0] * (width - len(sequences[i]))] for i in texts]
            ids = torch.tensor(rows, device=self.device)
            mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths], device=self.device)
            index = torch.tensor([row * width + place for row, i in enumerate(texts) for place in wanted[i]])
            yield texts, self._run({"input_ids": ids, "attention_mask": mask}, index)

    def packed(self, sequences: Sequences, wanted: Sequence[list[int]]) -> Values:
        """Read rows of texts that share their beginnings, as `plain`; a long beginning common to all is cached."""
        skip = common_prefix(sequences)
        skip = min(skip, min(map(len, sequences)) - 1)  # each text's last token is run: every row reads something
        skip = 0 if skip < _LONG or len(sequences) == 1 else skip
        beginning = Beginning(self.backbone) if skip else None
        early: dict[int, Tensor] = {}  # what was read in the common beginning, by place
        if beginning is not None:
            early = self._read_beginning(beginning, sequences[0][:skip], wanted)
        budget = int(min(self.way.row_tokens, attention_of(self.backbone).longest_row - skip))
        for number, row in enumerate(pack(sequences, skip, budget)):
            if number % self.way.ranks != self.way.rank:
                continue
            nodes = [
                path[p - skip] for i, path in zip(row.texts, row.nodes, strict=True) for p in wanted[i] if p >= skip
            ]
            index, back = torch.tensor(nodes, dtype=torch.long).unique(return_inverse=True)
            cache = None if beginning is None else beginning.cache
            inputs = packed_inputs(self.backbone, row.tokens, row.places, row.sees, cache, self.device)
            values = self._run(inputs, index)[back]
            if beginning is not None:
                beginning.crop(skip)
                late = iter(values)
                values = torch.stack([early[p] if p < skip else next(late) for i in row.texts for p in wanted[i]])
            yield row.texts, values

    def _read_beginning(
        self, beginning: Beginning, tokens: Sequence[int], wanted: Sequence[list[int]]
    ) -> dict[int, Tensor]:
        """Run the common beginning and return what is wanted of it, by place."""
        early = sorted({place for places in wanted for place in places if place < len(tokens)})
        ids = torch.tensor([list(tokens)], device=self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cached = {"use_cache": True, "past_key_values": beginning.cache}
        values = self._run({**inputs, **cached}, torch.tensor(early, dtype=torch.long))
        return dict(zip(early, values, strict=True))

    def _run(self, inputs: dict[str, Any], index: Tensor) -> Tensor:
        return self.reader.run(lambda: self.trunk(**inputs), index)

    def objection_to_packing(self, sequences: Sequences) -> str:
        """Return why packed texts would not give what plain ones do, tried on some of them; empty where they do."""
        attention = attention_of(self.backbone)
        longest = max(map(len, sequences))
        if longest > min(attention.longest_text, attention.longest_row):
            limit = min(attention.longest_text, attention.longest_row)
            return f"some are longer than the {limit:,} tokens up to which it treats positions alike"
        two = sorted(sequences, key=len)[-2:]
        short = [list(tokens[:_TRIAL]) for tokens in two]
        bare = [*short, short[0][:-1] or short[0]]
        behind = [[short[0][0]] * _LONG + tokens for tokens in bare]  # long enough to be cached
        reason = self._objection([bare, behind])
        if not reason and longest > attention.whole:  # what windows cut off shows in whole texts alone
            reason = self._objection([[list(tokens) for tokens in two]])
        return reason

    def _objection(self, trials: Sequence[Sequences]) -> str:
        coarse = self.way.autocast or float_dtype(self.backbone).itemsize < 4
        allowed, unit = 0.05 if coarse else _TOLERANCE, "of the largest value"

        def difference() -> float:
            return float(torch.stack([self._difference(texts) for texts in trials]).max())

        return objection(self.backbone, "packed", difference, allowed, unit)

    def _difference(self, texts: Sequences) -> Tensor:
        """Return how far the two ways are apart at the texts' last tokens, of the largest value."""
        wanted = [[len(tokens) - 1] for tokens in texts]
        whole = replace(self, way=replace(self.way, batch_size=len(texts), row_tokens=10**6, rank=0, ranks=1))
        expected, actual = (_in_order(list(method(texts, wanted))) for method in (whole.plain, whole.packed))
        return (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)


def _in_order(batches: list[tuple[list[int], Tensor]]) -> Tensor:
    """Put the values of one token of each text in the order of the texts."""
    order = torch.tensor([i for texts, _ in batches for i in texts]).argsort()
    return torch.cat([values for _, values in batches])[order]
