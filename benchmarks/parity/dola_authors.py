"""Make the numbers of DoLa's authors that `tests/parity/with_dola.py` compares ours with.

An environment of its own, since their code brings a fork of transformers 4.28.1; a clone of github.com/voidism/DoLa at
805230e:

    python3.11 -m venv dola && dola/bin/pip install torch tokenizers==0.13.3 "numpy<2" "huggingface_hub<0.20" \
        pandas pyyaml regex requests tqdm safetensors packaging
    PYTHONPATH=CLONE:CLONE/transformers-4.28.1/src dola/bin/python benchmarks/parity/dola_authors.py

A random LLaMA of six blocks, in float32: scores of continuations by their `lm_score` (static and dynamic, with and
without `post_softmax` and the constraint on tokens), and the greedy tokens and scores of their `generate`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from dola import DoLa
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parents[2] / "tests/parity/fixtures/dola"
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
PROMPT, CONTINUATION = [5, 9, 33, 12, 40], [12, 21, 12]
LAYERS = [2, 4]
SCORED: list[dict[str, Any]] = [
    {"mode": "dola", "post_softmax": False, "relative_top": 0.0},
    {"mode": "dola", "post_softmax": True, "relative_top": 0.0},
    {"mode": "dola", "post_softmax": False, "relative_top": 0.1},
    {"mode": "dola-static", "post_softmax": False, "relative_top": 0.0},
]


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    authors = DoLa.__new__(DoLa)  # without `__init__`, which loads a model from a hub
    authors.model, authors.device, authors.stopping_criteria = model, "cpu", None
    authors.tokenizer = lambda text, **_: SimpleNamespace(input_ids=torch.tensor([[int(n) for n in text.split()]]))
    texts = " ".join(map(str, PROMPT)) + " ", " ".join(map(str, CONTINUATION))
    scores = []
    for options in SCORED:
        chosen = {"premature_layer": LAYERS[1]} if options["mode"] == "dola-static" else {}
        score, _ = authors.lm_score(
            *texts, mature_layer=CONFIG["num_hidden_layers"], candidate_premature_layers=LAYERS, **chosen, **options
        )
        scores.append(score)
    generated = model.generate(
        torch.tensor([PROMPT]),
        max_length=len(PROMPT) + 6,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        dola_decoding=True,
        mature_layer=CONFIG["num_hidden_layers"],
        premature_layer=None,
        candidate_premature_layers=LAYERS,
        relative_top=0.1,
        eos_token_id=None,
    )
    OUT.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": value.clone() for name, value in model.state_dict().items() if "inv_freq" not in name}
    tensors = {"tokens": generated.sequences[0, len(PROMPT) :], "scores": torch.stack(generated.scores)[:, 0]}
    save_file({**weights, **tensors}, OUT / "llama.safetensors")
    facts = {
        "repository": "voidism/DoLa",
        "config": CONFIG,
        "prompt": PROMPT,
        "continuation": CONTINUATION,
        "layers": LAYERS,
        "scored": [{**options, "score": score} for options, score in zip(SCORED, scores, strict=True)],
        "relative_top": 0.1,
    }
    (OUT / "llama.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts["scored"]), generated.sequences.tolist())


if __name__ == "__main__":
    main()
