"""Write the numbers of LoFiT's authors' LLaMA (Yin et al. 2024) that `tests/parity/with_lofit.py` reads.

Environment (Python 3.11): pip install torch==2.13.0 transformers==4.36.2 accelerate==0.25.0 datasets==2.15.0
A clone of github.com/fc2869/lo-fit at ebd344a273d3dab0b63d8bbfd7ecdb5185ae5b7b; its path is the argument:

python benchmarks/parity/lofit.py lo-fit

Run by import: `models/modeling_llama.py`, whose attentions have `attn_A` and `attn_v`, a vector for each head.
Written here again, because they stand in the body of `lofit_trainer.py`: which of them are trained in which phase,
and the choice of heads by the norm of their `attn_A`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "tests/parity/fixtures/lofit"
COMMIT = "ebd344a273d3dab0b63d8bbfd7ecdb5185ae5b7b"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
KEPT = 3  # heads


def vectors(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Return `attn_A` or `attn_v` of every head, by layer."""
    return [vector for layer in model.model.layers for vector in getattr(layer.self_attn, name)]


def run(model: nn.Module, trained: list[nn.Parameter], texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits, and the gradients `[heads, head_dim]` of the mean cross-entropy of each next token."""
    logits = model(input_ids=texts).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, trained)
    return logits.detach(), torch.stack(gradients)


def main(clone: str) -> None:
    """Write a model, vectors of both phases, and what the model computes with them."""
    sys.path.insert(0, clone)
    from models.modeling_llama import LlamaForCausalLM

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=40, **SIZES)
    model: Any = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "attn_A" not in name and "attn_v" not in name:
            parameter.data *= 4 if parameter.dim() > 1 else 1
    for layer in model.model.layers:
        layer.self_attn.applied_module = "attention"
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(3, 40, (3, 7), generator=generator)
    stored = {"texts": texts, "base": model(input_ids=texts).logits.detach()}

    scales = vectors(model, "attn_A")  # the first phase: those of all heads
    for vector in scales:
        vector.data = 0.3 * torch.randn(vector.shape, generator=generator)
    stored["A"] = torch.stack([vector.detach() for vector in scales])
    stored["A.logits"], stored["A.gradients"] = run(model, scales, texts)
    norms = np.array([np.linalg.norm(vector.detach().numpy()) for vector in scales])
    chosen = np.argsort(norms)[::-1][:KEPT]
    stored["chosen"] = torch.from_numpy(chosen.copy())

    offsets = vectors(model, "attn_v")  # the second: a fresh model, so A is 0, and those of the chosen heads
    for head, (scale, offset) in enumerate(zip(scales, offsets, strict=True)):
        scale.data.zero_()
        if head in chosen:
            offset.data = 0.3 * torch.randn(offset.shape, generator=generator)
    stored["v"] = torch.stack([vector.detach() for vector in offsets])
    stored["v.logits"], stored["v.gradients"] = run(model, [offsets[head] for head in sorted(chosen)], texts)

    FOLDER.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": v for n, v in model.state_dict().items() if "attn_" not in n.split("self_attn.")[-1]}
    save_file({n: v.detach().contiguous() for n, v in (stored | weights).items()}, FOLDER / "llama.safetensors")
    record = {"commit": COMMIT, "sizes": SIZES, "kept": KEPT, "transformers": transformers.__version__}
    (FOLDER / "record.json").write_text(json.dumps(record | {"torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
