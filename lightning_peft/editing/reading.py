"""Run a model over many texts for what is inside it, in the quickest way that it allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.embeddings import input_embeddings
from lightning_peft.backbone.window import check_lengths
from lightning_peft.editing.capture import Capture, Site
from lightning_peft.editing.forward import run_trunk
from lightning_peft.packing.fallback import give_up
from lightning_peft.packing.reading import Reading
from lightning_peft.packing.reading import Way as Way
from lightning_peft.positions import tracked


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
    trunk = partial(run_trunk, backbone, encoder_only=all(site.part == "encoder" for site in sites))
    with Capture(backbone, sites) as reader, torch.no_grad(), coarse:
        reading = Reading(backbone, reader, trunk, device, way)
        share = way.share
        if share is None:
            share = len(sequences) > 1 and not tracked(backbone)
        if share and (reason := _objection(reading, sequences, encoder_decoder)):
            if way.share:
                raise ValueError(f"{type(backbone).__name__} cannot read packed texts: {reason}.")
            if not encoder_decoder:  # of which nobody would expect it
                give_up(backbone, "reads texts one by one", reason)
            share = False
        yield from (reading.packed if share else reading.plain)(sequences, wanted)


def _objection(reading: Reading, sequences: Sequence[Sequence[int]], encoder_decoder: bool) -> str:
    """Return why texts cannot be packed; empty where they can."""
    if encoder_decoder:
        return "an encoder's tokens see what comes after them"
    return reading.objection_to_packing(sequences)


def _device(backbone: nn.Module) -> torch.device:
    """Return the device of the embedding, to which tokens go wherever the layers are."""
    table = input_embeddings(backbone)
    parameter = next((backbone if table is None else table).parameters())
    return torch.device("cpu") if parameter.device.type == "meta" else parameter.device
