"""ReFT, a trained edit of low rank of the residual stream at chosen tokens, as callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Unpack

from torch import nn

from lightning_peft.backbone.layers import LayerSite
from lightning_peft.fitting.adapter_callback import AdapterCallback, AdapterOptions
from lightning_peft.fitting.law_example import LawExample
from lightning_peft.positions import check_policy, check_sites, outside_answers
from lightning_peft.positions.decoder import decoder_of
from lightning_peft.tokens import Tokens

if TYPE_CHECKING:
    # not from peft: LightningCLI runs this block, and peft brings bitsandbytes, whose AdamW makes the name ambiguous
    from lightning_peft.stack.configs import PeftConfig

Activation = Literal["linear", "relu", "gelu", "swish", "tanh"]
_STREAM = ("stream",)  # blocks are called, and give it
_TEXT = ("attention", "transformers", "position_ids")


class LoReFT(AdapterCallback):
    """Edit what each block gives, in a trained subspace of rank r: `h + alpha * Rᵀ(W h + b - R h)`, R orthonormal.

    Low-rank linear subspace ReFT (Wu et al. 2024, arXiv:2404.03592, equation 2): in the r directions of R the hidden
    state becomes what `W h + b` says. It is edited at some tokens of the prompt; later ones see that through their
    attention, and generation costs nothing. Trainable parameters: `2 * r * width + r` for each block. It cannot be
    merged.

    Args:
        r: the rank; the authors' 8 for commonsense reasoning, 4 for instructions, 1 for GLUE.
        layers: whose output is edited, by number from 0, or a window such as `"8:16"`; default all, of an
            encoder-decoder where not `"all"` tokens are edited those of its decoder.
        positions: the edited tokens, in the language of `lightning_peft.tokens`, several selections joined by `+`;
            default the first and the last seven of the prompt, which the authors write `f7+l7`. Where the model does
            not generate, as a classifier, a text without `prompt_end` and token-wise labels is a prompt as a whole.
        share_weights: whether all selections share R, W and b; else each has its own.
        dropout: on the change, in training.
        act_fn: a function of `W h + b`; another than `"linear"` needs `init="paper"`.
        init: `"identity"`: the untrained adapter changes nothing. `"paper"`: the authors' W and b, at random.
        alpha: the strength.
        within: the part of the model whose layers are meant, see `lightning_peft.backbone.language_model`; default the
            language model.
        **options: see `AdapterOptions`.

    Raises:
        ValueError: when the adapter is put on, prompt tokens of an encoder-decoder, whose prompts are in its encoder.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import LoReFT
        >>> trainer = L.Trainer(callbacks=[LoReFT(r=4, layers=[3, 9, 18, 24])], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "loreft"
    law_examples: Mapping[str, LawExample] = {
        "LoReFT": LawExample({"r": 2, "positions": "all"}, _STREAM),
        "LoReFT of first tokens": LawExample({"r": 2, "positions": "all[0:5]"}, _TEXT),
        "LoReFT with weights apart": LawExample(
            {"r": 2, "positions": "all[0:3] + answer[2:5]", "share_weights": False}, _TEXT
        ),
    }
    subtracts: ClassVar[bool] = True  # whether `R h` is subtracted

    def __init__(
        self,
        r: int = 8,
        layers: list[int] | str | None = None,
        positions: str = "prompt[0:7]+prompt[-7:]",
        share_weights: bool = True,
        dropout: float = 0.0,
        act_fn: Activation = "linear",
        init: Literal["identity", "paper"] = "identity",
        alpha: float = 1.0,
        within: str | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        if init not in ("identity", "paper"):
            raise ValueError(f'init must be "identity" or "paper", got {init!r}.')
        for policy in positions.split("+"):
            check_policy(policy.strip())
        super().__init__(**options)
        self.r, self.layers, self.positions, self.share_weights = r, layers, positions, share_weights
        self.dropout, self.act_fn, self.init, self.alpha, self.within = dropout, act_fn, init, alpha, within
        self.exempt = {"merge": "no weight maps what a block gives"}
        if init == "paper":
            self.exempt = self.exempt | {"identity": "the authors' adapter begins as an edit at random"}

    @property
    def orthonormal(self) -> bool:
        """True where the rows of R are orthonormal."""
        return True

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        from lightning_peft.tuners.reft import ReftConfig

        sites = self._sites(backbone)
        if len(widths := {site.width for site in sites}) != 1:
            raise ValueError(f"Blocks of different widths ({sorted(widths)}) cannot share one adapter: choose layers.")
        return ReftConfig(
            target_modules=[site.name for site in sites],
            width=widths.pop(),
            r=self.r,
            orthogonal=self.orthonormal,
            subtract=self.subtracts,
            activation=self.act_fn,
            alpha=self.alpha,
            dropout=self.dropout,
            positions=self.positions,
            share_weights=self.share_weights,
            init_reft_weights=True if self.init == "identity" else "paper",
        )

    def trainable_parameters(self, backbone: nn.Module) -> int:
        units = 1 if self.share_weights else len(self.positions.split("+"))
        return sum(units * (2 * self.r * site.width + self.r) for site in self._sites(backbone))

    def _sites(self, backbone: nn.Module) -> list[LayerSite]:
        """Return the blocks whose output is edited."""
        from lightning_peft.editing.selection import Selection

        policies = [policy.strip() for policy in self.positions.split("+")]
        prompts = [policy for policy in policies if Tokens.parse(policy).phase == "prompt"]
        if prompts and decoder_of(backbone) is not None:
            raise ValueError(
                f"The prompt of an encoder-decoder such as {type(backbone).__name__} is in its encoder, which "
                f'`generate` runs apart, so that {prompts[0]!r} tokens are unknown there: choose positions="all", or '
                'tokens of the answer such as "answer[0:3]".'
            )
        layers = tuple(self.layers) if isinstance(self.layers, list) else self.layers
        found = Selection(sites="block", layers=layers, within=self.within).find(backbone)
        sites = [site for site in found if isinstance(site, LayerSite)]
        if "all" in policies:
            return sites
        if layers is None:  # an encoder-decoder's answers are in its decoder
            outside = set(outside_answers(backbone, [site.name for site in sites]))
            sites = [site for site in sites if site.name not in outside]
        for policy in policies:
            check_sites(policy, backbone, [site.name for site in sites])
        return sites


class NoReFT(LoReFT):
    """LoReFT whose R may be any matrix: `h + alpha * Rᵀ(W h + b - R h)`, so that training and loading need no QR.

    The variant without orthonormal rows of pyreft and AdapterHub. Arguments are those of `LoReFT`.
    """

    default_name = "noreft"
    law_examples: Mapping[str, LawExample] = {"NoReFT": LawExample({"r": 2, "positions": "all"}, _STREAM)}

    @property
    def orthonormal(self) -> bool:
        return False


class DiReFT(LoReFT):
    """Edit what each block gives by a trained direct map of rank r: `h + alpha * Rᵀ(W h + b)`, R any matrix.

    LoReFT without the difference and without orthonormal rows (Wu et al. 2024, arXiv:2404.03592, equation 4), which is
    faster to train. An adapter beside the whole block, at the chosen tokens.

    Args:
        r: the rank.
        layers: see `LoReFT`.
        positions: see `LoReFT`.
        share_weights: see `LoReFT`.
        dropout: see `LoReFT`.
        act_fn: a function of `W h + b`.
        init: see `LoReFT`.
        alpha: the strength.
        within: see `LoReFT`.
        orthogonal: let the rows of R be orthonormal all the same, as those of the authors' class of this name.
        **options: see `AdapterOptions`.

    Example:
        >>> import lightning as L
        >>> from lightning_peft.callbacks import DiReFT
        >>> trainer = L.Trainer(callbacks=[DiReFT(r=4, positions="prompt[-3:]")], accelerator="cpu", logger=False,
        ...                     enable_checkpointing=False)
    """

    default_name = "direft"
    law_examples: Mapping[str, LawExample] = {
        "DiReFT": LawExample({"r": 2, "positions": "all", "act_fn": "gelu"}, _STREAM),
    }
    subtracts = False

    def __init__(
        self,
        r: int = 8,
        layers: list[int] | str | None = None,
        positions: str = "prompt[0:7]+prompt[-7:]",
        share_weights: bool = True,
        dropout: float = 0.0,
        act_fn: Activation = "linear",
        init: Literal["identity", "paper"] = "identity",
        alpha: float = 1.0,
        within: str | None = None,
        orthogonal: bool = False,
        **options: Unpack[AdapterOptions],
    ) -> None:
        super().__init__(r, layers, positions, share_weights, dropout, act_fn, init, alpha, within, **options)
        self.orthogonal = orthogonal

    @property
    def orthonormal(self) -> bool:
        return self.orthogonal
