"""A language model with its tokenizer and the adapters on it, whose strength is turned while one talks to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lightning_peft.backbone.nearest_names import nearest_names
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.checks import check_scale
from lightning_peft.stack.stack import AdapterStack, adapters, find_stacks

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

    class LanguageModel(PreTrainedModel, GenerationMixin):
        """A model of transformers that has `generate`."""


class AdaptedModel:
    """A language model that is talked to, with whatever adapters are on it.

    Args:
        model: a causal language model of transformers, or an encoder-decoder.
        tokenizer: the model's.
        name: by which messages call the model; default its own.

    Raises:
        ValueError: the model does not generate text.

    Example:
        A module that was trained or edited a moment ago is talked to as it is:

        >>> import lightning as L
        >>> from lightning_peft.generation import AdaptedModel, answers
        >>> adapted = AdaptedModel(module.backbone, module.tokenizer)  # doctest: +SKIP
        >>> answers(adapted, ["What is it?"], max_new_tokens=8)  # doctest: +SKIP
    """

    def __init__(self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
        generates = getattr(model, "can_generate", None)
        if not (callable(generates) and generates()):
            raise ValueError(
                f"{type(model).__name__} does not write text: an adapter to talk to is one on a language model, such "
                "as AutoModelForCausalLM loads."
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name = name or model.name_or_path or type(model).__name__

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the prompt is read by an encoder, so that what is written stands alone."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def parts(self) -> list[Adapter]:
        """The adapters on the model, innermost first."""
        return list(self._stack().parts) if find_stacks(self.model) else []

    def strengths(self) -> dict[str, float]:
        """Return the strength of each adapter by its name: 1 as saved, 0 where it is off."""
        return {part.name: part.scale if part.enabled else 0.0 for part in self.parts}

    def scale(self, scale: float, part: str | None = None) -> None:
        """Turn the dial of one adapter, or of all: 1 as saved, 0 equal to the base bit for bit, negative reversed.

        An edit's dial is a factor of its offsets (ITI's α), a tuned adapter's one of its scaling. A method without a
        dial is only on, at 1, or off.

        Args:
            scale: the strength.
            part: the adapter's name; default all.

        Raises:
            ValueError: no such adapter, or one that has no dial; nothing is changed then.
        """
        check_scale(scale)
        stack = self._stack()
        parts = stack.parts if part is None else [self._part(part)]
        if scale not in (0, 1) and (fixed := [part for part in parts if not part.scaling]):
            others = [part.name for part in stack.parts if part.scaling]
            instead = f"; there is one on {', '.join(others)}" if others else ""
            raise ValueError(
                f"Adapter {fixed[0].name!r} ({type(fixed[0].config).__name__}) has no dial, it is on (1) or off "
                f"(0){instead}."
            )
        for chosen in parts:
            if scale and chosen.scaling:
                stack.scale(scale, chosen.name)
            stack.enable(bool(scale), chosen.name)

    def enable(self, enabled: bool = True) -> None:
        """Switch all adapters on, at the strength that each last had, or off.

        Raises:
            ValueError: there is none, or one was made by changing the base's weights, as PiSSA does.
        """
        self._stack().enable(enabled)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Let the model be its base for a while, bit for bit.

        Raises:
            ValueError: as `enable`.
        """
        with self._stack().disabled():
            yield

    def _stack(self) -> AdapterStack:
        if not find_stacks(self.model):
            raise ValueError(f"{self.name} is a whole model without adapters: there is no dial and no base beside it.")
        return adapters(self.model)

    def _part(self, name: str) -> Adapter:
        stack = self._stack()
        if name not in stack:
            names = [part.name for part in stack.parts]
            raise ValueError(f"There is no adapter {name!r}; the nearest names are {nearest_names(name, names)}.")
        return stack[name]
