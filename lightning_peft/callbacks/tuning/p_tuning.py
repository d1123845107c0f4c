"""P-tuning as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Unpack

from torch import nn

from lightning_peft.backbone.structure import width
from lightning_peft.callbacks.tuning.prompt_tuning import PromptTuning
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig


class PTuning(AdapterCallback):
    """P-tuning: virtual tokens before those of every call, computed by a small network that is trained with them.

    Liu et al. 2021, arXiv:2103.10385. Trainable parameters, with width `d`, `n` tokens and hidden size `h`:
    `n d + (d h + h) + (h h + h) + (h d + d)` for the perceptron. A saved folder holds the prompt that plain peft reads,
    and the network, from which training goes on here.

    Args:
        num_virtual_tokens: how many virtual tokens, at least 1.
        encoder: the network: `"mlp"` (two hidden layers) or `"lstm"` (bidirectional, then a perceptron).
        encoder_hidden_size: its hidden size; default the model's width.
        encoder_num_layers: of the LSTM.
        encoder_dropout: of the LSTM, in [0, 1).
        backbone: see `AdapterOptions`; it must be a transformers model that takes `inputs_embeds`.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: no virtual token is asked for, an unknown network, or a dropout outside [0, 1).

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import PTuning
        >>> trainer = L.Trainer(callbacks=[PTuning(num_virtual_tokens=20)], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "p_tuning"

    exempt: Mapping[str, str] = PromptTuning.exempt
    law_examples: Mapping[str, LawExample] = {
        "PTuning": LawExample(
            {"num_virtual_tokens": 3, "encoder_hidden_size": 4}, ("attention", "transformers", "tokens")
        )
    }

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        encoder: Literal["mlp", "lstm"] = "mlp",
        encoder_hidden_size: int | None = None,
        encoder_num_layers: int = 2,
        encoder_dropout: float = 0.0,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be at least 1, got {num_virtual_tokens}.")
        if encoder not in ("mlp", "lstm"):
            raise ValueError(f'encoder must be "mlp" or "lstm", got {encoder!r}.')
        if not 0.0 <= encoder_dropout < 1.0:
            raise ValueError(f"encoder_dropout must be in [0, 1), got {encoder_dropout}.")
        super().__init__(**options)
        self.num_virtual_tokens, self.encoder = num_virtual_tokens, encoder
        self.encoder_hidden_size = encoder_hidden_size
        self.encoder_num_layers, self.encoder_dropout = encoder_num_layers, encoder_dropout

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from peft import PromptEncoderConfig

        lstm = self.encoder == "lstm"
        return PromptEncoderConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            encoder_reparameterization_type=self.encoder.upper(),  # type: ignore[arg-type]
            encoder_hidden_size=self.encoder_hidden_size,  # type: ignore[arg-type]
            encoder_num_layers=self.encoder_num_layers if lstm else 2,
            encoder_dropout=self.encoder_dropout,
            num_transformer_submodules=1,  # peft would make a second prompt for a decoder, and not use it
        )

    def trainable_parameters(self, backbone: nn.Module) -> int | None:
        if self.encoder != "mlp":
            return None
        d = width(backbone)
        m = self.encoder_hidden_size or d
        return self.num_virtual_tokens * d + (d * m + m) + (m * m + m) + (m * d + d)
