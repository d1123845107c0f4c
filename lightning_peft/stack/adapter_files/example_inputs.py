"""An input that a transformers model takes, made from its own configuration, and the model's outputs for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.embeddings import input_embeddings
from lightning_peft.backbone.evaluating import evaluating
from lightning_peft.positions import plain_text

_ROWS, _LENGTH = 2, 12

Probe = Mapping[str, Tensor]


def find_probe(model: Any, seed: int = 0) -> Probe | None:
    """Return the first input that the model takes: of all kinds it knows, of its main kind, or its own `dummy_inputs`.

    Tokens are drawn from its vocabulary, those with a role left out; pictures, spectra and waves have the shape that
    its configuration names. None where it takes none of these.
    """
    for probe in candidates(model, torch.Generator().manual_seed(seed)):
        try:
            if outputs(model, probe):
                return probe
        except Exception:  # whatever a model says of an input that is not for it
            continue
    return None


@torch.no_grad()
def outputs(model: Any, probe: Probe) -> list[Tensor]:
    """Return all floating-point tensors that the model gives, in float32; the same each time, in evaluation mode."""
    first = next(model.parameters())
    inputs: dict[str, Any] = {
        key: value.to(first.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in probe.items()
    }
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        inputs["use_cache"] = False
    with evaluating(model), plain_text(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(**inputs)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    return [v.float().cpu() for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def candidates(model: Any, generator: torch.Generator) -> Iterator[Probe]:
    """Yield inputs that the model may take, those that it runs more of first."""
    accepted = inspect.signature(type(model).forward).parameters
    inputs = {key: value for key, value in _inputs(model, generator) if key in accepted}
    yield inputs
    main = {key: value for key, value in inputs.items() if key in (model.main_input_name, "decoder_input_ids")}
    yield main
    yield {key: value for key, value in inputs.items() if key.endswith("input_ids")}
    yield model.dummy_inputs


def _inputs(model: Any, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    config = model.config
    text = config.get_text_config()
    for key in ("input_ids", "decoder_input_ids") if config.is_encoder_decoder else ("input_ids",):
        if (tokens := _tokens(model, text, generator)) is not None:
            yield key, tokens
    for holder in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if (size := getattr(holder, "image_size", None)) is not None:
            size = size if isinstance(size, list | tuple) else (size, size)
            shape = (_ROWS, getattr(holder, "num_channels", 3), *size)
            yield "pixel_values", torch.randn(shape, generator=generator)
            break
    if mel := getattr(config, "num_mel_bins", None):
        frames = 2 * getattr(config, "max_source_positions", 0) or getattr(config, "max_length", None) or 64
        yield "input_features", torch.randn(_ROWS, mel, frames, generator=generator)
        yield "input_values", torch.randn(_ROWS, frames, mel, generator=generator)
    elif not hasattr(model, "get_input_embeddings") or model.main_input_name == "input_values":
        yield "input_values", torch.randn(_ROWS, 4000, generator=generator)


def _tokens(model: Any, text: Any, generator: torch.Generator) -> Tensor | None:
    """Return token ids `[rows, length]`; they end with the end of a text, where classifiers of BART's kind look."""
    embedding = input_embeddings(model)
    count = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else getattr(text, "vocab_size", None)
    if not count:
        return None
    named = [value for holder in (model.config, text) for key, value in vars(holder).items() if "token_i" in key]
    roles = {value for value in named if isinstance(value, int)}
    plain = [token for token in range(count) if token not in roles] or [0]
    longest = getattr(text, "max_position_embeddings", None) or _LENGTH
    length = max(2, min(_LENGTH, longest - 3))
    tokens = torch.tensor(plain)[torch.randint(len(plain), (_ROWS, length), generator=generator)]
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < count:
        tokens[:, -1] = end
    return tokens
