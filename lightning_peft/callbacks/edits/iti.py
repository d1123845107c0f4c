"""Inference-time intervention as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite, head_sites
from lightning_peft.editing.capture import HeadCapture
from lightning_peft.editing.collect import capture_tokens
from lightning_peft.editing.heads import head_offsets_config
from lightning_peft.editing.iti import REFERENCE_POSITIONS, HeadEdit, check_names, compute_iti
from lightning_peft.fitting.adapter_callback import EditOptions
from lightning_peft.fitting.edit import Edit, from_rank_zero, gather
from lightning_peft.positions import check_policy
from lightning_peft.stack.gates import check_gate
from lightning_peft.stack.stack import AdapterStack

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig  # as in lora.py


class ITI(Edit):
    """Inference-time intervention (Li et al. 2023, arXiv:2306.03341): move the heads that tell true from false.

    `trainer.fit` reads the head outputs at the last token of labelled statements, fits a linear probe to every head,
    ranks heads on held-out training questions, and installs a `HeadOffsets` adapter that adds
    `alpha * sigma * direction` to the best `num_heads`. Nothing is trained.

    The training batches hold `input_ids [B, T]`, `attention_mask [B, T]`, `truth [B]` (0 or 1) and `question_id [B]`,
    of training questions only.

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
        question_ends: take sigma over texts that end in a question, as the authors do, not over the statements. The
            data module gives them: `question_ends(seed)`, lists of token ids, as `TruthfulQADataModule` has it.
        reference: compute what the authors' code computes, with `question_ends`; see `compute_iti`.
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
        **options: Unpack[EditOptions],
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
        self.edit_: HeadEdit | None = None
        self._sites: list[HeadSite] = []
        self._capture: HeadCapture | None = None
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        self._sites = head_sites(backbone, self.pattern, self.heads_per_layer)
        available = sum(site.num_heads for site in self._sites)
        if self.num_heads > available:
            raise ValueError(f"num_heads is {self.num_heads}, but the model has {available} heads.")
        return head_offsets_config(self._sites, alpha=self.alpha, positions=self.positions, **self.gate)

    def begin(self, stack: AdapterStack) -> None:
        self._rows = []
        self._capture = HeadCapture(stack.backbone, self._sites).__enter__()

    def observe(self, batch: Mapping[str, Tensor]) -> None:
        assert self._capture is not None
        heads = self._capture(batch["input_ids"], batch.get("attention_mask"))
        self._rows.append((heads, batch["truth"].cpu(), batch["question_id"].cpu()))

    def compute(self, stack: AdapterStack, trainer: L.Trainer) -> None:
        activations, truth, question_id = gather(
            trainer, *(torch.cat(column) for column in zip(*self._rows, strict=True))
        )
        others: Tensor | None = None
        if self.question_ends:
            self.end()  # or the pass's own hooks would read these texts too
            texts = trainer.datamodule.question_ends(self.seed)  # type: ignore[attr-defined]
            others = capture_tokens(stack.backbone, self._sites, texts)
        self.edit_ = edit = from_rank_zero(
            trainer,
            lambda: compute_iti(
                activations,
                truth,
                question_id,
                self.num_heads,
                self.direction,
                self.val_fraction,
                self.C,
                self.seed,
                self.strength,
                others,
                self.reference,
            ),
        )
        install(stack, self.name, edit, self._sites, self.alpha, self.positions, **self.gate)
        best = float(edit.accuracy.max())
        trainer.lightning_module.log("probe_accuracy_best", best, rank_zero_only=True)
        trainer.lightning_module.log("edited_parameters", float(edit.directions.numel()), rank_zero_only=True)

    def _check_data(self, trainer: L.Trainer) -> None:
        super()._check_data(trainer)
        if self.question_ends and not hasattr(trainer.datamodule, "question_ends"):  # type: ignore[attr-defined]
            raise ValueError(
                f"{type(self).__name__} takes sigma over texts that end in a question, which the data must give: fit "
                "with a data module that has question_ends(seed), such as TruthfulQADataModule."
            )

    def end(self) -> None:
        self._rows = []
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
            self._capture = None


def install(
    stack: AdapterStack,
    name: str,
    edit: HeadEdit,
    sites: list[HeadSite],
    alpha: float,
    positions: str,
    **gate: Any,
) -> None:
    """Put a computed edit in the stack under `name`, in place of what was there under that name."""
    if name in stack:
        stack.remove(name)
    config = edit.config(sites, alpha, positions, **gate)
    part = stack.add(config, name, computed=True, record=edit.record)
    values = {"head_offsets": edit.offsets(sites)}
    if config.gate is not None:
        values["head_offsets_probe"] = edit.probes(sites)
    for live, tensor in stack.live(part).items():
        site, kind, _ = live.rsplit(".", 2)
        tensor.copy_(values[kind][site])
