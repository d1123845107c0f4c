"""Rows of the parity table: AdapterHub's `adapters`, by the numbers that `benchmarks/parity/adapterhub.py` wrote.

The base runs under this transformers, and must give what it gave under the older one. AdapterHub's parameters are
translated into ours as an import translates them, by operations that autograd knows: so our gradients become gradients
of AdapterHub's parameters, and are compared with its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from adapterhub_models import CLASSES, FOLDERS, base, inputs, logits_differ, numbers, relative, tokens
from parity.comparison import Comparison, Difference
from torch import Tensor, nn

from lightning_peft import adapters, callbacks
from lightning_peft.adapterhub.configs import methods
from lightning_peft.adapterhub.folder import read_adapter
from lightning_peft.adapterhub.importing import translated
from lightning_peft.adapterhub.places import Places
from lightning_peft.adapterhub.tensors import Tensors
from lightning_peft.fitting.adapter_callback import AdapterCallback

BACKBONE: Any = {"backbone": "backbone", "train_head": False}
LORA = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
LORA["vit"] = LORA["llama"]
IA3 = {
    "bert": ["key", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["k_proj", "v_proj", "down_proj"],
    "t5": ["k", "v", "wi"],
    "vit": ["k_proj", "v_proj", "fc1"],
}


@dataclass(frozen=True)
class Row:
    """A method of ours that is one of AdapterHub's.

    Args:
        name: as the table shows it.
        peer: AdapterHub's configuration.
        folder: in the fixtures.
        make: the callback for an architecture.
        notes: what differs by design, by architecture; under `""` for all.
        one_token: compare on rows of one token, except in a ViT, which has none.
        different_counts: architectures on which the numbers of trained parameters differ by design.
        left_out: ends of the names of parameters whose gradients are not comparable, by architecture.
    """

    name: str
    peer: str
    folder: str
    make: Callable[[str], AdapterCallback]
    notes: dict[str, str]
    one_token: bool = False
    different_counts: tuple[str, ...] = ()
    left_out: dict[str, tuple[str, ...]] | None = None


def _with_positions(kind: str, callback: callbacks.Composite) -> callbacks.Composite:
    """Let the prefix of a composite count in T5's positions, as AdapterHub's does."""
    prefix: Any = callback.methods["prefix"]
    prefix.count_positions = kind == "t5"
    return callback


def _prefix(kind: str) -> AdapterCallback:
    return callbacks.AttentionPrefix(3, init="paper", count_positions=kind == "t5", **BACKBONE)


def _mam(kind: str) -> AdapterCallback:
    return _with_positions(kind, callbacks.MAM(3, size=4, init="paper", **BACKBONE))


def _unipelt(kind: str) -> AdapterCallback:
    rank = 4 if kind == "gpt2" else 2
    return _with_positions(kind, callbacks.UniPELT(rank, prefix_length=3, reduction=4, init="paper", **BACKBONE))


def _lora(kind: str) -> AdapterCallback:
    blocks = 2 if kind == "gpt2" else 1
    return callbacks.LoRA(2 * blocks, alpha=4 * blocks, target_modules=LORA[kind], **BACKBONE)


_POSITIONS = {"t5": "count_positions=True, as AdapterHub's prefix shifts T5's positions"}
_COMPUTED_OUT = "AdapterHub's reparametrisation, with more parameters, is computed out"
_GATES = "AdapterHub's gate is a mean over tokens, ours each token's: compared on one token; on 7 logits differ by"
_UNIPELT = {
    "bert": f"{_GATES} 0.13",
    "gpt2": f"{_GATES} 0.14; LoRA's gates of queries and values are one, 1102 parameters instead of 880",
    "llama": f"{_GATES} 0.20",
    "t5": f"{_GATES} 0.21; {_POSITIONS['t5']}",
    "vit": "AdapterHub's gate is a mean over tokens, ours each token's: compared with constant gates",
}
ROWS = (
    Row(
        "Houlsby", "DoubleSeqBn", "houlsby", lambda kind: callbacks.Houlsby(4, **BACKBONE), {"t5": "cross_adapter=True"}
    ),
    Row("Pfeiffer", "SeqBn", "pfeiffer", lambda kind: callbacks.Pfeiffer(4, **BACKBONE), {}),
    Row("ParallelAdapter", "ParBn", "parallel", lambda kind: callbacks.ParallelAdapter(4, **BACKBONE), {}),
    Row(
        "AdapterPlus",
        "AdapterPlus",
        "adapter_plus",
        lambda kind: callbacks.AdapterPlus(4, drop_path=0.0, **BACKBONE),
        {},
    ),
    Row(
        "Compacter",
        "Compacter",
        "compacter",
        lambda kind: callbacks.Compacter(4, reduction=4, **BACKBONE),
        {"t5": "cross_adapter=True"},
    ),
    Row(
        "CompacterPlusPlus(reads='stream')",
        "Compacter++",
        "compacter++",
        lambda kind: callbacks.CompacterPlusPlus(4, reduction=4, reads="stream", **BACKBONE),
        {},
    ),
    Row("AttentionPrefix(init='paper')", "PrefixTuning(flat=True)", "prefix_flat", _prefix, _POSITIONS),
    Row(
        "AttentionPrefix(init='paper')",
        "PrefixTuning",
        "prefix",
        _prefix,
        {"": _COMPUTED_OUT, "t5": f"{_COMPUTED_OUT}; {_POSITIONS['t5']}"},
        different_counts=tuple(CLASSES),
    ),
    Row("MAM(init='paper')", "MAM, flat prefix", "mam", _mam, _POSITIONS),
    Row(
        "UniPELT(init='paper')",
        "UniPELT, flat prefix",
        "unipelt",
        _unipelt,
        _UNIPELT,
        one_token=True,
        different_counts=("gpt2",),
        left_out={"gpt2": (".loras.gate.weight", ".loras.gate.bias"), "vit": ("gate.weight", "prefix_gates.weight")},
    ),
    Row(
        "LoRA",
        "LoRA",
        "lora",
        _lora,
        {"gpt2": "two LoRAs on one matrix are one of twice the rank here, with zeros: 512 parameters instead of 256"},
        different_counts=("gpt2",),
    ),
    Row(
        "IA3",
        "IA3",
        "ia3",
        lambda kind: callbacks.IA3(IA3[kind], **BACKBONE),
        {"gpt2": "the queries, in one matrix with keys and values, are scaled too: 144 parameters instead of 112"},
        different_counts=("gpt2",),
    ),
)


def comparisons() -> list[Comparison]:
    return [
        Comparison(
            row.name,
            f"adapters 1.3.0: {row.peer}",
            kind,
            partial(difference, row, kind),
            note=row.notes.get(kind, row.notes.get("", "")),
        )
        for row in ROWS
        for kind in CLASSES
    ]


def difference(row: Row, kind: str) -> Difference:
    """Compute ours with AdapterHub's parameters, and compare with its numbers."""
    saved, stored = read_adapter(FOLDERS / kind / row.folder), numbers(kind)
    one = row.one_token and kind != "vit"
    given, functional = inputs(kind, one), stored["one_token/functional" if one else "functional"]
    computed = f"{row.folder}/one_token" if one else row.folder
    backbone = base(kind)
    assert logits_differ(backbone, kind, "base") <= 1e-6  # under this transformers as under AdapterHub's
    places = Places(backbone)
    leaves = {key: value.clone().requires_grad_() for key, value in saved.tensors.items()}
    prefix = places.architecture.prefix
    translation = translated(methods(saved), Tensors(leaves, saved.name, prefix, row.folder), places, backbone)
    ours = {key: tensor for part in translation for key, tensor in part.tensors.items()}

    module = _Module(backbone)
    row.make(kind).apply(module)
    module.eval()
    parameters = _put(module, ours)
    logits, mask = backbone(**given).logits, tokens(kind, given)
    (logits * functional * mask).sum().backward()
    gradients = torch.autograd.grad(
        [ours[key] for key in parameters],
        list(leaves.values()),
        [parameter.grad for parameter in parameters.values()],
        allow_unused=True,  # of copies of a prefix
    )
    by_name: dict[str, Tensor] = {}
    for key, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            by_name[_name(key, prefix)] = gradient
    theirs = {
        _name(key.removeprefix(f"{computed}/gradient/"), prefix): value
        for key, value in stored.items()
        if key.startswith(f"{computed}/gradient/")
    }
    assert by_name.keys() == theirs.keys()
    compared = [n for n in theirs if not n.endswith((row.left_out or {}).get(kind, ("no name",)))]
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    counted = sum(value.numel() for value in theirs.values())
    return Difference(
        relative({"logits": logits.detach() * mask}, {"logits": stored[f"{computed}/logits"] * mask}),
        relative({n: by_name[n] for n in compared}, {n: theirs[n] for n in compared}),
        None if kind in row.different_counts else (trained, counted),
    )


def _put(module: nn.Module, ours: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Give the module's adapters these values, and return their parameters by the same keys."""
    stack, parameters = adapters(module), {}
    for part in stack.parts:
        keys = stack.keys(part)
        stack.load_tensors(part, {key: ours[key].detach() for key in keys if key in ours}, "AdapterHub's")
        live = stack.parameters(part)
        parameters |= {key: live[name] for key, name in keys.items()}
    assert parameters.keys() == ours.keys()
    return parameters


def _name(key: str, prefix: str) -> str:
    """Return a parameter's name without the base model's and the adapter's; a prefix has one name for all layers."""
    name = key.removeprefix(f"{prefix}.").replace(".peer.", ".")
    return name[name.index("prefix_tunings.") :] if "prefix_tunings." in name else name


class _Module(L.LightningModule):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
