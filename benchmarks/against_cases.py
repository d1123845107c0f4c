"""The adapters that `against.py` puts on tiny models: every tuned method and every edit, each with small settings.

The list is the comparison's own, so that two commits are given the same work whatever else differs between them. Of
the package it uses names that its documentation has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback

from lightning_peft import callbacks as c

Make = Callable[[], list[Callback]]  # looks the names up when it is called, so that a missing one costs one case

KINDS = ("llama", "gpt2")
QUANTIZED = {"QLoRA": "nf4", "int8 QLoRA": "int8", "Quantize, IA3": "nf4", "Quantize, Pfeiffer": "nf4"}  # their bases


def _facts() -> list[Any]:
    from lightning_peft.editing.facts import Fact

    return [
        Fact("he", "Who is {}? A:", "true", "false", ("Q: is {}",), ("she", "it")),
        Fact("she", "Q: Who is {}? A:", "false", "true", ("What is {}",), ("he",)),
    ]


def _lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")


def _iti(**options: Any) -> Make:
    return lambda: [c.ITI(**({"num_heads": 3, "alpha": 4.0} | options))]


_SEARCH: dict[str, Any] = {"v_num_grad_steps": 3, "clamp_norm_factor": 50.0, "shrinkage": 0.1}

TUNED: dict[str, Make] = {
    "PEFT": lambda: [c.PEFT(_lora_config())],
    "LoRA": lambda: [c.LoRA(r=2, alpha=4)],
    "LoRA with dropout": lambda: [c.LoRA(r=2, alpha=4, dropout=0.3)],
    "LoRA, backbone dropout": lambda: [c.LoRA(r=2, alpha=4, backbone_dropout=True)],
    "LoRA, gradient checkpointing": lambda: [c.LoRA(r=2, alpha=4, gradient_checkpointing=True)],
    "LoRA of the last MLP": lambda: [c.LoRA(r=2, alpha=4, layers=[2], within="mlp")],
    **{
        f"LoRA, {name}": lambda name=name: [c.LoRA(r=2, init=name)]
        for name in ("gaussian", "orthogonal", "mica", "eva")
    },
    "LoRA, pissa": lambda: [c.LoRA(r=2, init="pissa")],
    "rsLoRA": lambda: [c.LoRA(r=2, alpha=4, variant="rslora")],
    "DoRA": lambda: [c.LoRA(r=2, alpha=4, variant="dora")],
    "AdaLoRA": lambda: [c.AdaLoRA(init_r=4, target_r=2, total_steps=6)],
    "QLoRA": lambda: [c.QLoRA(r=2, alpha=4, dropout=0.0)],
    "int8 QLoRA": lambda: [c.QLoRA(r=2, alpha=4, dropout=0.0, quant_type="int8")],
    "Quantize, IA3": lambda: [c.Quantize(), c.IA3()],
    "Quantize, Pfeiffer": lambda: [c.Quantize(), c.Pfeiffer(size=4)],
    "IA3": lambda: [c.IA3()],
    "SSL": lambda: [c.SSL()],
    "SSB": lambda: [c.SSB()],
    "PromptTuning": lambda: [c.PromptTuning(num_virtual_tokens=3)],
    "PTuning": lambda: [c.PTuning(num_virtual_tokens=3, encoder_hidden_size=4)],
    "PrefixTuning": lambda: [c.PrefixTuning(num_virtual_tokens=3)],
    "PrefixTuning, projected": lambda: [
        c.PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=4)
    ],
    "AttentionPrefix": lambda: [c.AttentionPrefix(length=3)],
    "AttentionPrefix, paper, gated": lambda: [c.AttentionPrefix(length=3, init="paper", gate=True)],
    "Houlsby": lambda: [c.Houlsby(size=4)],
    **{
        f"Houlsby, {name}": lambda name=name: [c.Houlsby(size=4, init=name)]
        for name in ("mam", "bert", "houlsby", "glorot")
    },
    "Pfeiffer": lambda: [c.Pfeiffer(size=4)],
    "ParallelAdapter": lambda: [c.ParallelAdapter(size=4)],
    "ScaledParallelAdapter": lambda: [c.ScaledParallelAdapter(size=4)],
    "AdapterPlus": lambda: [c.AdapterPlus(size=4)],
    "Compacter": lambda: [c.Compacter(n=4, size=4)],
    "Compacter, glorot": lambda: [c.Compacter(n=4, size=4, init="glorot")],
    "CompacterPlusPlus": lambda: [c.CompacterPlusPlus(n=4, size=4)],
    "MAM": lambda: [c.MAM(prefix_length=3, size=4)],
    "UniPELT": lambda: [c.UniPELT(r=2, prefix_length=3, size=4)],
    "FullFineTuning": lambda: [c.FullFineTuning()],
    "TopLayers": lambda: [c.TopLayers(k=1)],
    "BitFit": lambda: [c.BitFit(add_missing=True)],
    "LTSFT": lambda: [c.LTSFT(density=0.05, full_steps=2)],
    "LotteryTicket": lambda: [c.LotteryTicket(rounds=1, round_steps=2)],
    "Strata": lambda: [c.Strata(boundaries=(1, 2), r=2, add_missing=True)],
    "Composite": lambda: [c.Composite({"a": c.LoRA(r=2), "b": c.Pfeiffer(size=4)})],
    "HeadOffsets": lambda: [c.HeadOffsets()],
    "HeadOffsets of answers": lambda: [c.HeadOffsets(positions="answer")],
    "HeadGains": lambda: [c.HeadGains()],
    "LoFiT": lambda: [c.LoFiT(share=0.5, select_steps=2)],
    "LayerOffsets": lambda: [c.LayerOffsets()],
    "LayerOffsets of answers": lambda: [c.LayerOffsets(positions="answer")],
    "LayerOffsets of feed-forward parts": lambda: [c.LayerOffsets(sites="mlp")],
    "AdapterEMA, LoRA": lambda: [c.LoRA(r=2, alpha=4), c.AdapterEMA(decay=0.5)],
    "TrunkCache, LoRA": lambda: [c.TrunkCache(), c.LoRA(r=2, alpha=4, layers=[2])],
}

EDITS: dict[str, Make] = {
    "ITI": _iti(),
    **{f"ITI, {name}": _iti(direction=name) for name in ("probe_weight", "ccs", "pca", "random")},
    "ITI, reference": _iti(reference=True),
    "ITI, question ends": _iti(question_ends=True),
    "ITI by accuracy": _iti(strength="accuracy"),
    "ITI of all tokens": _iti(positions="all"),
    "ITI, one head a layer": _iti(heads_per_layer=1),
    "adaptive ITI": _iti(gate="adaptive", beta=0.1),
    "conditional ITI": _iti(gate="conditional"),
    "CAA": lambda: [c.CAA(multiplier=2.0)],
    "CAA of attention": lambda: [c.CAA(multiplier=2.0, sites="attention", layers=[0, 2])],
    "CAA of all tokens": lambda: [c.CAA(multiplier=2.0, sites="mlp", positions="all")],
    "adaptive CAA": lambda: [c.CAA(multiplier=2.0, gate="adaptive", beta=0.1)],
    "conditional CAA": lambda: [c.CAA(multiplier=4.0, gate="conditional")],
    "RepE": lambda: [c.RepE(coeff=2.0)],
    "conditional RepE": lambda: [c.RepE(coeff=2.0, gate="conditional")],
    "ActAdd": lambda: [c.ActAdd("true", "false")],
    "ActAdd of answers": lambda: [c.ActAdd("true", "", coeff=2.0, positions="answer", layers=[1])],
    "Ablation": lambda: [c.Ablation()],
    **{f"Ablation of {name}": lambda name=name: [c.Ablation(sites=name)] for name in ("block", "attention", "mlp")},
    "ROME": lambda: [c.ROME(facts=_facts(), layer=1, prefixes=0, **_SEARCH)],
    "ROME with prefixes": lambda: [c.ROME(facts=_facts(), layer=1, prefixes=2, **_SEARCH)],
    "ROME, chosen layer": lambda: [c.ROME(facts=_facts(), prefixes=0, **_SEARCH)],
    "MEMIT": lambda: [c.MEMIT(facts=_facts(), layers=[0, 1], prefixes=0, **_SEARCH)],
}


def cases(section: str) -> dict[str, Make]:
    """Return the cases of `"edits"` or `"tuning"`: those above, and by its default arguments any method not in them."""
    return {"edits": EDITS, "tuning": TUNED}[section] | {
        method.__name__: lambda method=method: [method()]
        for method in _others()
        if issubclass(method, c.Edit) == (section == "edits")
    }


def _others() -> list[type[Callback]]:
    adapting = getattr(c, "AdapterCallback", c.PEFT)  # before 0.2 PEFT was the base of all
    used = {adapting, c.PEFT, c.Edit, getattr(c, "ReadingEdit", c.Edit)}
    for make in (*TUNED.values(), *EDITS.values()):
        with contextlib.suppress(AttributeError, TypeError):  # a commit may lack a name or an argument
            used |= {type(callback) for callback in make()}
    exported = [getattr(c, name) for name in c.__all__]
    return [one for one in exported if isinstance(one, type) and issubclass(one, adapting) and one not in used]
