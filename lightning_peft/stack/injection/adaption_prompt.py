"""LLaMA-Adapter's adaption prompts (arXiv:2303.16199): attention modules wrapped by ones that also attend to a prompt.

peft's tuner takes the wrappers out to switch them off, and their weights with them. Here they stay, and pass on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lightning_peft.backbone.modules import state_tensors
from lightning_peft.backbone.peft_private import adaption_parents
from lightning_peft.replaced import Handle, replaced
from lightning_peft.stack.injection.injection import Injection

_PREFIX = "base_model.model."


class AdaptionInjection(Injection):
    """Adaption prompts in the last `adapter_layers` attention modules of a LLaMA, Mistral or GPT-2."""

    _off: Sequence[Handle] = ()  # while off: the wrappers' calls, handed on to what they wrap

    @classmethod
    def check(cls, backbone: nn.Module, config: Any, name: str, others: list[Injection], computed: bool) -> None:
        from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

        kind = getattr(getattr(backbone, "config", None), "model_type", None)
        if kind not in TRANSFORMERS_MODEL_CONFIG:
            known = ", ".join(TRANSFORMERS_MODEL_CONFIG)
            raise ValueError(
                f"AdaptionPromptConfig knows the attention of {known}, not that of {kind or 'this module'}."
            )
        for field in ("adapter_len", "adapter_layers"):
            if not isinstance(getattr(config, field), int) or getattr(config, field) < 1:
                raise ValueError(f"AdaptionPromptConfig needs {field}, a positive number.")
        if others:
            raise ValueError(
                "AdaptionPromptConfig renames the modules it wraps, so it must be a backbone's only adapter."
            )

    def check_below(self, config: Any, computed: bool) -> None:
        raise ValueError(
            f"{type(config).__name__} cannot be put on adaption prompts, which rename the modules they wrap."
        )

    @classmethod
    def clean_up(cls, backbone: nn.Module, config: Any, name: str) -> None:
        pass  # peft counts the modules before it wraps the first

    def layers(self) -> Iterator[Any]:
        return iter(())

    def keys(self) -> dict[str, str]:
        names = state_tensors(self.backbone)
        return {_PREFIX + name: name for name in names if name.rsplit(".", 1)[-1].startswith("adaption_")}

    def places(self) -> list[str]:
        return list(dict.fromkeys(name.rsplit(".", 1)[0] for name in self.keys().values()))

    def check_merge(self) -> None:
        raise self.cannot_merge()

    def switch(self, on: bool) -> None:
        for handle in self._off:
            handle.remove()
        wrappers = [getattr(parent, self.config.target_modules) for parent in adaption_parents(self.tuner, self.name)]
        self._off = [] if on else [replaced(w, "forward", w.model.__call__, instead=True) for w in wrappers]

    def take_out(self) -> None:
        self.switch(True)
        self.tuner.delete_adapter(self.name)
