"""The half of an encoder-decoder in which answers are: its decoder."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def decoder_of(model: nn.Module) -> nn.Module | None:
    """Return the decoder of an encoder-decoder of transformers; None of any other model."""
    if not _is_encoder_decoder(model):
        return None
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def outside_answers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those modules of an encoder-decoder, by name, that are not in its decoder; of other models none."""
    if not _is_encoder_decoder(model):
        return []
    decoder = decoder_of(model)
    inside = tuple(f"{name}." for name, module in model.named_modules() if module is decoder)
    return [name for name in names if not name.startswith(inside)]


def check_sites(policy: str, model: nn.Module, names: Iterable[str]) -> None:
    """Check that an edit of these modules, by name, can know the tokens of its policy.

    Raises:
        ValueError: some are in an encoder, which `generate` runs apart from the answer.
    """
    if policy != "all" and (outside := outside_answers(model, names)):
        raise ValueError(
            f"The answer of an encoder-decoder such as {type(model).__name__} is what its decoder reads, but "
            f"positions={policy!r} were given for {len(outside)} sites in its encoder, of which {outside[0]} is the "
            'first: choose layers of the decoder, or positions="all".'
        )


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
