"""Write what AdapterHub's methods compute on tiny models: `tests/parity/fixtures/adapterhub`.

Needs an environment of its own, since AdapterHub pins an older transformers:

    python3.11 -m venv peer && peer/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6
    peer/bin/python benchmarks/parity/adapterhub.py tests/parity/fixtures/adapterhub

For each architecture a folder with the base model (`base/`, as transformers saves it), for each method a folder with
the adapter as AdapterHub's `save_adapter` writes it, and `numbers.safetensors`; in `imported/` further adapters, in
`reft/<architecture>/` ReFT, and in `classifier/` some with prediction heads:

| key | value |
|---|---|
| `input/<argument>` | what the models are given, padded |
| `base/logits` | the base's logits |
| `<method>/logits` | with the adapter |
| `<method>/one_token` | of the first token of each row alone, where a gate's mean over the tokens matters |
| `<method>/gradient/<parameter>` | of `(logits * functional)`, summed over the tokens that are no padding |
| `<method>/one_token/gradient/<parameter>` | the same of the first tokens |
| `functional`, `one_token/functional` | fixed random numbers |
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import adapters
import torch
import transformers
from adapters import (
    AdapterConfig,
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DiReftConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, INNER, VOCABULARY = 16, 2, 4, 24, 40
NAME = "peer"

_FLAT = PrefixTuningConfig(flat=True, prefix_length=3)
_GATED_LORA = LoRAConfig(r=2, alpha=2, use_gating=True)

# for each method its configuration, given the architecture; `cross_adapter` is Houlsby's third place in a decoder
METHODS: dict[str, Callable[[str], AdapterConfig]] = {
    "houlsby": lambda kind: DoubleSeqBnConfig(reduction_factor=4, cross_adapter=kind == "t5"),
    "pfeiffer": lambda kind: SeqBnConfig(reduction_factor=4),
    "parallel": lambda kind: ParBnConfig(reduction_factor=4),
    "adapter_plus": lambda kind: AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "compacter": lambda kind: CompacterConfig(reduction_factor=4, cross_adapter=kind == "t5"),
    "compacter++": lambda kind: CompacterPlusPlusConfig(reduction_factor=4),
    "prefix_flat": lambda kind: _FLAT,
    "prefix": lambda kind: PrefixTuningConfig(prefix_length=3, bottleneck_size=4),
    "mam": lambda kind: ConfigUnion(_FLAT, ParBnConfig(reduction_factor=4)),
    "unipelt": lambda kind: UniPELTConfig(_FLAT, SeqBnConfig(reduction_factor=4), _GATED_LORA),
    "lora": lambda kind: LoRAConfig(r=2, alpha=4),
    "ia3": lambda kind: IA3Config(),
}
# adapters that are only imported, with options of their own: their logits are kept, without gradients
IMPORTED: dict[str, Callable[[str], AdapterConfig]] = {
    "some_layers": lambda kind: DoubleSeqBnConfig(
        reduction_factor={"1": 2, "default": 4}, leave_out=[0], non_linearity="gelu"
    ),
    "learned_scaling": lambda kind: ParBnConfig(reduction_factor=4, mh_adapter=True, scaling="learned"),
    "all_matrices": lambda kind: LoRAConfig(
        r=2, alpha=3, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, leave_out=[1]
    ),
    "union": lambda kind: ConfigUnion(
        DoubleSeqBnConfig(reduction_factor=4),
        _FLAT,
        LoRAConfig(r=2, alpha=4, intermediate_lora=True, output_lora=True),
    ),
}
# likewise; suffixes in an encoder alone, whose texts no generated token follows
REFT: dict[str, Callable[[str], AdapterConfig]] = {
    "loreft": lambda kind: LoReftConfig(r=2),
    "noreft": lambda kind: NoReftConfig(r=2, layers=[1], non_linearity="relu"),
    "direft": lambda kind: DiReftConfig(r=2, tied_weights=True),
    "loreft_suffix": lambda kind: LoReftConfig(r=2, prefix_positions=2, suffix_positions=3),
}
# architectures whose names are those of one above: some methods, without gradients
COUSINS = ("roberta", "xlm-roberta", "mistral")
COUSINS_METHODS = ("houlsby", "pfeiffer", "parallel", "prefix_flat", "lora", "ia3")
# saved as `pytorch_adapter.bin`: AdapterHub cannot save prefixes as safetensors, and of the others one an architecture
PREFIXES = ("prefix_flat", "prefix", "mam", "unipelt", "union")
PICKLED = {"bert": "houlsby", "gpt2": "lora", "llama": "parallel", "t5": "compacter", "vit": "ia3"}


def main() -> None:
    options = argparse.ArgumentParser(description="Write what AdapterHub's methods compute on tiny models.")
    options.add_argument("folder", type=Path, help="where to write; what is there is replaced")
    folder: Path = options.parse_args().folder
    for kind in ("bert", "gpt2", "llama", "t5", "vit"):
        shutil.rmtree(folder / kind, ignore_errors=True)
        write(kind, folder / kind)
    for kind in COUSINS:
        shutil.rmtree(folder / kind, ignore_errors=True)
        write_logits(kind, folder / kind, {method: METHODS[method] for method in COUSINS_METHODS})
    shutil.rmtree(folder / "classifier", ignore_errors=True)
    write_with_heads(folder / "classifier")
    shutil.rmtree(folder / "reft", ignore_errors=True)
    write_reft(folder / "reft")


def write(kind: str, folder: Path) -> None:
    """Write the base model, the adapters and the numbers of one architecture."""
    write_logits(kind, folder / "imported", IMPORTED)
    shutil.rmtree(folder / "imported" / "base")
    base = base_model(kind)
    base.save_pretrained(folder / "base")
    given = inputs(kind)
    with torch.no_grad():
        logits = base(**given).logits
    numbers = {f"input/{name}": value for name, value in given.items()}
    numbers |= {"base/logits": logits, "functional": random_like(logits, 9)}
    for method, config in METHODS.items():
        model = adapted(kind, config(kind), constant_gates=kind == "vit")
        pickled = method in (*PREFIXES, PICKLED[kind])
        source = with_class_of_its_own(model, config(kind)) if kind == "t5" and "compacter" in method else model
        source.save_adapter(str(folder / method), NAME, with_head=False, use_safetensors=not pickled)
        values = compute(kind, model, given, numbers["functional"])
        if method == "unipelt" and kind != "vit":
            first = {name: value[:, :1] for name, value in given.items()}
            first["attention_mask"] = torch.ones_like(first["attention_mask"])
            numbers["one_token/functional"] = random_like(logits[:, :1], 8)
            one = compute(kind, model, first, numbers["one_token/functional"])
            values |= {f"one_token/{name}": value for name, value in one.items()}
        numbers |= {f"{method}/{name}": value for name, value in values.items()}
        print(kind, method, "moves logits by", float((values["logits"] - logits).abs().max()))
    save_file({name: value.contiguous() for name, value in numbers.items()}, folder / "numbers.safetensors")


def write_logits(kind: str, folder: Path, configs: dict[str, Callable[[str], AdapterConfig]]) -> None:
    """Write the base model, adapters and logits."""
    base_model(kind).save_pretrained(folder / "base")
    given = inputs(kind)
    numbers = {f"input/{name}": value for name, value in given.items()}
    with torch.no_grad():
        numbers["base/logits"] = base_model(kind)(**given).logits
        for method, config in configs.items():
            model = adapted(kind, config(kind), constant_gates=False)
            model.save_adapter(str(folder / method), NAME, with_head=False, use_safetensors=method not in PREFIXES)
            numbers[f"{method}/logits"] = model(**given).logits
    save_file({name: value.contiguous() for name, value in numbers.items()}, folder / "numbers.safetensors")


def write_reft(folder: Path) -> None:
    """Write adapters of hidden states and their logits."""
    for kind in ("bert", "gpt2", "llama"):
        methods = REFT if kind == "bert" else {name: REFT[name] for name in REFT if name != "loreft_suffix"}
        write_logits(kind, folder / kind, methods)
        shutil.rmtree(folder / kind / "base")


def write_with_heads(folder: Path) -> None:
    """Write a classifier, adapters with its head, with a head of AdapterHub's own, and with a language model's."""
    base_model("classifier").save_pretrained(folder / "base")
    given = inputs("bert")
    numbers = {f"input/{name}": value for name, value in given.items()}
    for method in ("lora", "pfeiffer"):
        model = adapted("classifier", METHODS[method]("bert"), constant_gates=False)
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
            numbers[f"{method}/logits"] = model(**given).logits
        model.save_adapter(str(folder / method), NAME, use_safetensors=method == "lora")
    own = adapters.BertAdapterModel(model.config)
    own.add_adapter(NAME, config=METHODS["pfeiffer"]("bert"))
    own.add_classification_head(NAME, num_labels=3)
    own.save_adapter(str(folder / "own_head"), NAME)
    language = adapted("bert", METHODS["pfeiffer"]("bert"), constant_gates=False)
    language.save_adapter(str(folder / "same_language_head"), NAME)
    with torch.no_grad():
        language.cls.predictions.bias.add_(1)
    language.save_adapter(str(folder / "other_language_head"), NAME)
    save_file({name: value.contiguous() for name, value in numbers.items()}, folder / "numbers.safetensors")


def base_model(kind: str) -> nn.Module:
    """Return a tiny model whose attention is far from uniform and whose biases and norms are not at their defaults."""
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    eager = {"attn_implementation": "eager"}
    encoder = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    encoder["num_attention_heads"] = HEADS
    if kind == "bert":
        config = transformers.BertConfig(**encoder, max_position_embeddings=16, **shared, **eager)
        model = transformers.BertForMaskedLM(config)
    elif kind == "classifier":
        config = transformers.BertConfig(**encoder, max_position_embeddings=16, num_labels=3, **shared, **eager)
        model = transformers.BertForSequenceClassification(config)
    elif kind == "roberta":
        config = transformers.RobertaConfig(**encoder, max_position_embeddings=16, **shared, **eager)
        model = transformers.RobertaForMaskedLM(config)
    elif kind == "xlm-roberta":
        config = transformers.XLMRobertaConfig(**encoder, max_position_embeddings=16, **shared, **eager)
        model = transformers.XLMRobertaForMaskedLM(config)
    elif kind == "mistral":
        config = transformers.MistralConfig(
            **encoder, num_key_value_heads=2, max_position_embeddings=16, **shared, **eager
        )
        model = transformers.MistralForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=WIDTH, n_inner=INNER, n_layer=LAYERS, n_head=HEADS, n_positions=16, **shared, **eager
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            **encoder, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True, **shared, **eager
        )
        model = transformers.LlamaForCausalLM(config)
    elif kind == "t5":
        config = transformers.T5Config(
            d_model=WIDTH,
            d_ff=INNER,
            d_kv=WIDTH // HEADS,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
            **shared,
            **eager,
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.ViTConfig(**encoder, image_size=8, patch_size=4, num_labels=5, **eager)
        model = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and kind != "t5":
                parameter.mul_(6)
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(kind: str) -> dict[str, Tensor]:
    """Return two rows, the second of them padded: to the left for decoders."""
    generator = torch.Generator().manual_seed(5)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, slice(None, 2) if kind in ("llama", "gpt2", "mistral") else slice(-2, None)] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
    return given


def adapted(kind: str, config: AdapterConfig, constant_gates: bool) -> nn.Module:
    """Return the model with an adapter of random parameters.

    UniPELT gates queries and values of GPT-2 apart, in one matrix; here both gates are the same. With
    `constant_gates` they read nothing of their input, so that their mean over the tokens is that of each token.
    """
    model = base_model(kind)
    adapters.init(model)
    model.add_adapter(NAME, config=config)
    model.train_adapter(NAME)
    model.eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            if ".parametrizations." in name:  # of orthonormal rows, which stay as they begin
                continue
            size = 1.0 if ".prefix_tunings." in name else 0.3
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
            if ".gate" in name or "_gates." in name:
                parameter.copy_(parameter[:1].expand_as(parameter))
                if constant_gates and name.endswith("weight"):
                    parameter.zero_()
            elif isinstance(config, IA3Config):
                parameter.add_(1)
    return model


def with_class_of_its_own(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Return the model as AdapterHub's own class, with the same adapter.

    Of transformers' class for T5 AdapterHub does not save the matrices that Compacter's layers share.
    """
    own = adapters.T5AdapterModel(model.config)
    own.add_adapter(NAME, config=config)
    values = {f"transformer.{name}": value for name, value in parameters(model).items()}
    own.load_state_dict(values, strict=False)
    return own


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters; AdapterHub trains a task's head too."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and f".{NAME}." in name}


def compute(kind: str, model: nn.Module, given: dict[str, Tensor], functional: Tensor) -> dict[str, Tensor]:
    """Return logits and the gradients of a linear functional of them."""
    model.zero_grad()
    logits = model(**given).logits
    tokens = 1 if kind in ("t5", "vit") else given["attention_mask"][..., None]
    (logits * functional * tokens).sum().backward()
    gradients = {
        f"gradient/{name}": parameter.grad.clone()
        for name, parameter in parameters(model).items()
        if parameter.grad is not None
    }
    return {"logits": logits.detach(), **gradients}


def random_like(values: Tensor, seed: int) -> Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main()
