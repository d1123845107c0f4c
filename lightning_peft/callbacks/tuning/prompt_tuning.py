"""Prompt tuning as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

from torch import nn

from lightning_peft.backbone.structure import width
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig


class PromptTuning(AdapterCallback):
    """Prompt tuning: trained embeddings of virtual tokens before the tokens of every call.

    Lester et al. 2021, arXiv:2104.08691. Trainable parameters: `num_virtual_tokens * width`. The model's outputs are
    those of the real tokens, so a loss of your own needs no change.

    Args:
        num_virtual_tokens: how many virtual tokens, at least 1. The paper's choice is 100.
        init: what they are at the start: embeddings of tokens drawn from the `"vocab"`, of a `"text"`, or `"random"`.
        text: for `init="text"`; it is repeated or cut to the number of virtual tokens.
        tokenizer: for `init="text"`: the tokenizer's name or folder.
        backbone: see `AdapterOptions`; it must be a transformers model that takes `inputs_embeds`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: no virtual token is asked for, or a text without its tokenizer.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import PromptTuning
        >>> trainer = L.Trainer(callbacks=[PromptTuning(num_virtual_tokens=20)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "prompt_tuning"

    exempt: Mapping[str, str] = {
        "identity": "virtual tokens take a part of the attention before they are trained",
        "merge": "a prompt is computed with, and no weight of the model stands for it",
    }
    law_examples: Mapping[str, LawExample] = {
        "PromptTuning": LawExample({"num_virtual_tokens": 3}, ("attention", "transformers", "tokens"))
    }

    def __init__(
        self,
        num_virtual_tokens: int = 100,
        init: Literal["vocab", "text", "random"] = "vocab",
        text: str | None = None,
        tokenizer: str | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be at least 1, got {num_virtual_tokens}.")
        if init not in ("vocab", "text", "random"):
            raise ValueError(f'init must be "vocab", "text" or "random", got {init!r}.')
        if (init == "text") != (text is not None and tokenizer is not None):
            raise ValueError('init="text" goes with a text and the tokenizer to read it by, and they with it.')
        super().__init__(**options)
        self.num_virtual_tokens, self.init, self.text, self.tokenizer = num_virtual_tokens, init, text, tokenizer

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init={"vocab": "SAMPLE_VOCAB", "text": "TEXT", "random": "RANDOM"}[self.init],
            prompt_tuning_init_text=self.text,
            tokenizer_name_or_path=self.tokenizer,
            num_transformer_submodules=1,  # peft would make a second prompt for a decoder, and not use it
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        return self.num_virtual_tokens * width(backbone)
