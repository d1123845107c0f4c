"""Make the numbers of steering-vectors, repeng and pyvene that `tests/parity/with_steering.py` compares ours with.

An environment of its own:

    python3.11 -m venv steering && steering/bin/pip install torch transformers==4.57.6 steering-vectors==0.12.2 \
        repeng==0.4.0 pyvene==0.1.8 scikit-learn
    steering/bin/python benchmarks/parity/steering_libraries.py

Random models of three blocks, float32, and pairs of texts of random words. Of each: steering-vectors' vectors by two
aggregators and the logits with one applied from the third token on; repeng's directions by `pca_diff` and `pca_center`
and the logits with the latter added; pyvene's logits with vectors added to the inputs of attention projections.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

np.float_ = np.float64  # repeng 0.4.0 names what NumPy 2 no longer has

# ruff: noqa: E402 - after the name above
import pyvene
import torch
from repeng import ControlModel, ControlVector, DatasetEntry
from safetensors.torch import save_file
from steering_vectors import mean_aggregator, pca_aggregator, train_steering_vector
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parents[2] / "tests/parity/fixtures/steering"
WORDS, PAIRS, BLOCKS = 48, 12, 3
FIRST_TOKEN, MULTIPLIER = 2, 1.5
SIZES = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "LLaMA": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **SIZES,
    },
    "GPT-2": {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128, **SIZES},
}
PROJECTION = {"LLaMA": "model.layers[{}].self_attn.o_proj.input", "GPT-2": "transformer.h[{}].attn.c_proj.input"}


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[architecture]
    llama = architecture == "LLaMA"
    model = LlamaForCausalLM(LlamaConfig(**config)) if llama else GPT2LMHeadModel(GPT2Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, **{str(number): number for number in range(1, WORDS)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )


def main() -> None:
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randint(2, WORDS, (PAIRS, 2, 6), generator=generator)
    pairs[:, 1, :4] = pairs[:, 0, :4]  # a question, and two answers to it
    pairs[:, 0, 5], pairs[:, 1, 5] = 7, 8  # whose last words are always the same two
    texts = [[" ".join(map(str, text)) for text in pair] for pair in pairs.tolist()]
    x = torch.randint(2, WORDS, (2, 7), generator=generator)
    shift = torch.randn(BLOCKS, 32, generator=generator)
    OUT.mkdir(parents=True, exist_ok=True)
    save_file({"pairs": pairs, "input_ids": x, "shift": shift}, OUT / "inputs.safetensors")
    facts = {"configs": CONFIGS, "first_token": FIRST_TOKEN, "multiplier": MULTIPLIER, "projections": PROJECTION}
    (OUT / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    for architecture in CONFIGS:
        model, made = model_of(architecture), {}
        for name, value in model.state_dict().items():
            if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                made[f"model.{name}"] = value.clone()
        layers = list(range(BLOCKS))
        for name, aggregator in {"mean": mean_aggregator(), "pca": pca_aggregator()}.items():
            vector = train_steering_vector(
                model, tokenizer(), [tuple(pair) for pair in texts], layers=layers, aggregator=aggregator, batch_size=4
            )
            made[f"steering_vectors.{name}"] = torch.stack([vector.layer_activations[layer] for layer in layers])
            if name == "mean":
                with vector.apply(model, multiplier=MULTIPLIER, min_token_index=FIRST_TOKEN), torch.no_grad():
                    made["steering_vectors.logits"] = model(x).logits
        entries = [DatasetEntry(*pair) for pair in texts]
        for method in ("pca_diff", "pca_center"):
            control = ControlVector.train(model, tokenizer(), entries, method=method, hidden_layers=[0, 1])
            made[f"repeng.{method}"] = torch.stack([torch.tensor(control.directions[layer]) for layer in (0, 1)])
        controlled = ControlModel(model, [0, 1])
        controlled.set_control(control, MULTIPLIER)
        with torch.no_grad():  # row by row: its mask of padding takes the position ids of one row only
            made["repeng.logits"] = torch.cat([controlled(row[None]).logits for row in x])
        model = controlled.unwrap()
        places = [
            {"component": PROJECTION[architecture].format(layer), "intervention": adding(shift[layer])}
            for layer in layers
        ]
        wrapped = pyvene.IntervenableModel(places, model=model)
        with torch.no_grad():
            made["pyvene.logits"] = wrapped({"input_ids": x})[1].logits
            made["logits"] = model_of(architecture)(x).logits
        save_file({name: value.contiguous() for name, value in made.items()}, OUT / f"{architecture}.safetensors")
        print(architecture, {name: tuple(value.shape) for name, value in made.items() if "model." not in name})


def adding(shift: torch.Tensor) -> Any:
    return lambda inputs, _: inputs + shift


if __name__ == "__main__":
    main()
