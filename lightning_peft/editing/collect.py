"""Read sites in many texts: what they share computed once, kept in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.editing.capture import Site, common_shape
from lightning_peft.editing.ranks import of_all_ranks, rank_and_count
from lightning_peft.editing.reading import Way, read_texts
from lightning_peft.tokens import Tokens


@dataclass(frozen=True)
class Captured:
    """Values read at sites, and the texts and tokens they belong to.

    Args:
        values: `[M, layers, heads, head_dim]` or `[M, layers, width]`.
        text: `[M]`, which text each row of values is of.
        place: `[M]`, which of its tokens.
    """

    values: Tensor
    text: Tensor
    place: Tensor


def capture_tokens(
    backbone: nn.Module, sites: Sequence[Site], sequences: Sequence[Sequence[int]], batch_size: int = 32
) -> Tensor:
    """Read head outputs at the last token of each sequence: `capture_texts` with its defaults.

    Returns:
        `[N, layers, heads, head_dim]`, float32, in the order of `sequences`.
    """
    return capture_texts(backbone, sites, sequences, batch_size=batch_size).values


def capture_texts(
    backbone: nn.Module,
    sites: Sequence[Site],
    sequences: Sequence[Sequence[int]],
    positions: str = "last",
    prompt_lengths: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    file: str | Path | None = None,
    share: bool | None = None,
    batch_size: int = 32,
    row_tokens: int = 256,
) -> Captured:
    """Read sites at chosen tokens of many texts.

    Texts that begin alike are packed into one row in which the shared beginning stands once, and what all of them share
    stays in a cache; packing is tried once against the plain way, which takes batches of texts of like length. Where
    `torch.distributed` runs, every rank reads a part and gets all: the same numbers as one process, bit for bit.

    Args:
        backbone: as `Capture`; the head is not run.
        sites: from `head_sites` or `layer_sites`.
        sequences: token ids, one list a text.
        positions: which tokens, in the language of `lightning_peft.tokens`.
        prompt_lengths: tokens of each text's prompt, for positions that need them.
        dtype: of what is kept.
        file: keep the values in this file, mapped into memory, for what is larger than memory.
        autocast, share, batch_size, row_tokens: as `Way`.

    Returns:
        The values, text after text in the order of `sequences`, a text's tokens in their order.

    Raises:
        ValueError: a text without tokens, or none of whose tokens is chosen, or positions that need prompt lengths.
        RuntimeError: a site was not reached.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_peft.editing import head_sites
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> read = capture_texts(model, head_sites(model), [[5, 6, 7], [5, 8]], "answer", prompt_lengths=[1, 1])
        >>> read.values.shape, read.text.tolist(), read.place.tolist()
        (torch.Size([5, 2, 4, 8]), [0, 0, 0, 1, 1], [0, 1, 2, 0, 1])
    """
    chosen = _tokens_to_read(sequences, positions, prompt_lengths)
    first = torch.tensor([0, *(len(places) for places in chosen)]).cumsum(0)
    text = torch.tensor([i for i, places in enumerate(chosen) for _ in places])
    place = torch.tensor([p for places in chosen for p in places])
    shape = (len(text), len(sites), *common_shape(sites)) if sites else (len(text), 0)
    rank, ranks = rank_and_count()
    way = Way(autocast, share, batch_size, row_tokens, rank, ranks)
    part = None if file is None else Path(f"{file}.part")
    if part is None:
        values = torch.zeros(shape, dtype=dtype)
    else:
        if rank == 0:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            torch.from_file(str(part), shared=True, size=_numel(shape), dtype=dtype)
        _barrier()
        values = torch.from_file(str(part), shared=True, size=_numel(shape), dtype=dtype).reshape(shape)
    is_read = torch.zeros(len(text), dtype=torch.bool)
    for texts, activations in read_texts(backbone, sites, sequences, chosen, way):
        rows = torch.cat([torch.arange(int(first[i]), int(first[i + 1])) for i in texts])
        values[rows] = activations.to(dtype)
        is_read[rows] = True
    if part is not None:
        _barrier()
        if rank == 0:
            os.replace(part, Path(str(file)))
        _barrier()
    elif ranks > 1:
        for rows, activations in of_all_ranks((is_read, values[is_read])):
            values[rows] = activations
    return Captured(values, text, place)


def _tokens_to_read(
    sequences: Sequence[Sequence[int]], positions: str, prompt_lengths: Sequence[int] | None
) -> list[list[int]]:
    """Return the numbers of the tokens to read in each text."""
    chosen = Tokens.parse(positions)
    if any(len(tokens) == 0 for tokens in sequences):
        raise ValueError("A text without tokens has no last token to read.")
    if prompt_lengths is not None and len(prompt_lengths) != len(sequences):
        raise ValueError(f"{len(sequences)} texts need as many prompt lengths, but there are {len(prompt_lengths)}.")
    if chosen.needs_start and prompt_lengths is None:
        raise ValueError(f"Positions {positions!r} need prompt_lengths, to know where each prompt ends.")
    numbers = []
    for i, tokens in enumerate(sequences):
        start = None if prompt_lengths is None else torch.tensor([prompt_lengths[i] - 1])
        mask = chosen.mask(torch.arange(len(tokens))[None], start, torch.tensor([len(tokens)]))
        numbers.append(mask[0].nonzero()[:, 0].tolist())
        if not numbers[-1]:
            raise ValueError(f"Text {i}, of {len(tokens)} tokens, has none at {positions!r} to read.")
    return numbers


def _barrier() -> None:
    if rank_and_count()[1] > 1:
        torch.distributed.barrier()


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
