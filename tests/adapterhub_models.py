"""Tiny models, and what AdapterHub computed with adapters on them: written by `benchmarks/parity/adapterhub.py`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

FOLDERS = Path(__file__).parent / "parity" / "fixtures" / "adapterhub"
# architectures on which all methods were computed
CLASSES = {
    "bert": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
}
# those with the same names as one of them
COUSINS = {
    "roberta": "RobertaForMaskedLM",
    "xlm-roberta": "XLMRobertaForMaskedLM",
    "mistral": "MistralForCausalLM",
    "classifier": "BertForSequenceClassification",
}


def base(kind: str) -> Any:
    """Return the base model of an architecture."""
    cls: Any = getattr(transformers, {**CLASSES, **COUSINS}[kind])
    return cls.from_pretrained(FOLDERS / kind / "base", attn_implementation="eager").eval()


@cache
def numbers(folder: str) -> dict[str, Tensor]:
    """Return what AdapterHub computed; `folder` is an architecture, or one with `/imported`."""
    return load_file(FOLDERS / folder / "numbers.safetensors")


def inputs(kind: str, one_token: bool = False) -> dict[str, Tensor]:
    """Return what AdapterHub's models were given, two rows; with `one_token` the first token of each alone."""
    stored = numbers(kind)
    given = {key.removeprefix("input/"): value for key, value in stored.items() if key.startswith("input/")}
    if one_token:
        given = {key: value[:, :1] for key, value in given.items()}
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    return given


def tokens(kind: str, given: dict[str, Tensor]) -> Tensor:
    """Return 1 for each row of logits that is no padding's, 0 for the others."""
    return torch.ones(()) if kind in ("t5", "vit", "classifier") else given["attention_mask"][..., None]


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference divided by the largest of their values."""
    largest = max(float(value.abs().max()) for value in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / largest


def logits_differ(model: Any, kind: str, key: str, folder: str | None = None) -> float:
    """Return how far a model's logits are from AdapterHub's, relative; those of padding are left out."""
    given = inputs(kind)
    mask = tokens(kind, given)
    with torch.no_grad():
        ours = model(**given).logits * mask
    return relative({"logits": ours}, {"logits": numbers(folder or kind)[f"{key}/logits"] * mask})
