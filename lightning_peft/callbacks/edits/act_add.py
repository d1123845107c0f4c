"""Activation addition from two prompts as one callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.backbone.layers import LayerSite
from lightning_peft.editing.collect import capture_texts
from lightning_peft.editing.contrast import LayerEdit, act_add_vectors
from lightning_peft.fitting.adapter_callback import EditOptions
from lightning_peft.fitting.edit_layers import EditLayers
from lightning_peft.fitting.reading_edit import Tokenizer
from lightning_peft.stack.stack import AdapterStack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ActAdd(EditLayers):
    """Activation addition (Turner et al. 2023, arXiv:2308.10248): add the difference of two prompts at a text's front.

    `trainer.fit` runs the two prompts, the shorter one filled up with spaces, and installs a layer-offsets adapter with
    a vector for each of their tokens, which is added to the token at the same place of every text. It needs no
    data: whatever the training batches hold is not looked at. The tokenizer is the LightningModule's
    `tokenizer`, unless one is given.

    Args:
        prompt_add: what to lead to, such as `"Love"`.
        prompt_sub: what to lead away from, such as `"Hate"`, or nothing.
        coeff: the strength.
        layers: which blocks' output is moved, from 0; default the middle one. The paper counts inputs: its layer l is
            block `l - 1` here.
        positions: the phase at whose beginning the vectors are added: `"all"` (the text's front, the paper's),
            `"prompt"`, `"answer"` or `"generated"`.
        sites, within: as `CAA`'s.
        tokenizer: for the prompts: a tokenizer, or its name or folder.

    Attributes:
        edit_: the computed `LayerEdit` after `fit`, its vectors `[layers, tokens, width]`.

    Raises:
        ValueError: no tokenizer is found, the prompts are the same, or there is no such layer.
    """

    default_name = "act_add"

    batch_keys: tuple[str, ...] = ()

    def __init__(
        self,
        prompt_add: str = "True",
        prompt_sub: str = "",
        coeff: float = 1.0,
        layers: list[int] | str | None = None,
        positions: Literal["all", "prompt", "answer", "generated"] = "all",
        sites: Literal["block", "attention", "mlp"] = "block",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        within: str | None = None,
        **options: Unpack[EditOptions],
    ) -> None:
        if positions not in ("all", "prompt", "answer", "generated"):
            raise ValueError(f"positions must be all, prompt, answer or generated, got {positions!r}.")
        if prompt_add == prompt_sub:
            raise ValueError(f"Both prompts are {prompt_add!r}, and between them there is no difference to add.")
        super().__init__(sites, layers, coeff, positions, within=within, **options)
        self.prompt_add, self.prompt_sub, self.tokenizer = prompt_add, prompt_sub, tokenizer
        self._prompts: list[list[int]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._prompts = encode_alike(self._tokenizer(pl_module), self.prompt_add, self.prompt_sub)

    def begin(self, stack: AdapterStack) -> None:
        pass

    def observe(self, batch: Mapping[str, Tensor]) -> None:
        pass

    def gather_rows(self, stack: AdapterStack, trainer: L.Trainer) -> tuple[Tensor, Tensor, Tensor]:
        return self._read_prompts(stack.backbone)

    def read(
        self, backbone: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], label: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._prompts = encode_alike(tokenizer, self.prompt_add, self.prompt_sub)
        return self._read_prompts(backbone)

    def _tokenizer(self, module: L.LightningModule) -> Any:
        if isinstance(self.tokenizer, str):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.tokenizer)
        tokenizer = getattr(module, "tokenizer", None) if self.tokenizer is None else self.tokenizer
        if not callable(tokenizer):
            raise ValueError(
                "ActAdd needs a tokenizer for its prompts: give the LightningModule one, or ActAdd(tokenizer=…)."
            )
        return tokenizer

    def _read_prompts(self, backbone: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        captured = capture_texts(backbone, self._sites, self._prompts, "all", share=False)  # as in ITI
        return captured.values, 1 - captured.text, captured.place

    def layer_edit(self, activations: Tensor, label: Tensor, group: Tensor, sites: Sequence[LayerSite]) -> LayerEdit:
        vectors = act_add_vectors(activations[label == 1], activations[label == 0])
        if not torch.isfinite(vectors).all():
            raise ValueError("The prompts' activations contain NaN or infinite values.")
        record = {
            "prompt_add": self.prompt_add,
            "prompt_sub": self.prompt_sub,
            "tokens": self._prompts,
            "layers": [site.name for site in sites],
            "norms": vectors.norm(dim=-1).tolist(),
        }
        return LayerEdit(vectors, record)

    def end(self) -> None:
        super().end()
        self._prompts = []


def encode_alike(tokenizer: Any, *prompts: str) -> list[list[int]]:
    """Return the prompts' tokens, shorter ones filled up on the right with spaces.

    Raises:
        ValueError: the tokenizer has no token for a space.
    """
    encoded = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    longest = max(map(len, encoded))
    space = list(tokenizer(" ", add_special_tokens=False)["input_ids"])
    if not space and any(len(tokens) < longest for tokens in encoded):
        raise ValueError("The tokenizer has no token for a space to fill up the shorter prompt: give prompts alike.")
    return [tokens + space[-1:] * (longest - len(tokens)) for tokens in encoded]
