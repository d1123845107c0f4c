"""What the fixtures in `data/release-*` were made from, in names that releases share: their scripts and tests use it.

An entry's name is that of its folder, or of its checkpoint, in a release's fixtures. Only what is public is imported,
so that the same lines run on the release that writes a fixture and on the one that reads it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import statements
import torch
import tuning
from peft import (
    AdaptionPromptConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from statements import Statements
from tiny_models import VOCABULARY
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tuning import Net, points, texts

from lightning_peft import callbacks as c

FIRST = Path(__file__).parent / "data" / "release-68ae323"
QUERIES: dict[str, Any] = {"target_modules": ["q_proj"]}


def set_weights(module: nn.Module) -> None:
    """Give a module weights that are the same on every machine: fractions drawn as integers.

    The last bits of normal numbers depend on the processor, and with them the fingerprint that a folder holds.
    """
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randint(-32, 33, parameter.shape, generator=generator) / 64
            parameter.copy_(drawn / 2 if parameter.dim() > 1 else parameter.round() + drawn / 8)


class Classifier(tuning.Classifier):
    def __init__(self) -> None:
        super().__init__()
        set_weights(self)


class Language(tuning.Language):
    def __init__(self, kind: str = "llama") -> None:
        super().__init__(kind)
        set_weights(self)


class Module(statements.Module):
    def __init__(self, kind: str = "llama") -> None:
        super().__init__(kind)
        set_weights(self)


NET: dict[str, Any] = {"backbone": "net"}  # of `Classifier`, whose head stands outside of it
LAST: dict[str, Any] = {"layers": [2]}  # of three blocks: small files


def peft(config: Any) -> Callable[[], c.PEFT]:
    """Return what makes the callback for a method of peft that has none of its own."""
    return lambda: c.PEFT(config)


# a model's kind (`base`) and the callback; trained for four steps
TUNED: dict[str, tuple[str, Callable[[], c.PEFT]]] = {
    "lora": ("llama", lambda: c.LoRA(r=2)),
    "lora_gpt2": ("gpt2", lambda: c.LoRA(r=2, bias="lora_only", **LAST)),
    "lora_bert": ("bert", lambda: c.LoRA(r=2, **LAST)),
    "lora_opt_all_biases": ("opt", lambda: c.LoRA(r=2, bias="all", **LAST)),
    "lora_net": ("net", lambda: c.LoRA(r=2, **NET)),
    "rslora": ("llama", lambda: c.LoRA(r=2, variant="rslora", within="mlp", **LAST)),
    "dora": ("llama", lambda: c.LoRA(r=2, variant="dora", **LAST)),
    "pissa": ("llama", lambda: c.LoRA(r=2, init="pissa", **LAST)),
    "qlora": ("llama_nf4", lambda: c.QLoRA(r=2, dropout=0.0, **LAST)),
    "adalora": ("llama", lambda: c.AdaLoRA(init_r=3, target_r=1, total_steps=4, **LAST)),
    "ia3": ("llama", c.IA3),
    "prompt_tuning": ("llama", lambda: c.PromptTuning(num_virtual_tokens=3)),
    "p_tuning": ("llama", lambda: c.PTuning(num_virtual_tokens=3, encoder_hidden_size=4)),
    "prefix_tuning": ("gpt2", lambda: c.PrefixTuning(num_virtual_tokens=3)),
    "loha": ("llama", peft(LoHaConfig(r=2, **QUERIES))),
    "lokr": ("llama", peft(LoKrConfig(r=2, **QUERIES))),
    "oft": ("llama", peft(OFTConfig(oft_block_size=4, **QUERIES))),
    "vera": ("llama", peft(VeraConfig(r=4, **QUERIES))),
    "adaption_prompt": ("llama", peft(AdaptionPromptConfig(adapter_len=3, adapter_layers=1))),
    "ln_tuning": ("llama", peft(LNTuningConfig(target_modules=["input_layernorm"]))),
    "trainable_tokens": ("llama", peft(TrainableTokensConfig(token_indices=list(range(20, 30))))),
    "houlsby": ("llama", lambda: c.Houlsby(size=2)),
    "pfeiffer": ("gpt2", lambda: c.Pfeiffer(size=2, scaling="learned")),
    "parallel": ("llama", lambda: c.ParallelAdapter(size=2)),
    "scaled_parallel": ("llama", lambda: c.ScaledParallelAdapter(size=2)),
    "adapter_plus": ("llama", lambda: c.AdapterPlus(size=2, drop_path=0.0)),
    "compacter": ("llama", lambda: c.Compacter(n=2, size=2)),
    "compacter_plus_plus": ("llama", lambda: c.CompacterPlusPlus(n=2, size=2)),
    "attention_prefix": ("llama", lambda: c.AttentionPrefix(length=2)),
    "attention_prefix_gated": ("gpt2", lambda: c.AttentionPrefix(length=2, init="paper", gate=True)),
    "ssl": ("llama", c.SSL),
    "ssb": ("llama", lambda: c.SSB(**LAST)),
    "bitfit": ("gpt2", c.BitFit),
    "bitfit_new_biases": ("llama", lambda: c.BitFit(add_missing=True)),
    "full": ("llama", lambda: c.FullFineTuning(within="attention", **LAST)),
    "top_layers": ("gpt_neox", lambda: c.TopLayers(k=1, head=False)),
    "lt_sft": ("llama", lambda: c.LTSFT(density=0.05, full_steps=2, **LAST)),
    "ticket": ("net", lambda: c.LotteryTicket(rounds=1, round_steps=2, **NET)),
    "head_offsets": ("llama", lambda: c.HeadOffsets(positions="answer")),
    "head_gains": ("llama", c.HeadGains),
    "lofit": ("llama", lambda: c.LoFiT(share=0.5, select_steps=2)),
    "layer_offsets": ("gpt2", lambda: c.LayerOffsets(sites="mlp", positions="generated")),
    "mam": ("llama", lambda: c.MAM(prefix_length=2, size=2)),
    "unipelt": ("llama", lambda: c.UniPELT(r=2, prefix_length=2, size=2)),
    "strata": ("llama", lambda: c.Strata(boundaries=(1, 2), r=2, add_missing=True)),
}

# computed from `Statements()` in one pass
EDITED: dict[str, tuple[str, Callable[[], c.PEFT]]] = {
    "iti": ("llama", lambda: c.ITI(num_heads=3, alpha=5.0)),
    "iti_of_probes": (
        "gpt_neox",
        lambda: c.ITI(num_heads=3, direction="probe_weight", strength="accuracy", positions="generated[1:]"),
    ),
    "iti_adaptive": ("gpt2", lambda: c.ITI(num_heads=3, alpha=5.0, gate="adaptive", beta=0.1)),
    "caa": ("llama", lambda: c.CAA(layers=[0, 2], multiplier=-2.0)),
    "caa_prompt": ("opt", lambda: c.CAA(sites="mlp", positions="prompt[1:]")),
    "caa_conditional": ("llama", lambda: c.CAA(gate="conditional", threshold=0.4, positions="all")),
    "repe_adaptive": ("llama", lambda: c.RepE(layers="0:2", gate="adaptive", positions="answer[0:3]")),
    "act_add": ("llama", lambda: c.ActAdd("love", "hate it", coeff=3.0)),
    "ablation": ("llama", c.Ablation),
    "ablation_of_blocks": ("gpt2", lambda: c.Ablation(layer=1, sites="block", alpha=0.5, positions="generated")),
}


@dataclass(frozen=True)
class Training:
    """A training that a checkpoint interrupts.

    Args:
        make_module: builds the module, whose hyperparameters are in the checkpoint.
        make_callbacks: builds the callbacks.
        saved: the optimizer step after which the checkpoint is written.
        end: the step at which the training that goes on from it ends.
    """

    make_module: Callable[[], L.LightningModule]
    make_callbacks: Callable[[], Sequence[L.Callback]]
    saved: int
    end: int


# an epoch has four steps for `Classifier` and two for `Language`
TRAININGS: dict[str, Training] = {
    "head": Training(Classifier, lambda: [c.LoRA(r=2, **NET)], 4, 8),
    "average": Training(Classifier, lambda: [c.LoRA(r=2, **NET), c.AdapterEMA(0.7)], 4, 8),
    "biases": Training(Classifier, lambda: [c.BitFit(**NET)], 4, 8),
    "full": Training(Classifier, lambda: [c.FullFineTuning(**NET)], 4, 8),
    "lt_sft_dense_phase": Training(Classifier, lambda: [c.LTSFT(density=0.1, full_steps=6, **NET)], 4, 8),
    "lt_sft_sparse_phase": Training(Classifier, lambda: [c.LTSFT(density=0.1, full_steps=2, **NET)], 4, 8),
    "ticket_second_round": Training(Classifier, lambda: [c.LotteryTicket(rounds=2, round_steps=3, **NET)], 4, 12),
    "two_adapters": Training(Classifier, lambda: [c.LoRA(r=2, **NET), c.SSL(**NET)], 4, 8),
    "mam": Training(Language, lambda: [c.MAM(prefix_length=2, size=2)], 2, 4),
    "prompt": Training(Language, lambda: [c.PromptTuning(num_virtual_tokens=3)], 2, 4),
    "adalora": Training(Language, lambda: [c.AdaLoRA(init_r=3, target_r=1, total_steps=6, **LAST)], 4, 6),
    "lofit_selecting": Training(Language, lambda: [c.LoFiT(share=0.5, select_steps=3)], 2, 6),
    "lofit_selected": Training(Language, lambda: [c.LoFiT(share=0.5, select_steps=3)], 4, 6),
    "qlora": Training(Language, lambda: [c.QLoRA(r=2, dropout=0.0, **LAST)], 2, 4),
}
EDITED_CHECKPOINTS = ("iti", "caa_conditional", "act_add")  # of `EDITED`, and beside them "stack" and "rome"


def unpack(name: str, folder: Path) -> Path:
    """Unpack the first release's archive of that name into a folder; the folder with what was in it."""
    with tarfile.open(FIRST / f"{name}.tar.xz") as archive:
        archive.extractall(folder / name, filter="data")
    return folder / name


def data(module: L.LightningModule) -> DataLoader:
    """Return what a module is trained on."""
    if isinstance(module, Module):
        return Statements().loader()
    return texts() if isinstance(module, Language) else points()


def backbone(module: L.LightningModule) -> nn.Module:
    """Return the model that a module of these fixtures adapts."""
    return module.get_submodule({Classifier: "net", Language: "model", Module: "backbone"}[type(module)])


def module_for(kind: str) -> L.LightningModule:
    """Build the module that trains a kind of model: `"net"`, one of `tiny`, or with `"_nf4"` that one in 4 bits."""
    return Classifier() if kind == "net" else Language(kind.removesuffix("_nf4"))


def base(kind: str) -> nn.Module:
    """Build the model without adapters that a folder was made for."""
    module = module_for(kind)
    if kind.endswith("_nf4"):
        c.Quantize().apply(module)
    return backbone(module)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """Compute what a model, or a module of these fixtures, gives in evaluation: of a language model every eighth logit.

    The labels say where answers begin, for edits of certain tokens; transformers takes them for a loss, which is not
    looked at.
    """
    model.eval()
    if isinstance(model, Net | Classifier):
        return model(next(iter(points(batch_size=4)))[0])
    language: Any = backbone(model) if isinstance(model, L.LightningModule) else model
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    return language(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits[..., ::8].clone()
