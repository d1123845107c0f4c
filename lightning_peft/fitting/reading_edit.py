"""Edits that read labelled texts: a place and a formula, in `fit` or without a Trainer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.backbone.evaluating import frozen
from lightning_peft.backbone.heads import HeadSite
from lightning_peft.backbone.layers import LayerSite
from lightning_peft.backbone.modules import uncompiled
from lightning_peft.editing.capture import Capture
from lightning_peft.editing.intervals import wilson
from lightning_peft.effects.slices import TextSettings
from lightning_peft.fitting.adapter_callback import EditOptions
from lightning_peft.fitting.batch_keys import check_keys, check_vocabulary, column, labels_and_groups
from lightning_peft.fitting.edit import Edit, from_rank_zero, gather
from lightning_peft.fitting.find_backbone import find_backbone
from lightning_peft.fitting.seen_texts import SeenTexts
from lightning_peft.fitting.strength_within import (
    StrengthWithin,
    check_max_kl,
    check_measurable,
    strength_within,
    warn_of,
)
from lightning_peft.stack.adapter import Adapter
from lightning_peft.stack.computed import ComputedAdapter
from lightning_peft.stack.configs import with_scale
from lightning_peft.stack.outer_generate import heed_outer_generate
from lightning_peft.stack.stack import AdapterStack, stack_of

if TYPE_CHECKING:
    from lightning_peft.stack.configs import PeftConfig  # as in lora.py


Tokenizer = Callable[..., Mapping[str, Any]]
S = TypeVar("S", HeadSite, LayerSite)


class StrengthOptions(EditOptions, total=False):
    """The arguments of every edit whose strength may be found by what it costs, besides those of its method.

    Args:
        backbone, name, strict_base, report: as `EditOptions`.
        max_kl: the budget of KL(base ‖ adapted) on neutral text, in nats a token. The strength is then the largest
            within it, up to the one that is asked for; the adapter's record says how it was found. Default: the
            strength asked for, whatever it costs. See `lightning_peft.strength_within`.
        kl_texts: the texts of `max_kl`: strings, rows of tokens, or `TextSettings`, which say how much of neutral text
            is drawn, and whose. Default: 1,024 tokens of the package's prose.
    """

    max_kl: float | None
    kl_texts: TextSettings | list[str] | list[list[int]] | None


class ReadingOptions(StrengthOptions, total=False):
    """The arguments of every edit that reads labelled texts, besides those of its method.

    Args:
        backbone, name, strict_base, report, max_kl, kl_texts: as `StrengthOptions`.
        label_key: the key of a batch under which it says which texts are wanted: 1 for those that are (true), 0 for
            those that are not, `[B]`. Default `"label"`.
        group_key: the key under which it says which texts belong together when they are split or paired, as those about
            one question: integers `[B]`. Default `"group"`.
        within: the part of the model whose layers or heads are read and moved: `"vision"`, `"audio"`, `"all"`, or a
            submodule's name such as `"model.visual"`. Default the language model, of one that sees or hears too.
    """

    label_key: str
    group_key: str
    within: str | None


class ReadingEdit(Edit, Generic[S]):
    """Base of the edits that read sites at the last token of labelled texts and compute an adapter from that.

    A subclass says where it reads (`find_sites`), which adapter it is before anything is computed (`empty_config`) and
    the formula (`edit`). Batches hold `input_ids [B, T]`, `attention_mask [B, T]`, `label [B]` (0 or 1) and
    `group [B]` (an integer: texts that belong together), the last two under the names that `label_key` and `group_key`
    give.

    Args:
        label_key, group_key, within, **options: see `ReadingOptions`.

    Attributes:
        edit_: after `fit` the result that `edit` keeps there, on every rank.
        strength_: the `StrengthWithin` that was found for `max_kl`; None without.

    Example:
        >>> from lightning_peft.editing import caa_vectors, layer_offsets_config, layer_sites
        >>> from lightning_peft.stack.computed import saved_key
        >>> class MiddleLayer(ReadingEdit):
        ...     default_name = "middle"
        ...     def find_sites(self, backbone):
        ...         sites = layer_sites(backbone, "block")
        ...         return sites[len(sites) // 2 :][:1]
        ...     def empty_config(self, sites):
        ...         return layer_offsets_config(sites, alpha=2.0)
        ...     def edit(self, activations, label, group, sites):
        ...         vectors = caa_vectors(activations, label, group)
        ...         keys = [saved_key(site.name, "layer_edits.layer_offsets") for site in sites]
        ...         return ComputedAdapter(self.empty_config(sites), dict(zip(keys, vectors[:, None])))
    """

    batch_keys: tuple[str, ...] = ("input_ids", "label", "group")
    batch_size = 16  # texts of a call, without a Trainer

    def __init__(
        self,
        *,
        label_key: str = "label",
        group_key: str = "group",
        max_kl: float | None = None,
        kl_texts: TextSettings | list[str] | list[list[int]] | None = None,
        within: str | None = None,
        **options: Unpack[EditOptions],
    ) -> None:
        check_max_kl(max_kl)
        super().__init__(**options)
        self.max_kl, self.kl_texts, self.within = max_kl, kl_texts, within
        self.strength_: StrengthWithin | None = None
        self.label_key, self.group_key = label_key, group_key
        names = {"label": label_key, "group": group_key}
        self.batch_keys = tuple(names.get(key, key) for key in self.batch_keys)
        self.edit_: Any = None
        self._sites: Sequence[S] = []
        self._capture: Capture | None = None
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._texts = SeenTexts()
        self._held: list[Mapping[str, Tensor]] = []  # batches not read yet, all of one label
        self._labels: set[int] = set()

    # -- what a subclass says ----------------------------------------------------------------------------------------

    @abstractmethod
    def find_sites(self, backbone: nn.Module) -> Sequence[S]:
        """Return the sites to read, all of one shape."""

    @abstractmethod
    def empty_config(self, sites: Sequence[S]) -> PeftConfig:
        """Return the configuration before anything is computed."""

    @abstractmethod
    def edit(self, activations: Tensor, label: Tensor, group: Tensor, sites: Sequence[S]) -> ComputedAdapter:
        """Compute the adapter; in a distributed `fit` on rank 0 alone.

        Args:
            activations: `[N, S, width]`, or `[N, S, heads, head_dim]` of heads, float32 on the CPU.
            label: `[N]`, 0 or 1.
            group: `[N]`, integers.
            sites: the S sites.
        """

    # -- in fit ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if (
            stage == "fit"
            and self.max_kl is not None
            and self._text_tokenizer(pl_module) is None
            and self._needs_tokenizer
        ):
            raise ValueError(
                f"{type(self).__name__}(max_kl={self.max_kl:g}) measures text, but {type(pl_module).__name__} has no "
                "attribute tokenizer: set it, or give kl_texts as rows of tokens."
            )
        super().setup(trainer, pl_module, stage)

    def make_config(self, backbone: nn.Module) -> PeftConfig:
        self._sites = self.find_sites(backbone)
        config: Any = self.empty_config(self._sites)
        if self.max_kl is not None:
            check_measurable(backbone)
            with_scale(config, 0.5)  # raises where the method has no dial
            config.by_default = ("alpha", "lora_alpha")  # an adapter that is there has the strength that was found
        return config

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        meanings = {self.label_key: "label", self.group_key: "group"}
        check_keys(type(self).__name__, self.batch_keys, batch, meanings)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def begin(self, stack: AdapterStack) -> None:
        self._capture = Capture(stack.backbone, self._sites).__enter__()

    def observe(self, batch: Mapping[str, Tensor]) -> None:
        # data of one label alone are refused before anything is read; ranks, though, must call a model equally often
        label, _ = self._columns(batch)
        self._held.append(batch)
        self._labels |= set(label.tolist()) if not self._rows else set()
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several or len(self._labels) > 1:
            for held in self._held:
                self._note_answers(held)
                self._rows.append(self._read(held))
            self._held = []

    def _read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        assert self._capture is not None
        label, group = self._columns(batch)
        check_vocabulary(type(self).__name__, self._capture.backbone, batch["input_ids"])
        self._texts.note(batch["input_ids"], batch.get("attention_mask"), label)
        activations = self._capture(batch["input_ids"], batch.get("attention_mask"))
        return activations, label.cpu(), group.cpu()

    def _columns(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return labels_and_groups(type(self).__name__, batch, self.label_key, self.group_key)

    def compute(self, stack: AdapterStack, trainer: L.Trainer) -> None:
        if self._held:
            raise ValueError(
                f"Statements of both classes are needed, {self.label_key} 0 and 1; the values given are "
                f"{sorted(self._labels)}: let the training data hold texts that are not wanted beside those that are."
            )
        rows = self.gather_rows(stack, trainer)

        def make() -> tuple[ComputedAdapter, Any]:
            return self.edit(*rows, self._sites), self.edit_

        adapter, self.edit_ = from_rank_zero(trainer, make)
        stack.put(self.name, adapter)
        module = trainer.lightning_module
        if self.max_kl is not None:
            self._stop_reading()
            tokenizer = self._text_tokenizer(module)
            self.limit(stack, adapter, tokenizer, lambda kl: from_rank_zero(trainer, lambda: kl))
            assert self.strength_ is not None
            module.log("edit_scale", self.strength_.scale, rank_zero_only=True)
            module.log("edit_kl", self.strength_.kl, rank_zero_only=True)
        module.log("edited_parameters", float(self.count(adapter)), rank_zero_only=True)

    def limit(
        self,
        stack: AdapterStack,
        made: ComputedAdapter,
        tokenizer: Any,
        share: Callable[[float], float] = float,
    ) -> Adapter:
        """Put the computed adapter on in place of itself, with the largest strength that is within `max_kl`.

        Args:
            stack: with the adapter on it.
            made: the adapter at the strength asked for.
            tokenizer: for `kl_texts`, where they are strings.
            share: as of `strength_within`.
        """
        assert self.max_kl is not None
        found = self.strength_ = strength_within(
            stack.backbone, self.max_kl, tokenizer, self.name, self.kl_texts, share=share
        )
        config: Any = with_scale(made.config, found.scale)
        asked = getattr(made.config, "alpha", 1.0)
        warn_of(found, self.name, asked)
        config.by_default = ("alpha", "lora_alpha")
        record = {**made.record, "max_kl": found.record(asked)}
        return stack.put(self.name, ComputedAdapter(config, made.tensors, record))

    def report_lines(
        self, module: L.LightningModule, stack: AdapterStack, names: Sequence[str]
    ) -> tuple[list[tuple[str, str]], str]:
        lines, advice = super().report_lines(module, stack, names)
        record = stack[self.name].record
        if isinstance(within := record.get("max_kl"), Mapping):
            share = f"{within['strength']:.4g} of the {within['asked']:g} asked for"
            lines.append(("strength", f"{share}, within max_kl={within['budget']:g} on its texts"))
        if (accuracy := getattr(self.edit_, "accuracy", None)) is not None and self._done:
            lines.append(("probes", describe_accuracy(accuracy, self.edit_.record)))
        if self.max_kl is None:
            advice = f"{advice[:-1]}, and {type(self).__name__}(max_kl=0.5) takes the largest strength within a budget."
        return lines, advice

    @property
    def _needs_tokenizer(self) -> bool:
        texts = self.kl_texts
        return texts is None or isinstance(texts, TextSettings) or any(isinstance(text, str) for text in texts)

    def _text_tokenizer(self, module: L.LightningModule) -> Any:
        """Return the tokenizer of texts that are not in the batches; None where there is none."""
        return getattr(module, "tokenizer", None)

    def count(self, made: ComputedAdapter) -> int:
        """Return how many numbers were computed."""
        return sum(tensor.numel() for tensor in made.tensors.values())

    def gather_rows(self, stack: AdapterStack, trainer: L.Trainer) -> tuple[Tensor, Tensor, Tensor]:
        """Return activations, label and group of all texts that were read, by whichever rank."""
        self._texts.check(type(self).__name__)
        activations, label, group = gather(trainer, *(torch.cat(column) for column in zip(*self._rows, strict=True)))
        return activations, label, group

    def read(
        self,
        backbone: nn.Module,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        label: Tensor,
        group: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return activations, label and group of texts, without a Trainer."""
        if not texts:
            raise ValueError("There is no text to read: give texts of both labels.")
        device, activations = next(backbone.parameters()).device, []
        with Capture(backbone, self._sites) as capture:
            for begin in range(0, len(texts), self.batch_size):
                encoded = tokenizer(list(texts[begin : begin + self.batch_size]))["input_ids"]
                rows = [torch.tensor(row, dtype=torch.long) for row in encoded]
                if empty := [i for i, row in enumerate(rows, begin) if not len(row)]:
                    raise ValueError(f"Text {empty[0]}, {texts[empty[0]]!r}, has no token to read: leave it out.")
                ids, mask = (pad_sequence(x, batch_first=True) for x in (rows, list(map(torch.ones_like, rows))))
                check_vocabulary(type(self).__name__, backbone, ids)
                self._texts.note(ids, mask, label[begin : begin + len(rows)])
                activations.append(capture(ids.to(device), mask.to(device)))
        self._texts.check(type(self).__name__)
        return torch.cat(activations), label.cpu(), group.cpu()

    def end(self) -> None:
        self._rows, self._held, self._labels, self._texts = [], [], set(), SeenTexts()
        self._stop_reading()

    def _stop_reading(self) -> None:
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
            self._capture = None


def describe_accuracy(accuracy: Tensor, record: Mapping[str, Any]) -> str:
    """Say how well probes tell labels apart on held-out groups, with Wilson's interval of the best one.

    Its n is the number of groups, since statements of one group are not independent; being the best of many, it is
    likely to be somewhat worse on others.

    Args:
        accuracy: `[layers, heads]`.
        record: of the edit, with its `validation_questions` and chosen `heads`.

    Example:
        >>> describe_accuracy(torch.tensor([[0.5, 0.9]]), {"validation_questions": 10, "heads": [[0, 1]]})
        'best head 0.90 [0.60, 0.98] on 10 held-out groups, the best of 2; the chosen 1 on average 0.90'
    """
    best, groups = float(accuracy.max()), int(record["validation_questions"])
    low, high = wilson(best, groups)
    chosen = [float(accuracy[layer, head]) for layer, head in record["heads"]]
    mean = f"the chosen {len(chosen)} on average {sum(chosen) / len(chosen):.2f}"
    interval = f"{best:.2f} [{low:.2f}, {high:.2f}]"
    return f"best head {interval} on {groups} held-out groups, the best of {accuracy.numel()}; {mean}"


def edit(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    label: Sequence[int] | Tensor,
    group: Sequence[int] | Tensor,
    method: ReadingEdit[Any],
) -> Adapter:
    """Read labelled texts, compute an adapter from them and put it on a model: `fit` without Trainer and data module.

    The result equals that of `fit` with the same texts in the same batches, bit for bit.

    Args:
        model: a transformers model, or a LightningModule that holds one; it is frozen, and adapters on it act.
        tokenizer: its tokenizer; texts are encoded as `tokenizer(texts)["input_ids"]`, and padded on the right.
        texts: N texts, such as `"Q: What is it? A: So."`; each is read at its last token.
        label: `[N]`, 1 for each text that is wanted (true), 0 for each that is not.
        group: `[N]`, the same number for texts that belong together, as to one question.
        method: such as `ITI(num_heads=48)`; its `edit_` is set, and it reads `batch_size` (16) texts a call.

    Returns:
        The adapter, on the model in place of one of its name; `adapters(model)` scales, switches and removes it.

    Raises:
        ValueError: lists of different lengths, a label that is neither 0 nor 1, or as the method's `fit`.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of texts, got the one text {texts[:60]!r}.")
    if not len(texts) == len(label) == len(group):
        raise ValueError(
            f"Each text needs one label and one group, but there are {len(texts)} texts, {len(label)} labels and "
            f"{len(group)} groups."
        )
    named = type(method).__name__
    columns = column(named, label, "label", len(texts)), column(named, group, "group", len(texts))
    backbone = model
    if isinstance(model, L.LightningModule):
        backbone = model.get_submodule(find_backbone(model, method.backbone) or "")
    stack = stack_of(uncompiled(backbone))
    method.make_config(stack.backbone)
    try:
        with frozen(stack.backbone), stack.disabled(method.name) if method.name in stack else nullcontext():
            rows = method.read(stack.backbone, tokenizer, texts, *columns)
        made = method.edit(*rows, method._sites)
        put = stack.put(method.name, made)
        adapter = put if method.max_kl is None else _limited(stack, made, tokenizer, method)
        heed_outer_generate(model)
        return adapter
    finally:
        method.end()


def _limited(stack: AdapterStack, made: ComputedAdapter, tokenizer: Tokenizer, method: ReadingEdit[Any]) -> Adapter:
    """Return the adapter within the method's budget; on an error it is taken off."""
    try:
        return method.limit(stack, made, tokenizer)
    except Exception:
        stack.remove(method.name)
        raise
