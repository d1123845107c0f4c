"""The settings of a transformers configuration that give an architecture biases it lacks by default."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError


@dataclass(frozen=True)
class Flag:
    """A setting to turn on.

    Args:
        config: the part of the configuration it stands in, such as `"text_config"`; empty for the whole.
        name: e.g. `"attention_bias"`.
    """

    config: str
    name: str

    def __str__(self) -> str:
        return f"{self.config}.{self.name}".lstrip(".")


def find_flags(model: Any, missing: Collection[str]) -> tuple[tuple[Flag, ...], set[str]]:
    """Return the settings that give a model these biases, found by building it with each, on the meta device.

    A setting serves if it is off, has `bias` in its name, and turning it on adds biases to the model, some of them
    missing, and changes no other parameter. LLaMA's `attention_bias` is one for `o_proj`, and adds biases to the
    queries, keys and values as well; its `mlp_bias` is one for `down_proj`. Qwen2 and Mistral have none.

    Args:
        model: a transformers model, with that class and configuration.
        missing: names of the biases that are wanted.

    Returns:
        The settings, and the names of all biases they add.

    Raises:
        ValueError: no setting adds one of them.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> flags, added = find_flags(model, {"model.layers.0.self_attn.o_proj.bias"})
        >>> [str(flag) for flag in flags], len(added)
        (['attention_bias'], 4)
    """
    flags: list[Flag] = []
    added: set[str] = set()
    if missing:
        base = _shapes(model)
        for flag in _candidates(model.config):
            with turned_on(model.config, [flag]):
                try:
                    flagged = _shapes(model)
                # the architecture, or the configuration's own check, does not go with it
                except (ValueError, TypeError, NotImplementedError, StrictDataclassError):
                    continue
            new = flagged.keys() - base.keys()
            only_more = new and all(name.endswith(".bias") for name in new) and base.items() <= flagged.items()
            if only_more and new & (set(missing) - added):
                flags.append(flag)
                added |= new
    if lacking := sorted(set(missing) - added):
        raise ValueError(
            f"{type(model).__name__} has no place for {len(lacking)} biases, the first is {lacking[0]}, and its "
            "configuration has no setting that gives it one: keep the adapter beside its base."
        )
    return tuple(flags), added


@contextmanager
def turned_on(config: Any, flags: Collection[Flag]) -> Iterator[None]:
    """Turn the settings on for a while."""
    holders = [(getattr(config, flag.config) if flag.config else config, flag.name) for flag in flags]
    for holder, name in holders:
        setattr(holder, name, True)
    try:
        yield
    finally:
        for holder, name in holders:
            setattr(holder, name, False)


def _candidates(config: Any) -> Iterator[Flag]:
    for part in ("", *config.sub_configs):
        holder = getattr(config, part) if part else config
        for name, value in vars(holder).items() if holder is not None else ():
            if value is False and "bias" in name:
                yield Flag(part, name)


def _shapes(model: Any) -> dict[str, torch.Size]:
    """Return names and shapes of the parameters of a model of this class and configuration."""
    config = copy.deepcopy(model.config)
    config.validate()  # which saving it would do
    if isinstance(config.dtype, str):  # as `save_pretrained` leaves it, which not every model can be built with
        config.dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        built = type(model)(config)
    return {name: parameter.shape for name, parameter in built.named_parameters(remove_duplicate=False)}
