"""Run a model over many texts for what is inside it, computing what they share only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.window import check_lengths
from lightning_peft.editing.capture import Capture, Site
from lightning_peft.editing.forward import run_trunk
from lightning_peft.packing.fallback import give_up, objection
from lightning_peft.packing.prefix_tree import common_prefix, pack
from lightning_peft.positions import tracked

_TOLERANCE = 1e-3  # of the largest value: packed and plain reading must agree to this
_TRIAL = 12  # tokens of a text in the trial of packing
_LONG = 32  # a common beginning of so many tokens is worth a cache of its own


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


def read_texts(
    backbone: nn.Module,
    sites: Sequence[Site],
    sequences: Sequence[Sequence[int]],
    wanted: list[list[int]],
    way: Way,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read texts in the quickest way the model allows.

    Args:
        backbone: the model.
        sites: what to read.
        sequences: token ids, one list a text.
        wanted: for each text, the numbers of the tokens to read, ascending.
        way: how.

    Yields:
        Some texts by number, and what was read of them, `[M, layers, ...]`, text after text.

    Raises:
        ValueError: texts are to be packed, and this model gives something else then; or it needs a decoder's tokens; or
            texts are longer than it can read.
    """
    check_lengths(backbone, map(len, sequences), "texts to read")
    config: Any = getattr(backbone, "config", None)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if encoder_decoder and any(site.part != "encoder" for site in sites):
        raise ValueError(
            f"{type(backbone).__name__} has a decoder, whose tokens these texts are not: give sites of its encoder, or "
            "call Capture with input_ids and decoder_input_ids."
        )
    device = _device(backbone)
    coarse = torch.autocast(device.type, torch.bfloat16) if way.autocast else nullcontext()
    with Capture(backbone, sites) as reader, torch.no_grad(), coarse:
        share = way.share
        if share is None:
            share = len(sequences) > 1 and not tracked(backbone)
        if share and (reason := _cannot_share(backbone, reader, sequences, device, way)):
            if way.share:
                raise ValueError(f"{type(backbone).__name__} cannot read packed texts: {reason}.")
            if not encoder_decoder:  # of which nobody would expect it
                give_up(backbone, "reads texts one by one", reason)
            share = False
        yield from (_packed if share else _plain)(backbone, reader, sequences, wanted, device, way)


def _plain(
    backbone: nn.Module,
    reader: Capture,
    sequences: Sequence[Sequence[int]],
    chosen: list[list[int]],
    device: torch.device,
    way: Way,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read batches of texts of like length, padded on the right."""
    encoder_only = all(site.part == "encoder" for site in reader.sites)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for begin in range(way.rank * way.batch_size, len(order), way.ranks * way.batch_size):
        texts = order[begin : begin + way.batch_size]
        width = max(len(sequences[i]) for i in texts)
        ids = torch.tensor([[*sequences[i], *[0] * (width - len(sequences[i]))] for i in texts], device=device)
        mask = torch.tensor([[1] * len(sequences[i]) + [0] * (width - len(sequences[i])) for i in texts], device=device)
        index = torch.tensor([row * width + place for row, i in enumerate(texts) for place in chosen[i]])

        def forward(ids: Tensor = ids, mask: Tensor = mask) -> Any:
            return run_trunk(backbone, ids, mask, encoder_only=encoder_only)

        yield texts, reader.run(forward, index)


def _packed(
    backbone: nn.Module,
    reader: Capture,
    sequences: Sequence[Sequence[int]],
    chosen: list[list[int]],
    device: torch.device,
    way: Way,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read rows of texts that share their beginnings; a long beginning common to all is cached."""
    skip = common_prefix(sequences)
    skip = min(skip, min(map(len, sequences)) - 1)  # each text's last token is run, so that every row reads something
    skip = 0 if skip < _LONG or len(sequences) == 1 else skip
    cache: Any = None
    beginning: dict[int, Tensor] = {}  # what was read in the common beginning, by place
    if skip:
        from transformers import DynamicCache

        cache = DynamicCache(config=getattr(backbone, "config", None))
        early = sorted({place for places in chosen for place in places if place < skip})
        ids = torch.tensor([sequences[0][:skip]], device=device)
        index = torch.tensor(early, dtype=torch.long)
        activations = reader.run(
            lambda: run_trunk(backbone, ids, torch.ones_like(ids), use_cache=True, past_key_values=cache), index
        )
        beginning = dict(zip(early, activations, strict=True))
    dtype = _dtype(backbone)
    for number, row in enumerate(pack(sequences, skip, way.row_tokens)):
        if number % way.ranks != way.rank:
            continue
        sees = torch.cat([torch.ones(len(row.tokens), skip, dtype=torch.bool), row.sees], dim=1)
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None].to(device)
        nodes = [path[p - skip] for i, path in zip(row.texts, row.nodes, strict=True) for p in chosen[i] if p >= skip]
        index, back = torch.tensor(nodes, dtype=torch.long).unique(return_inverse=True)

        def forward(tokens: Tensor = row.tokens, places: Tensor = row.places, mask: Tensor = mask) -> Any:
            more = {} if cache is None else {"use_cache": True, "past_key_values": cache}
            return run_trunk(backbone, tokens[None].to(device), mask, places[None].to(device), **more)

        activations = reader.run(forward, index)[back]
        if skip:
            cache.crop(-(cache.get_seq_length() - skip))
            late = iter(activations)
            activations = torch.stack([beginning[p] if p < skip else next(late) for i in row.texts for p in chosen[i]])
        yield row.texts, activations


def _cannot_share(
    backbone: nn.Module, reader: Capture, sequences: Sequence[Sequence[int]], device: torch.device, way: Way
) -> str:
    """Return why packed texts would not give what plain ones do, tried on shortened texts; empty where they do."""
    config: Any = getattr(backbone, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder's tokens see what comes after them"
    window = getattr(config, "sliding_window", None)
    if window and max(map(len, sequences)) > window:
        return f"some are longer than its window of {window} tokens"
    longest = [list(tokens[:_TRIAL]) for tokens in sorted(sequences, key=len)[-2:]]
    bare = [*longest, longest[0][:-1] or longest[0]]
    behind = [[longest[0][0]] * _LONG + tokens for tokens in bare]  # long enough to be cached
    whole = replace(way, batch_size=len(bare), row_tokens=10**6, rank=0, ranks=1)

    def apart(texts: Sequence[Sequence[int]]) -> Tensor:
        chosen = [[len(tokens) - 1] for tokens in texts]
        expected, actual = (
            _in_order(list(method(backbone, reader, texts, chosen, device, whole))) for method in (_plain, _packed)
        )
        return (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)

    coarse = way.autocast or _dtype(backbone).itemsize < 4
    allowed = 0.05 if coarse else _TOLERANCE
    unit = "of the largest value"
    return objection(backbone, "packed", lambda: float(torch.stack([apart(bare), apart(behind)]).max()), allowed, unit)


def _in_order(batches: list[tuple[list[int], Tensor]]) -> Tensor:
    """Put the values of one token of each text in the order of the texts."""
    order = torch.tensor([i for texts, _ in batches for i in texts]).argsort()
    return torch.cat([values for _, values in batches])[order]


def _dtype(backbone: nn.Module) -> torch.dtype:
    return next(p.dtype for p in backbone.parameters() if p.is_floating_point())


def _device(backbone: nn.Module) -> torch.device:
    """Return the device of the embedding, to which tokens go wherever the layers are."""
    find = getattr(backbone, "get_input_embeddings", None)
    table = find() if callable(find) else None
    parameter = next((table if isinstance(table, nn.Module) else backbone).parameters())
    return torch.device("cpu") if parameter.device.type == "meta" else parameter.device
