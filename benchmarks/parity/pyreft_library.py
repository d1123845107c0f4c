"""Make the numbers of pyreft that `tests/parity/with_pyreft.py` compares ours with.

pyreft 0.1.0 asks for an old transformers and much that its classes do not use, so without what they depend on:

    pip install --no-deps --target pyreft-alone pyreft==0.1.0 pyvene==0.1.8
    PYTHONPATH=pyreft-alone python benchmarks/parity/pyreft_library.py

in an environment of this package, whose numbers they were made with (torch 2.13.0, transformers 5.23.0). A LLaMA of
three blocks, every weight a sine, float32; interventions of rank 2 behind the first and the last block, on the first
and the last three tokens of prompts of seven and eight. Of each case: pyreft's tensors, the logits, the gradients of
the cross-entropy of the answers, and what is written greedily with the cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyreft
import torch
from pyreft.dataset import get_intervention_locations
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parents[2] / "tests/parity/fixtures/pyreft"
RANK, WIDTH, LAYERS, NEW_TOKENS = 2, 16, (0, 2), 6
POSITIONS, PROMPTS = "f3+l3", (7, 8)  # as pyreft writes them; the lengths of the prompts
CONFIG = {
    "vocab_size": 32,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IDS = torch.tensor([[1, 5, 9, 17, 3, 22, 8, 30, 11, 4], [1, 7, 2, 28, 13, 6, 19, 10, 25, 12]])
CASES: dict[str, tuple[type, bool, dict[str, Any]]] = {
    "loreft": (pyreft.LoreftIntervention, True, {}),
    "loreft_apart": (pyreft.LoreftIntervention, False, {}),
    "noreft": (pyreft.NoreftIntervention, True, {"add_bias": False}),
    "direft": (pyreft.DireftIntervention, True, {"act_fn": "relu"}),
    "nodireft_apart": (pyreft.NodireftIntervention, False, {"add_bias": False}),
}


def main() -> None:
    tensors: dict[str, Tensor] = {"input_ids": IDS, "base": base_model()(IDS).logits.detach()}
    for name, (kind, shared, options) in CASES.items():
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in computed(kind, shared, options).items()}
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT / "numbers.safetensors")
    facts = {"config": CONFIG, "prompts": PROMPTS, "layers": LAYERS, "r": RANK}
    (OUT / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def sines(shape: tuple[int, ...], number: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * (1 + 0.37 * number)).reshape(shape).float()


def base_model() -> Any:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            values = sines(tuple(parameter.shape), number)
            parameter.copy_(0.35 * values if parameter.dim() > 1 else 1 + 0.1 * values)
    return model


def computed(kind: type, shared: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    layers = LAYERS if shared else LAYERS * 2  # pyreft has another intervention for the suffix of each layer
    given = {"embed_dim": WIDTH, "low_rank_dimension": RANK, "dropout": 0.0, "dtype": torch.float32, **options}
    places = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": kind(**given)}
        for layer in layers
    ]
    model = pyreft.get_reft_model(base_model(), pyreft.ReftConfig(representations=places), set_device=False)
    model.eval()
    parts = [fill(part, 20 + 3 * number) for number, part in enumerate(model.interventions.values())]
    located = [
        get_intervention_locations(
            last_position=length, positions=POSITIONS, num_interventions=len(layers), share_weights=shared
        )
        for length in PROMPTS
    ]
    units = {"sources->base": (None, torch.tensor(located).permute(1, 0, 2).tolist())}
    logits = model({"input_ids": IDS}, unit_locations=units)[1].logits
    answers = IDS.masked_fill(torch.arange(IDS.shape[1]) < torch.tensor(PROMPTS)[:, None], -100)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), answers[:, 1:].flatten())
    trained = {f"{key}.{number}": part[key] for number, part in enumerate(parts) for key in part}
    leaves = {key: tensor for key, tensor in trained.items() if tensor.is_leaf and tensor.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    prompt = IDS[:1, : PROMPTS[0]]
    first = {"sources->base": (None, torch.tensor(located[:1]).permute(1, 0, 2).tolist())}
    written = model.generate(
        {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)},
        unit_locations=first,
        intervene_on_prompt=True,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )[1]
    numbers = {"logits": logits, "written": written, **trained}
    numbers |= {f"gradient.{key}": value for key, value in zip(leaves, gradients, strict=True)}
    return {key: value.detach() for key, value in numbers.items()}


def fill(part: Any, number: int) -> dict[str, Tensor]:
    """Give an intervention its tensors; return R `[r, width]`, W and b, the trained parameters as themselves."""
    with torch.no_grad():
        part.learned_source.weight.copy_(0.4 * sines((RANK, WIDTH), number))
        part.learned_source.bias.copy_(0.5 * sines((RANK,), number + 1))
        if hasattr(part, "rotate_layer"):
            part.rotate_layer.weight = torch.linalg.qr(sines((WIDTH, RANK), number + 2))[0]
            rows = part.rotate_layer.weight.T.clone()
        else:
            part.proj_layer.weight.copy_(0.4 * sines((RANK, WIDTH), number + 2))
            rows = part.proj_layer.weight
    return {"rows": rows, "source": part.learned_source.weight, "bias": part.learned_source.bias}


if __name__ == "__main__":
    main()
