"""Inference-time intervention as one callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import lightning as L
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite, head_sites
from lightning_peft.editing.collect import capture_texts
from lightning_peft.editing.heads import head_offsets_config
from lightning_peft.editing.iti import REFERENCE_POSITIONS, HeadEdit, check_names, compute_iti, head_shapes
from lightning_peft.fitting.reading_edit import ReadingEdit, ReadingOptions, Tokenizer, edit
from lightning_peft.moved import warn_moved
from lightning_peft.positions import check_policy
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.computed import ComputedAdapter
from lightning_peft.stack.gates import check_gate
from lightning_peft.stack.stack import AdapterStack

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig  # as in lora.py


class ITI(ReadingEdit[HeadSite]):
    """Inference-time intervention (Li et al. 2023, arXiv:2306.03341): move the heads that tell true from false.

    `trainer.fit` reads the head outputs at the last token of labelled statements, fits a linear probe to every head,
    ranks heads on held-out training questions, and installs a `HeadOffsets` adapter that adds
    `alpha * sigma * direction` to the best `num_heads`. Nothing is trained.

    The training batches hold `input_ids [B, T]`, `attention_mask [B, T]`, `label [B]` (1 true, 0 false) and `group [B]`
    (which question a statement is about), of training questions only.

    Args:
        num_heads: how many heads to edit (K).
        alpha: the strength, in standard deviations along the direction.
        direction: `"mass_mean"`, `"probe_weight"`, `"ccs"`, `"pca"` (representation engineering's reading vector), or
            `"random"` (the control).
        positions: `"answer"` (from the last prompt token on, the paper's), `"generated"`, `"prompt"`, `"all"`, or a
            window of one of them, such as `"answer[0:3]"`; see `lightning_peft.tokens`. Default `"answer"`; with
            `reference` where the authors' multiple-choice scoring edits, `"generated[1:]"`, while their generation is
            `"answer"`.
        val_fraction: share of the training questions on which heads are ranked.
        C: inverse strength of the probes' L2 penalty.
        seed: of the inner split, of contrast pairs, of texts for sigma and of random directions.
        strength: `"equal"`, or `"accuracy"`: each head's share of `alpha` is in proportion to its accuracy above
            chance, the mean share 1.
        question_ends: take sigma over texts that end in a question, as the authors do, not over the statements: over
            `sigma_texts`, which the data may give.
        reference: compute what the authors' code computes, with `question_ends`; see `compute_iti`.
        sigma_texts: texts over which to take sigma, in place of the statements: lists of token ids, or, where the
            LightningModule has a `tokenizer`, strings.
        gate: None; `"adaptive"`: each head's strength at each token is `alpha * (1 - p + beta)`, p being its probe's
            probability that what it sees there is true (ACT, Wang et al. 2024, arXiv:2406.00034); or
            `"conditional"`: it acts only where `1 - p` is above `threshold`.
        beta: of an adaptive gate.
        threshold: of a conditional one.
        pattern: where the architecture is unknown, a regular expression for the end of the names of the attention
            output projections.
        heads_per_layer: where no configuration says it, how many heads enter each projection.

    Attributes:
        edit_: the computed `HeadEdit` after `fit`: heads, directions, sigma, accuracy `[layers, heads]`.

    Raises:
        ValueError: in one sentence: no labels in the batch, one class only, more heads than the model has, activations
            that are not finite, an unknown architecture.
        RuntimeError: fit ended before the pass did, so that nothing was computed.
    """

    default_name = "iti"

    def __init__(
        self,
        num_heads: int = 48,
        alpha: float = 15.0,
        direction: Literal["mass_mean", "probe_weight", "ccs", "pca", "random"] = "mass_mean",
        positions: str | None = None,
        val_fraction: float = 0.2,
        C: float = 1.0,
        seed: int = 0,
        strength: Literal["equal", "accuracy"] = "equal",
        question_ends: bool = False,
        reference: bool = False,
        gate: Literal["adaptive", "conditional"] | None = None,
        beta: float = 0.0,
        threshold: float = 0.5,
        pattern: str | None = None,
        heads_per_layer: int | None = None,
        sigma_texts: Sequence[str] | Sequence[Sequence[int]] | None = None,
        **options: Unpack[ReadingOptions],
    ) -> None:
        check_names(direction, strength)
        if positions is None:
            positions = REFERENCE_POSITIONS if reference else "answer"
        check_policy(positions)
        check_gate(gate, threshold)
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}.")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}.")
        super().__init__(**options)
        self.num_heads, self.alpha, self.direction, self.positions = num_heads, alpha, direction, positions
        self.val_fraction, self.C, self.seed = val_fraction, C, seed
        self.strength, self.question_ends, self.reference = strength, question_ends or reference, reference
        self.gate: dict[str, Any] = {"gate": gate, "beta": beta, "threshold": threshold}
        self.pattern, self.heads_per_layer = pattern, heads_per_layer
        self.sigma_texts = sigma_texts
        self._sigma_activations: Tensor | None = None

    def find_sites(self, backbone: nn.Module) -> Sequence[HeadSite]:
        return head_sites(backbone, self.pattern, self.heads_per_layer, within=self.within)

    def empty_config(self, sites: Sequence[HeadSite]) -> PeftConfig:
        available = sum(site.num_heads for site in sites)
        if self.num_heads > available:
            raise ValueError(f"num_heads is {self.num_heads}, but the model has {available} heads.")
        return head_offsets_config(sites, alpha=self.alpha, positions=self.positions, **self.gate)

    def compute(self, stack: AdapterStack, trainer: L.Trainer) -> None:
        if self.sigma_texts is not None:
            self._read_sigma(stack.backbone, getattr(trainer.lightning_module, "tokenizer", None))
        super().compute(stack, trainer)
        best = float(self.edit_.accuracy.max())
        trainer.lightning_module.log("probe_accuracy_best", best, rank_zero_only=True)

    def read(
        self, backbone: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], label: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check_sigma_texts()
        if self.sigma_texts is not None:
            self._read_sigma(backbone, tokenizer)
        return super().read(backbone, tokenizer, texts, label, group)

    def _check_sigma_texts(self) -> None:
        if self.question_ends and self.sigma_texts is None:
            raise ValueError(
                f"{type(self).__name__} takes sigma over texts that end in a question, and has none: give them as "
                "sigma_texts."
            )

    def _read_sigma(self, backbone: nn.Module, tokenizer: Tokenizer | None) -> None:
        sequences: list[Sequence[int]] = []
        for text in self.sigma_texts or ():
            if not isinstance(text, str):
                sequences.append(text)
            elif tokenizer is not None:
                sequences.append(tokenizer(text)["input_ids"])
            else:
                raise ValueError("sigma_texts are strings, and the LightningModule has no tokenizer: give token ids.")
        # in `fit` the adapter on the model keeps texts from being packed, and elsewhere bits are to be the same
        self._sigma_activations = capture_texts(backbone, self._sites, sequences, share=False).values

    def edit(self, activations: Tensor, label: Tensor, group: Tensor, sites: Sequence[HeadSite]) -> ComputedAdapter:
        self.edit_ = compute_iti(
            activations,
            label,
            group,
            self.num_heads,
            self.direction,
            self.val_fraction,
            self.C,
            self.seed,
            self.strength,
            self._sigma_activations,
            self.reference,
            head_shapes(sites),
        )
        return self.edit_.adapter(sites, self.alpha, self.positions, **self.gate)

    def count(self, made: ComputedAdapter) -> int:
        return sum(tensor.numel() for key, tensor in made.tensors.items() if key.endswith(".head_offsets"))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._check_sigma_texts()
        super().setup(trainer, pl_module, stage)

    def end(self) -> None:
        super().end()
        self._sigma_activations = None


def edit_iti(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    label: Sequence[int] | Tensor,
    group: Sequence[int] | Tensor,
    sigma_texts: Sequence[str] | None = None,
    **options: Any,
) -> Adapter:
    """Compute an inference-time intervention from labelled texts and put it on a model, without a Trainer.

    Args:
        model, tokenizer, texts, label, group: as `lightning_peft.edit`.
        sigma_texts: texts over which to take sigma, which end in a question, say; default `texts`.
        **options: those of `ITI`.

    Returns:
        The adapter, on the model.

    Raises:
        ValueError: as `ITI`.
    """
    return edit(model, tokenizer, texts, label, group, ITI(sigma_texts=sigma_texts, **options))


def install(
    stack: AdapterStack, name: str, edit: HeadEdit, sites: list[HeadSite], alpha: float, positions: str, **gate: Any
) -> None:
    """Put a computed edit on a stack: `stack.put` as it was called in 0.1."""
    warn_moved(f"{__name__}.install", "stack.put(name, edit.adapter(sites, alpha, positions))")
    stack.put(name, edit.adapter(sites, alpha, positions, **gate))
