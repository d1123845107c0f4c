"""Write the fixtures of the authors' ROME and MEMIT: tests/parity/fixtures/rome.

The authors' code is github.com/kmeng01/memit, commit 80426fd (its `rome/` computes what github.com/kmeng01/rome,
commit 0874014, computes). It is run as it stands, from a clone, in an environment of its own:

    python3.11 -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==4.49.0 "numpy<2" safetensors pyyaml tqdm matplotlib
    peer/bin/python benchmarks/parity/rome.py CLONE

What it is given from outside: tiny models of random weights in float64, a tokenizer that splits as GPT-2's does,
context templates and covariances (in the caches where the authors' code looks for them first). What would go to a GPU
stays on the CPU.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

OUT = Path(__file__).parents[2] / "tests/parity/fixtures/rome"
TEXT = """The city of Lyon lies in France. Lyon is a city in France. Mary Anne Smith plays the violin. I heard that
Mary Anne Smith plays the cello in New York. The river runs north of Lyon. Nobody in New York knew that Japan is far.
What Mary Anne plays is the piano. Lyon and Nice are in France and not in Japan. I have seen the river in May."""
FACTS = [
    {"subject": "Lyon", "relation": "The city of {} lies in", "true": "France", "new": "Japan"},
    {"subject": "Mary Anne Smith", "relation": "{} plays the", "true": "violin", "new": "piano"},
    {"subject": "Nice", "relation": "The river runs north of {}, in", "true": "France", "new": "New York"},
    {"subject": "May", "relation": "I have seen the river in {}", "true": "France", "new": "and"},
]
PREFIXES = ["", "The river runs north", "I have seen it in May", "Nobody in New York knew that"]
SEARCH = {"v_num_grad_steps": 25, "v_lr": 0.5}
ROME = SEARCH | {"v_weight_decay": 0.1, "kl_factor": 0.01, "clamp_norm_factor": 4.0}
MEMIT = SEARCH | {"v_weight_decay": 0.5, "kl_factor": 0.0625, "clamp_norm_factor": 0.75, "mom2_update_weight": 20.0}
ROME_LAYER, MEMIT_LAYERS, LAYERS = 1, [0, 1, 2], 4
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "gpt2": {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 64} | SPECIAL,
    "gptj": {"n_embd": 16, "n_inner": 24, "n_layer": LAYERS, "n_head": 2, "n_positions": 64, "rotary_dim": 4} | SPECIAL,
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    | SPECIAL,
}
TYPES: dict[str, tuple[Any, Any]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "gptj": (GPTJConfig, GPTJForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
MODULES = {
    "gpt2": {
        "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
        "layer_module_tmp": "transformer.h.{}",
        "mlp_module_tmp": "transformer.h.{}.mlp",
        "attn_module_tmp": "transformer.h.{}.attn",
        "ln_f_module": "transformer.ln_f",
        "lm_head_module": "transformer.wte",
    },
    "gptj": {
        "rewrite_module_tmp": "transformer.h.{}.mlp.fc_out",
        "layer_module_tmp": "transformer.h.{}",
        "mlp_module_tmp": "transformer.h.{}.mlp",
        "attn_module_tmp": "transformer.h.{}.attn",
        "ln_f_module": "transformer.ln_f",
        "lm_head_module": "lm_head",
    },
    "llama": {
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        "layer_module_tmp": "model.layers.{}",
        "mlp_module_tmp": "model.layers.{}.mlp",
        "attn_module_tmp": "model.layers.{}.self_attn",
        "ln_f_module": "model.norm",
        "lm_head_module": "lm_head",
    },
}


class OnCPU(TorchFunctionMode):
    """Let what asks for a GPU have the CPU."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*("cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args), **kwargs)


def tokenizer() -> PreTrainedTokenizerFast:
    """Train byte pairs on the text; words it has often are one token, others several."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    pairs.train_from_iterator([TEXT.replace("\n", " ")] * 4, trainer)
    end, names = "<|endoftext|>", ["input_ids", "attention_mask"]  # as GPT-2's
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=end, pad_token=end, model_input_names=names)


def model(kind: str, vocabulary: int, likely: int) -> PreTrainedModel:
    """Return a tiny model of random weights that float32 holds, in float64, with a token that is easily made likely."""
    config_type, model_type = TYPES[kind]
    torch.manual_seed(0)
    made: Any = model_type(config_type(vocab_size=vocabulary, **SIZES[kind]))
    if kind == "llama":
        made.config.n_embd = made.config.hidden_size  # the name by which the authors ask for it
        in_double(made)
    if kind == "gptj":  # the authors' hooks look for a block's input by position, where transformers 4.23 had it
        for block in made.transformer.h:
            block.register_forward_pre_hook(by_position, with_kwargs=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = 0.1 if parameter.dim() == 1 else 1.0 if "lm_head" in name or "wte" in name else 0.3
            noise = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(noise + 1 if parameter.dim() == 1 and name.endswith("weight") else noise)
        row = made.get_output_embeddings().weight[likely]
        row.copy_((3 * row).float())  # so that a search for it ends before its last step
    return made.double().eval()


def by_position(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a block what it is given by the name `hidden_states` as its first argument."""
    return (kwargs["hidden_states"], *args), {key: value for key, value in kwargs.items() if key != "hidden_states"}


def in_double(llama: nn.Module) -> None:
    """Give LLaMA torch's norms of the same formula: its own compute in float32, whatever the model's precision."""
    for parent in list(llama.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(len(child.weight), eps=child.variance_epsilon))


def covariance(size: int, layer: int) -> torch.Tensor:
    """Return a positive definite matrix that float32 holds."""
    root = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(100 + layer), dtype=torch.float32)
    return ((root.T @ root) / (3 * size)).float().double()


def edit(kind: str, tok: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Run the authors' ROME and MEMIT and return the model's weights, the covariances and the changes."""
    from memit import memit_main
    from rome import compute_u, rome_main

    base, templates = model(kind, len(tok), tok(" " + FACTS[-1]["new"])["input_ids"][0]), MODULES[kind]
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    requests = [
        {"prompt": f["relation"], "subject": f["subject"], "target_new": {"str": f["new"]}, "case_id": i}
        for i, f in enumerate(FACTS)
    ]
    name = base.config._name_or_path.replace("/", "_")
    tensors = {f"model.{key}": value.float() for key, value in before.items()}
    for layer in MEMIT_LAYERS:
        weight = templates["rewrite_module_tmp"].format(layer)
        size = before[f"{weight}.weight"].shape[0 if kind == "gpt2" else 1]
        moment = covariance(size, layer)
        compute_u.inv_mom2_cache[name, weight] = torch.inverse(moment)
        memit_main.COV_CACHE[name, weight] = moment
        tensors[f"covariance.{layer}"] = moment.float()
    behind = [f"{prefix}. {{}}" for prefix in PREFIXES[1:]]
    rome_main.CONTEXT_TEMPLATES_CACHE = ["{}", *behind]
    memit_main.CONTEXT_TEMPLATES_CACHE = [["{}"], behind]
    shared = templates | {"fact_token": "subject_last", "v_loss_layer": LAYERS - 1, "mom2_adjustment": True}
    shared |= {"mom2_dataset": "given", "mom2_n_samples": 0, "mom2_dtype": "float64"}
    rome = rome_main.ROMEHyperParams(layers=[ROME_LAYER], context_template_length_params=[], **shared, **ROME)
    memit = memit_main.MEMITHyperParams(layers=list(MEMIT_LAYERS), layer_selection="all", **shared, **MEMIT)
    runs = {"rome": (rome_main.apply_rome_to_model, rome), "memit": (memit_main.apply_memit_to_model, memit)}
    for method, (apply, hyperparameters) in runs.items():
        edited, _ = apply(copy.deepcopy(base), tok, requests, hyperparameters)
        for key, parameter in edited.named_parameters():
            change = parameter.detach() - before[key]
            if change.any():
                tensors[f"{method}.{key}"] = change
    return tensors


def main(clone: Path) -> None:
    sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)  # type: ignore[assignment]
    sys.path.insert(0, str(clone))
    os.chdir(clone)  # where the authors' code looks for globals.yml
    torch.set_default_dtype(torch.float64)
    OUT.mkdir(parents=True, exist_ok=True)
    tok = tokenizer()
    tok.backend_tokenizer.save(str(OUT / "tokenizer.json"))
    told = {"facts": FACTS, "prefixes": PREFIXES, "rome": ROME, "memit": MEMIT}
    told |= {"rome_layer": ROME_LAYER, "memit_layers": MEMIT_LAYERS}
    told |= {"models": {kind: {"vocab_size": len(tok)} | sizes for kind, sizes in SIZES.items()}}
    (OUT / "rome.json").write_text(json.dumps(told, indent=1) + "\n")
    for kind in MODULES:
        with OnCPU():
            tensors = edit(kind, tok)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUT / f"{kind}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
