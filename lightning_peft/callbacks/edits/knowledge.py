"""Rewriting facts in the weights: ROME and MEMIT, each as one callback."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.editing.capture import Capture
from lightning_peft.editing.facts import (
    Fact,
    KeyMoments,
    KnowledgeEdit,
    Search,
    causal_trace,
    choose_layers,
    compute_memit,
    compute_rome,
    memory_sites,
    random_prefixes,
    read_facts,
)
from lightning_peft.editing.facts.rome import check_facts
from lightning_peft.editing.facts.update import lora_config
from lightning_peft.fitting.adapter_callback import EditOptions
from lightning_peft.fitting.edit import Edit, from_rank_zero
from lightning_peft.stack.stack import AdapterStack

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig  # as in lora.py

__all__ = ["MEMIT", "ROME"]

_PREFIX_WORDS = 4
_KEPT_TEXTS = 200  # of those seen, to take prefixes from


class KnowledgeEditing(Edit):
    """Base of ROME and MEMIT: `fit` reads the key covariance from the training batches' text, then writes the facts.

    The batches hold `input_ids [B, T]` and `attention_mask [B, T]`: of any text, a few thousand tokens and more.
    """

    batch_keys = ("input_ids",)

    def __init__(
        self,
        facts: str | Path | list[Fact] | None,
        numbers: list[int] | None,
        layers: list[int] | None,
        search: Search,
        shrinkage: float,
        prefixes: int | list[str],
        seed: int,
        reference: bool,
        within: str | None,
        **options: Unpack[EditOptions],
    ) -> None:
        if not 0.0 <= shrinkage <= 1.0:
            raise ValueError(f"shrinkage must be between 0 and 1, got {shrinkage}.")
        _check_prefixes(prefixes)
        super().__init__(**options)
        self.facts = list(facts) if isinstance(facts, list) else read_facts(facts, numbers)
        if not self.facts:
            raise ValueError("There is no fact to rewrite: give at least one.")
        self.layers, self.search, self.shrinkage = layers, search, shrinkage
        self.prefixes, self.seed, self.reference, self.within = prefixes, seed, reference, within
        self.edit_: KnowledgeEdit | None = None
        self.trace_: Tensor | None = None
        self._tokenizer: Any = None
        self._moments: KeyMoments | None = None
        self._capture: Capture | None = None
        self._texts: list[str] = []

    @property
    @abstractmethod
    def _count(self) -> int:
        """The number of layers that are edited where none are named."""

    @abstractmethod
    def _edit(self, model: nn.Module, moments: KeyMoments, prefixes: list[str]) -> KnowledgeEdit:
        """Compute the edit."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._tokenizer = getattr(pl_module, "tokenizer", None)
        if stage == "fit":
            if self._tokenizer is None:
                raise ValueError(
                    f"{type(self).__name__} turns facts into tokens, but {type(pl_module).__name__} has no attribute "
                    "tokenizer: set it."
                )
            check_facts(self._tokenizer, self.facts)
        super().setup(trainer, pl_module, stage)

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        if self.layers is None:  # which ones is known when the edit is computed
            count = len(memory_sites(backbone, within=self.within))
            layers = list(range(count))[max(count // 6 - self._count + 1, 0) : count // 6 + 1]
        else:
            layers = self.layers
        sites = memory_sites(backbone, layers, self.within)
        return lora_config(backbone, [site.name for site in sites], len(self.facts))

    def begin(self, stack: AdapterStack) -> None:
        layers = self.layers
        if layers is None:
            self.trace_ = causal_trace(stack.backbone, self._tokenizer, self.facts, seed=self.seed, within=self.within)
            layers = choose_layers(self.trace_, self._count)
        self._moments = KeyMoments(memory_sites(stack.backbone, layers, self.within))
        self._texts = []
        self._capture = Capture(stack.backbone, self._moments.sites, "all").__enter__()

    def observe(self, batch: Mapping[str, Tensor]) -> None:
        assert self._capture is not None and self._moments is not None
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        self._moments.update(self._capture(ids, mask))
        if len(self._texts) < _KEPT_TEXTS:
            real = torch.ones_like(ids) if mask is None else mask
            rows = [row[row_mask.bool()].tolist() for row, row_mask in zip(ids, real, strict=True)]
            self._texts += self._tokenizer.batch_decode(rows, skip_special_tokens=True)

    def compute(self, stack: AdapterStack, trainer: L.Trainer) -> None:
        assert self._capture is not None and self._moments is not None
        moments = self._moments
        self._capture.__exit__(None, None, None)
        moments.gather()

        def make() -> KnowledgeEdit:
            return self._edit(stack.backbone, moments, self._contexts())

        self.edit_ = edit = from_rank_zero(trainer, make)
        adapter = edit.adapter(stack.backbone)
        stack.put(self.name, adapter)
        numbers = float(sum(tensor.numel() for tensor in adapter.tensors.values()))
        trainer.lightning_module.log("edited_parameters", numbers, rank_zero_only=True)

    def _contexts(self) -> list[str]:
        """Return what stands before the prompt: nothing first, then the given texts or excerpts of those seen."""
        if isinstance(self.prefixes, int):
            return random_prefixes(self._texts, self.prefixes, _PREFIX_WORDS, self.seed)
        return ["", *self.prefixes]

    def end(self) -> None:
        self._moments, self._texts = None, []
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
            self._capture = None


def _check_prefixes(prefixes: int | list[str]) -> None:
    if isinstance(prefixes, int):
        if prefixes < 0:
            raise ValueError(f"prefixes must be at least 0, got {prefixes}.")
    elif wrong := [prefix for prefix in prefixes if not isinstance(prefix, str) or not prefix.strip()]:
        raise ValueError(f"prefixes must be a number or texts, got {wrong[0]!r}: the bare prompt is used without it.")


class ROME(KnowledgeEditing):
    """Rank-one model editing (Meng et al. 2022, arXiv:2202.05262): rewrite facts in one feed-forward matrix.

    `trainer.fit` reads the covariance of the layer's keys from the training batches' text, searches for each fact the
    value that makes the model say the new object, and installs a LoRA adapter of rank 1 a fact that gives it. The
    module needs its `tokenizer`.

    Args:
        facts: a JSON file (see `lightning_peft.editing.facts.read_facts`), a list of `Fact`, or None: this package's.
        numbers: which facts of the file, from 0; default all.
        layer: which block, from 0; default by causal tracing of the facts.
        v_num_grad_steps, v_lr, v_weight_decay, clamp_norm_factor, kl_factor: how a value is searched for, see
            `lightning_peft.editing.facts.Search`; the authors' names and defaults.
        shrinkage: of the covariance towards a multiple of the identity, in [0, 1].
        prefixes: how many excerpts of the text keys and values are averaged over, beside none; or the texts to put
            before the prompt, each as a sentence of its own.
        seed: of the excerpts and of the trace's noise.
        reference: compute the edit as the authors' code does, where that differs (see docs/methods/rome.md).
        within: the part of the model whose blocks are meant, see `lightning_peft.backbone.language_model`; default the
            language model.

    Attributes:
        edit_: the computed `KnowledgeEdit` after `fit`.
        trace_: `[layers]`, the causal trace, where the layer was chosen by it.

    Raises:
        ValueError: in one sentence: no tokenizer, a fact that cannot be told in tokens, no such layer, a quantised
            layer, a covariance that is singular.
    """

    default_name = "rome"

    def __init__(
        self,
        facts: str | Path | list[Fact] | None = None,
        numbers: list[int] | None = None,
        layer: int | None = None,
        v_num_grad_steps: int = 20,
        v_lr: float = 0.5,
        v_weight_decay: float = 0.5,
        clamp_norm_factor: float = 4.0,
        kl_factor: float = 0.0625,
        shrinkage: float = 0.01,
        prefixes: int | list[str] = 5,
        seed: int = 0,
        reference: bool = False,
        within: str | None = None,
        **options: Unpack[EditOptions],
    ) -> None:
        search = Search(v_num_grad_steps, v_lr, v_weight_decay, clamp_norm_factor, kl_factor)
        layers = None if layer is None else [layer]
        super().__init__(facts, numbers, layers, search, shrinkage, prefixes, seed, reference, within, **options)

    @property
    def _count(self) -> int:
        return 1

    def _edit(self, model: nn.Module, moments: KeyMoments, prefixes: list[str]) -> KnowledgeEdit:
        settings = (prefixes, self.search, self.shrinkage, self.reference)
        return compute_rome(model, self._tokenizer, self.facts, moments, *settings)


class MEMIT(KnowledgeEditing):
    """Mass-editing memory (Meng et al. 2023, arXiv:2210.07229): rewrite many facts at once, over several layers.

    As `ROME`, but the values are written by least squares against what the layers hold already, each layer taking its
    share; the LoRA adapter has the rank of the number of facts on each layer.

    Args:
        facts, numbers, shrinkage, prefixes, seed, reference, within: as `ROME`.
        layers: which blocks, from 0, ascending; default five that end where the causal trace is largest.
        mom2_update_weight: λ, how much what is held already counts; default the keys' width.
        v_num_grad_steps, v_lr, v_weight_decay, clamp_norm_factor, kl_factor: as `ROME`; the bound is here in norms of
            the residual stream.

    Attributes:
        edit_, trace_: as `ROME`.

    Raises:
        ValueError: as `ROME`.
    """

    default_name = "memit"

    def __init__(
        self,
        facts: str | Path | list[Fact] | None = None,
        numbers: list[int] | None = None,
        layers: list[int] | None = None,
        mom2_update_weight: float | None = None,
        v_num_grad_steps: int = 20,
        v_lr: float = 0.5,
        v_weight_decay: float = 0.5,
        clamp_norm_factor: float = 0.75,
        kl_factor: float = 0.0625,
        shrinkage: float = 0.01,
        prefixes: int | list[str] = 5,
        seed: int = 0,
        reference: bool = False,
        within: str | None = None,
        **options: Unpack[EditOptions],
    ) -> None:
        if layers is not None and layers != sorted(set(layers)):
            raise ValueError(f"The layers must be given in ascending order, each once, but they are {layers}.")
        search = Search(v_num_grad_steps, v_lr, v_weight_decay, clamp_norm_factor, kl_factor)
        super().__init__(facts, numbers, layers, search, shrinkage, prefixes, seed, reference, within, **options)
        if mom2_update_weight is not None and mom2_update_weight <= 0:
            raise ValueError(f"mom2_update_weight must be above 0, got {mom2_update_weight}.")
        self.mom2_update_weight = mom2_update_weight

    @property
    def _count(self) -> int:
        return 5

    def _edit(self, model: nn.Module, moments: KeyMoments, prefixes: list[str]) -> KnowledgeEdit:
        settings = (prefixes, self.search, self.shrinkage, self.mom2_update_weight)
        given = (model, self._tokenizer, self.facts, moments, *settings)
        return compute_memit(*given, reference=self.reference)
