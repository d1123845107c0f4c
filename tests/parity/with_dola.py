"""DoLa beside its authors' code; made by `benchmarks/parity/dola_authors.py`."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from parity.comparison import Comparison, Difference, relative
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.editing import DoLa

_FILES = Path(__file__).parent / "fixtures/dola"
_PEER = "voidism/DoLa 805230e"


def comparisons() -> list[Comparison]:
    rows = []
    for number, scored in enumerate(_facts()["scored"]):
        settings = f"relative_top={scored['relative_top']}, normalise={scored['post_softmax']}"
        layers = "one layer" if scored["mode"] == "dola-static" else "layers"
        rows.append(
            Comparison(
                f"`DoLa({layers}, {settings}, reference=True)`, summed contrasts",
                f"{_PEER} `lm_score`",
                "LLaMA",
                partial(_scores, number),
                outputs=5e-6,
            )
        )
    generated = "`DoLa(layers, 0.1, reference=True)`, greedy `generate`"
    return [*rows, Comparison(generated, f"{_PEER} `generate`", "LLaMA", _generated, outputs=5e-6)]


@cache
def _facts() -> dict[str, Any]:
    return json.loads((_FILES / "llama.json").read_text())


def _model() -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    tensors = load_file(_FILES / "llama.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**_facts()["config"])).eval()
    prefix = "model."
    model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return model, tensors


def _scores(number: int) -> Difference:
    facts, (model, _) = _facts(), _model()
    scored = facts["scored"][number]
    prompt, continuation = facts["prompt"], facts["continuation"]
    layers = facts["layers"][1] if scored["mode"] == "dola-static" else facts["layers"]
    with torch.no_grad(), DoLa(model, layers, scored["relative_top"], normalise=scored["post_softmax"], reference=True):
        logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
    ours = logits[range(len(continuation)), continuation].sum()
    return Difference(relative(ours, torch.tensor(scored["score"])))


def _generated() -> Difference:
    facts, (model, tensors) = _facts(), _model()
    with DoLa(model, facts["layers"], facts["relative_top"], reference=True):
        made = model.generate(
            torch.tensor([facts["prompt"]]),
            max_new_tokens=len(tensors["tokens"]),
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert torch.equal(made.sequences[0, len(facts["prompt"]) :], tensors["tokens"])
    ours, theirs = torch.stack(made.scores)[:, 0], tensors["scores"]
    plausible = torch.isfinite(theirs) & (theirs > -1000)
    assert torch.equal(plausible, ours > -1000)
    return Difference(relative(ours[plausible], theirs[plausible]))
