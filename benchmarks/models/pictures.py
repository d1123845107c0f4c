"""A picture for any small model that takes one, made without its processor."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_peft.testing.shrunk import PATCH, PICTURE, WIDTH

_COUNTS = re.compile(r"tokens:?\s*(\d+).*?features:?\s*(?:torch\.Size\(\[)?(\d+)", re.DOTALL)


def picture_inputs(model: Any) -> tuple[str, dict[str, Tensor]]:
    """Return how the picture is given, and the inputs of one row: a picture and a few words behind it.

    Raises:
        ValueError: the model takes none of the known forms, with what it said of the last.
    """
    accepts = set(inspect.signature(type(model).forward).parameters)
    if "pixel_values" not in accepts:
        raise ValueError("its forward takes no pixel_values")
    complaint = ""
    for form, values in _forms(accepts):
        for count in (None, 1):
            try:
                inputs = _with_tokens(model, accepts, values, count)
                if inputs is None:
                    continue
                if _looks(model, inputs):
                    return form, inputs
                complaint = complaint or "its logits do not depend on the picture"
            except Exception as error:
                last = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:160]}"
                complaint = complaint if "tokens" in complaint else last
    raise ValueError(complaint)


def _forms(accepts: set[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the ways in which processors give a picture."""
    noise = torch.Generator().manual_seed(3)
    size = torch.tensor([[PICTURE, PICTURE]])
    sides = PICTURE // PATCH
    grid = torch.tensor([[1, sides, sides]])
    if "image_grid_thw" in accepts:
        for frames in (2, 1):
            patches = torch.rand(sides * sides, 3 * frames * PATCH * PATCH, generator=noise)
            yield "patches and their grid", {"pixel_values": patches, "image_grid_thw": grid}
        pixels = torch.rand(sides * sides, 3, PATCH, PATCH, generator=noise)
        yield "patches and their grid", {"pixel_values": pixels, "image_grid_thw": grid}
    for sizes in ({"image_sizes": size}, {}) if "image_sizes" in accepts else ({},):
        yield "one picture", {"pixel_values": torch.rand(1, 3, PICTURE, PICTURE, generator=noise), **sizes}
        for tiles in (1, 2, 3):
            pixels = torch.rand(1, tiles, 3, PICTURE, PICTURE, generator=noise)
            yield ("one tile" if tiles == 1 else f"{tiles} tiles"), {"pixel_values": pixels, **sizes}
    patches = torch.rand(1, sides * sides, 3 * PATCH * PATCH, generator=noise)
    places = torch.cartesian_prod(torch.arange(sides), torch.arange(sides))[None]
    if "spatial_shapes" in accepts:
        shown = torch.ones(1, sides * sides, dtype=torch.long)
        shape = {"spatial_shapes": torch.tensor([[sides, sides]]), "pixel_attention_mask": shown}
        yield "patches and their shape", {"pixel_values": patches, **shape}
    if "pixel_position_ids" in accepts:
        yield "patches and their places", {"pixel_values": patches, "pixel_position_ids": places}
    if "image_position_ids" in accepts:
        yield "patches and their places", {"pixel_values": patches, "image_position_ids": places}


def _with_tokens(
    model: Any, accepts: set[str], values: dict[str, Tensor], count: int | None
) -> dict[str, Tensor] | None:
    """Return the inputs with as many image tokens as the picture has features; None where there is no such token.

    How many these are is what the model says of one too few.
    """
    token = next((n for n in (getattr(model.config, k, None) for k in _TOKENS) if n is not None), None)
    if count is None:
        return _row(accepts, values, None, 0)
    if token is None:
        return None
    try:
        inputs = _row(accepts, values, token, 1)
        with torch.no_grad():
            model(**inputs)
        return inputs
    except Exception as error:
        found = _COUNTS.search(str(error))
        if found is None:
            raise
        features = int(found[2])
        if features >= WIDTH:  # some count every number of a feature
            features //= WIDTH
        return _row(accepts, values, token, features)


_TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id", "im_patch_id", "image_patch_id")


def _row(accepts: set[str], values: dict[str, Tensor], token: int | None, count: int) -> dict[str, Tensor]:
    ids = torch.tensor([[5, *[token or 0] * count, 11, 12, 13, 14]])
    seen = (ids == token).long() if token is not None else torch.zeros_like(ids)
    kinds = {name: seen for name in ("mm_token_type_ids", "token_type_ids") if name in accepts}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **values, **kinds}


@torch.no_grad()
def _looks(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Return whether another picture gives other logits."""
    one = model(**inputs).logits
    other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(-1) * 0.5}).logits
    return bool(torch.isfinite(one).all()) and not torch.equal(one, other)
