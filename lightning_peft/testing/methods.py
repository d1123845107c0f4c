"""The methods the laws are run on, each with the closed formula for the number of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn

from lightning_peft import callbacks as c
from lightning_peft.backbone.heads import head_sites
from lightning_peft.backbone.structure import width
from lightning_peft.backbone.targets import Layers
from lightning_peft.backbone.task_heads import task_heads
from lightning_peft.testing.counts import (
    adalora_matrices,
    attention_inputs,
    biases,
    every,
    everything,
    ia3,
    last_blocks,
    last_mlp,
    linear,
    matrices,
    parts,
    prefixes,
    query_and_value,
    strata,
)

Count = Callable[[Any], int]  # of the bare backbone


@dataclass(frozen=True)
class Method:
    """A method as the table runs it.

    Args:
        make: builds the callback.
        formula: the number of trainable parameters, given the bare backbone.
        needs: what an architecture must have, see `Architecture.has`.
        prepare: what is done to the module before anything else, and belongs to the base.
    """

    make: Callable[[], c.AdapterCallback]
    formula: Count | None = None
    needs: frozenset[str] = frozenset()
    prepare: Callable[[L.LightningModule], object] | None = None

    def count(self, module: L.LightningModule) -> int:
        """The formula for a module of `Architecture`, and the whole of a task head inside its backbone."""
        assert self.formula is not None
        backbone = copy.deepcopy(module.get_submodule("backbone"))
        heads = {name: backbone.get_submodule(name) for name in task_heads(backbone)}
        for name in heads:
            backbone.set_submodule(name, nn.Identity())
        return self.formula(backbone) + sum(p.numel() for head in heads.values() for p in head.parameters())


def _in_four_bits(module: L.LightningModule) -> None:
    c.Quantize(backbone="backbone").apply(module)


def _unmerged(callback: c.AdapterCallback) -> c.AdapterCallback:
    """A method that can be merged, but not into quantised weights."""
    callback.exempt = {"merge": "what is written into quantised weights is rounded again"}
    return callback


def _sum(term: Callable[[int, int], int], of: Callable[[nn.Module], list[tuple[int, int]]] = matrices) -> Count:
    """The sum of a term in the inputs and outputs of each matrix, or of each part from its first to its last."""
    return lambda backbone: sum(term(inputs, outputs) for inputs, outputs in of(backbone))


def _add(*counts: Count) -> Count:
    return lambda backbone: sum(count(backbone) for count in counts)


def _all_parts(backbone: nn.Module) -> list[tuple[int, int]]:
    return parts(backbone, attention=True)


WHERE: dict[str, Any] = {"backbone": "backbone"}
ATTENTION, MLP = frozenset({"attention"}), frozenset({"mlp"})
TRANSFORMERS = ATTENTION | {"transformers"}
R, M = 2, 4  # rank, width of a bottleneck
METHODS: dict[str, Method] = {
    "LoRA": Method(lambda: c.LoRA(r=R, alpha=4, **WHERE), _sum(lambda i, o: R * (i + o))),
    "rsLoRA": Method(lambda: c.LoRA(r=R, alpha=4, variant="rslora", **WHERE), _sum(lambda i, o: R * (i + o))),
    "DoRA": Method(lambda: c.LoRA(r=R, alpha=4, variant="dora", **WHERE), _sum(lambda i, o: R * (i + o) + o)),
    "LoRA of the last layer's MLP": Method(
        lambda: c.LoRA(r=R, alpha=4, layers=Layers(last=1), within="mlp", **WHERE),
        lambda b: last_mlp(b, R),
    ),
    "AdaLoRA": Method(
        lambda: c.AdaLoRA(init_r=4, target_r=2, total_steps=4, **WHERE),
        _sum(lambda i, o: 4 * (i + o + 1), adalora_matrices),
    ),
    "IA3": Method(lambda: c.IA3(**WHERE), ia3),
    "SSL": Method(lambda: c.SSL(**WHERE), _sum(lambda i, _: i, linear)),
    "SSB": Method(lambda: c.SSB(**WHERE), _sum(lambda i, o: i + o, linear)),
    "PromptTuning": Method(
        lambda: c.PromptTuning(num_virtual_tokens=3, **WHERE),
        lambda b: 3 * width(b),
        TRANSFORMERS | {"tokens"},
    ),
    "PTuning": Method(
        lambda: c.PTuning(num_virtual_tokens=3, encoder_hidden_size=M, **WHERE),
        lambda b: 3 * width(b) + 2 * width(b) * M + M * M + 2 * M + width(b),
        TRANSFORMERS | {"tokens"},
    ),
    "PrefixTuning": Method(
        lambda: c.PrefixTuning(num_virtual_tokens=3, **WHERE),
        lambda b: 2 * 3 * sum(w for w, _ in prefixes(b)[-b.config.num_hidden_layers :]),
        TRANSFORMERS | {"decoder"},
    ),
    "QLoRA": Method(
        lambda: c.QLoRA(r=R, alpha=4, dropout=0.0, **WHERE),
        _sum(lambda i, o: R * (i + o), every),
        prepare=_in_four_bits,
    ),
    "IA3 in 4 bits": Method(lambda: _unmerged(c.IA3(**WHERE)), ia3, prepare=_in_four_bits),
    "Pfeiffer in 4 bits": Method(
        lambda: c.Pfeiffer(size=M, **WHERE), _sum(lambda _, o: 2 * o * M + M + o, parts), MLP, prepare=_in_four_bits
    ),
    "Houlsby": Method(lambda: c.Houlsby(size=M, **WHERE), _sum(lambda _, o: 2 * o * M + M + o, _all_parts), MLP),
    "Pfeiffer": Method(lambda: c.Pfeiffer(size=M, **WHERE), _sum(lambda _, o: 2 * o * M + M + o, parts), MLP),
    "ParallelAdapter": Method(
        lambda: c.ParallelAdapter(size=M, **WHERE), _sum(lambda i, o: i * M + M + M * o + o, parts), MLP
    ),
    "ScaledParallelAdapter": Method(
        lambda: c.ScaledParallelAdapter(size=M, **WHERE), _sum(lambda i, o: i * M + M + M * o + o, parts), MLP
    ),
    "AdapterPlus": Method(
        lambda: c.AdapterPlus(size=M, init="lora", drop_path=0.0, **WHERE),
        _sum(lambda _, o: 2 * o * M + M + 2 * o, parts),
        MLP,
    ),
    "Compacter": Method(
        lambda: c.Compacter(n=4, size=M, **WHERE), _add(lambda _: 4**3, _sum(lambda _, o: 3 * (o + M), _all_parts)), MLP
    ),
    "CompacterPlusPlus": Method(
        lambda: c.CompacterPlusPlus(n=4, size=M, **WHERE),
        _add(lambda _: 4**3, _sum(lambda _, o: 3 * (o + M), parts)),
        MLP,
    ),
    "AttentionPrefix": Method(
        lambda: c.AttentionPrefix(length=3, **WHERE), lambda b: sum(2 * 3 * w + 1 for w, _ in prefixes(b)), TRANSFORMERS
    ),
    "MAM": Method(
        lambda: c.MAM(prefix_length=3, size=M, **WHERE),
        _add(lambda b: sum(2 * 3 * w + 1 for w, _ in prefixes(b)), _sum(lambda i, o: i * M + M + M * o + o, parts)),
        TRANSFORMERS | MLP,
    ),
    "UniPELT": Method(
        lambda: c.UniPELT(r=R, prefix_length=3, size=M, **WHERE),
        _add(
            _sum(lambda i, o: R * (i + o) + i + 1, query_and_value),
            _sum(lambda _, o: 2 * o * M + M + o + o + 1, parts),
            lambda b: sum(2 * 3 * w + 1 + i + 1 for w, i in prefixes(b)),
        ),
        TRANSFORMERS | MLP,
    ),
    "FullFineTuning": Method(lambda: c.FullFineTuning(**WHERE), everything),
    "TopLayers": Method(lambda: c.TopLayers(k=1, head=False, final_norm=False, **WHERE), last_blocks),
    "BitFit": Method(lambda: c.BitFit(add_missing=True, **WHERE), biases),
    "LTSFT": Method(lambda: c.LTSFT(density=0.05, full_steps=1, **WHERE), everything),
    "LotteryTicket": Method(lambda: c.LotteryTicket(rounds=1, round_steps=1, **WHERE), everything),
    "Strata": Method(
        lambda: c.Strata(boundaries=(1, 2), r=R, add_missing=True, **WHERE), lambda b: strata(b, R), ATTENTION | MLP
    ),
    "HeadOffsets": Method(lambda: c.HeadOffsets(**WHERE), lambda b: sum(attention_inputs(b)), TRANSFORMERS),
    "LayerOffsets": Method(
        lambda: c.LayerOffsets(**WHERE), _sum(lambda _, o: o, parts), TRANSFORMERS | MLP | {"decoder"}
    ),
    "LayerOffsets of feed-forward parts": Method(
        lambda: c.LayerOffsets(sites="mlp", **WHERE), _sum(lambda _, o: o, parts), MLP
    ),
    "LayerOffsets of answers": Method(
        lambda: c.LayerOffsets(positions="answer", **WHERE),
        _sum(lambda _, o: o, parts),
        TRANSFORMERS | {"position_ids"},
    ),
    "HeadOffsets of answers": Method(
        lambda: c.HeadOffsets(positions="answer", **WHERE),
        lambda b: sum(attention_inputs(b)),
        TRANSFORMERS | {"position_ids"},
    ),
    "HeadGains": Method(
        lambda: c.HeadGains(**WHERE), lambda b: sum(site.num_heads for site in head_sites(b)), TRANSFORMERS
    ),
    "LoFiT": Method(
        lambda: c.LoFiT(share=0.5, select_steps=1, **WHERE), lambda b: sum(attention_inputs(b)), TRANSFORMERS
    ),
}
