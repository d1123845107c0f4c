"""LoFiT beside its authors' code: the model and its gradients in both phases, and which heads are kept."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from parity.comparison import Comparison, Difference
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.callbacks import LoFiT
from lightning_peft.tuners.head_offsets.config import OFF, OFFSET

FOLDER = Path(__file__).parent / "fixtures/lofit"
RECORD = json.loads((FOLDER / "record.json").read_text())
PEER = f"lo-fit {RECORD['commit'][:7]}"


def comparisons() -> list[Comparison]:
    """Return a row for each phase, and one for the choice of heads."""
    start = "both start at 0 here, at normal noise of 0.001 there"
    by_norm = "by the norm of a head's vector; written again in the script, the peer's is the body of lofit_trainer.py"
    return [
        Comparison("LoFiT, first phase", f"{PEER}, attn_A of all heads", "llama", first_phase, 5e-6, note=start),
        Comparison("LoFiT, kept heads", f"{PEER}, top heads", "llama", kept_heads, note=by_norm),
        Comparison("LoFiT, second phase", f"{PEER}, attn_v of the kept heads", "llama", second_phase, 5e-6, note=start),
    ]


@cache
def stored() -> dict[str, Tensor]:
    """Return what the peer's code computed."""
    return load_file(FOLDER / "llama.safetensors")


def applied() -> tuple[nn.Module, Any]:
    """Return the peer's model with the callback's adapter on it."""
    config = transformers.LlamaConfig(vocab_size=40, attn_implementation="eager", **RECORD["sizes"])
    model = transformers.LlamaForCausalLM(config).eval()
    weights = {name.removeprefix("model."): value for name, value in stored().items() if name.startswith("model.")}
    model.load_state_dict(weights)
    module, callback = L.LightningModule(), LoFiT(share=RECORD["kept"] / 8)
    module.model = model
    callback.apply(module)
    return module.eval().model, callback


def put(callback: Any, vectors: Tensor) -> None:
    """Set the vector of every head, `[heads, head_dim]` by layer."""
    for value, new in zip(callback._values(), vectors.split(4), strict=True):
        value.data.copy_(new)


def measured(model: nn.Module, callback: Any, prefix: str, heads: Tensor) -> Difference:
    """Compare logits, over the largest change of a logit, and gradients of these heads' vectors."""
    s = stored()
    logits = model(input_ids=s["texts"]).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), s["texts"][:, 1:].flatten())
    gradients = torch.cat(torch.autograd.grad(loss, callback._values()))[heads]
    theirs = s[f"{prefix}.gradients"]
    change = (s[f"{prefix}.logits"] - s["base"]).abs().max()
    return Difference(
        float((logits.detach() - s[f"{prefix}.logits"]).abs().max() / change),
        float((gradients - theirs).abs().max() / theirs.abs().max()),
        (gradients.numel(), theirs.numel()),
    )


def first_phase() -> Difference:
    model, callback = applied()
    put(callback, stored()["A"])
    return measured(model, callback, "A", torch.arange(8))


def kept_heads() -> Difference:
    _, callback = applied()
    put(callback, stored()["A"])
    with torch.no_grad():
        callback.change(0)
    assert set(torch.cat(callback._roles()).tolist()) == {OFF, OFFSET}
    kept = (torch.cat(callback._roles()) == OFFSET).nonzero()[:, 0]
    return Difference(float(not torch.equal(kept, stored()["chosen"].sort().values)))


def second_phase() -> Difference:
    model, callback = applied()
    put(callback, stored()["A"])
    with torch.no_grad():
        callback.change(0)
    put(callback, stored()["v"])
    return measured(model, callback, "v", stored()["chosen"].sort().values)
