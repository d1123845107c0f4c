"""LoRETTA's LoRA of tensor trains: what it computes, that merging can be undone, and that it is a plain LoRA."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from tuning import QUIET, one_sentence, same, weights

from lightning_peft import AdapterError, save_adapter
from lightning_peft.backbone.quantization import Quantization, quantize
from lightning_peft.callbacks import LoRETTARep
from lightning_peft.stack.adapter_files.as_lora import as_lora
from lightning_peft.stack.stack import stack_of
from lightning_peft.tuners.loretta import LoRETTAConfig, LoRETTALayer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
PLAIN = ("linear", "conv1d")
BASES = (*PLAIN, "nf4", "int8")
X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))


def base(kind: Any = "linear", inputs: int = 64, outputs: int = 48) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs))
    if kind in ("nf4", "int8"):
        quantize(model, Quantization(kind))
    return model


def config(**options: Any) -> LoRETTAConfig:
    return LoRETTAConfig(**{"target_modules": ["0"], "r": 8, "alpha": 4.0, "tensor_rank": 3, "dropout": 0.0} | options)


def shaken(model: nn.Module, configuration: LoRETTAConfig, name: str = "a") -> Any:
    """The stack of a model with an adapter whose cores are random."""
    part = stack_of(model).add(configuration, name)
    generator = torch.Generator().manual_seed(4)
    for layer in part.injection.layers():
        for train in (layer.loretta_A[name], layer.loretta_B[name]):
            for core in train.cores:
                core.data.copy_(0.7 * torch.randn(core.shape, generator=generator))
    return stack_of(model)


def by_einsum(train: Any) -> Tensor:
    """The matrix `[outputs, inputs]` of a train of up to four cores, written out."""
    cores = [core.detach() for core in train.cores]
    rule = {2: "aib,bjc->ij", 3: "aib,bjc,ckd->ijk", 4: "aib,bjc,ckd,dle->ijkl"}[len(cores)]
    return torch.einsum(rule, *cores).reshape(math.prod(train.shape.inputs), -1).T


def change(layer: Any, name: str = "a") -> Tensor:
    return by_einsum(layer.loretta_B[name]) @ by_einsum(layer.loretta_A[name])


# -- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_it_adds_b_times_a_at_alpha_over_r(kind: str) -> None:
    model = base(kind)
    expected = model(X)
    shaken(model, config())
    torch.testing.assert_close(model(X), expected + 4 / 8 * X @ change(model[0]).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_untrained_off_and_at_strength_zero_it_is_the_base_bit_for_bit(kind: str) -> None:
    model = base(kind)
    expected = model(X)
    stack = stack_of(model)
    stack.add(config(), "new")
    assert torch.equal(model(X), expected)
    stack.remove("new")
    stack = shaken(model, config())
    assert not torch.allclose(model(X), expected)
    with stack.disabled():
        assert torch.equal(model(X), expected)
    stack.scale(0.0)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(97, 101), (576, 192), (2, 1)])
def test_layers_of_any_width_are_adapted_prime_ones_too(inputs: int, outputs: int) -> None:
    model, x = base("linear", inputs, outputs), torch.randn(4, inputs)
    expected = model(x)
    shaken(model, config())
    torch.testing.assert_close(model(x), expected + 4 / 8 * x @ change(model[0]).T, atol=1e-3, rtol=1e-4)


def test_the_rank_in_the_middle_bounds_that_of_the_product() -> None:
    model = base()
    shaken(model, config(r=8, tensor_rank=3))
    assert torch.linalg.matrix_rank(model[0].change("a")) == 3


def test_two_adapters_add_and_one_is_taken_out() -> None:
    model = base()
    stack = shaken(model, config())
    expected = model(X)
    shaken(model, config(r=4), "b")
    torch.testing.assert_close(model(X), expected + 4 / 4 * X @ change(model[0], "b").T, atol=1e-4, rtol=1e-4)
    stack.remove("b")
    assert torch.equal(model(X), expected)


def test_dropout_is_on_what_a_is_given_and_in_training_alone() -> None:
    model = base()
    shaken(model, config(dropout=0.5))
    assert torch.equal(model.eval()(X), model(X)) and not torch.equal(model.train()(X), model(X))
    layer: Any = model[0]
    torch.manual_seed(5)
    dropped = nn.functional.dropout(X, 0.5)
    torch.manual_seed(5)
    expected = layer.base_layer(X) + 4 / 8 * dropped @ change(layer).T
    torch.testing.assert_close(model(X), expected, atol=1e-4, rtol=1e-4)


def test_cores_are_float32_on_a_base_in_half_precision() -> None:
    model = base().bfloat16()
    shaken(model, config())
    assert {p.dtype for n, p in model.named_parameters() if "loretta" in n} == {torch.float32}
    assert model(X.bfloat16()).dtype == torch.bfloat16


# -- where it goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", {"q_proj", "v_proj"}), ("opt", {"q_proj", "v_proj"}), ("gpt2", {"c_attn"}), ("t5", {"q", "v"})],
)
def test_queries_and_values_are_its_own_targets(kind: str, names: set[str]) -> None:
    model = get_peft_model(tiny(kind), LoRETTAConfig(layers_to_transform=[0]))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRETTALayer)]
    assert {name.rpartition(".")[2] for name in adapted} == names
    assert all(".0." in name for name in adapted)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1)), {}, "Conv2d, but LoRETTA changes linear layers"),
        (lambda: nn.Sequential(nn.Embedding(4, 4)), {}, "Embedding, but LoRETTA changes linear layers"),
        (base, {"target_modules": []}, "target_modules is empty"),
        (base, {"target_modules": None}, "Sequential"),
        (base, {"r": 0}, "The rank r must be at least 1, got 0"),
        (base, {"tensor_rank": 0}, "The rank tensor_rank must be at least 1, got 0"),
        (base, {"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(make(), config(**options))
    assert one_sentence(str(error.value))


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_merged_it_computes_the_same_and_unmerging_gives_every_bit_back(kind: str) -> None:
    model = base(kind)
    own = model[0].weight
    stack = shaken(model, config())
    before, expected = weights(model), model(X)
    stack.merge()
    layer: Any = model[0]
    torch.testing.assert_close(layer.get_base_layer()(X), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(X), expected, atol=1e-4, rtol=1e-4)
    stack.unmerge()
    assert layer.get_base_layer().weight is own and same(before, weights(model))
    assert torch.equal(model(X), expected)


# -- as a plain LoRA ------------------------------------------------------------------------------------------------


def grouped(width: int = 576, heads: int = 9) -> LlamaForCausalLM:
    """A LLaMA with SmolLM2-135M's attention, three query heads to a key, in one block."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3,
            pad_token_id=0,
        )
    ).eval()


def as_plain_lora(folder: Path, configuration: LoRETTAConfig, out: Path) -> None:
    """Write a saved folder by `lora_factors` as peft's own LoRA."""
    tensors, ranks = {}, set()
    for key, (a, b) in configuration.lora_factors(load_file(folder / "adapter_model.safetensors")).items():
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        ranks |= {a.shape[0], b.shape[1]}
    (rank,) = ranks
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    LoraConfig(r=rank, lora_alpha=rank, target_modules=names).save_pretrained(str(out))


@pytest.mark.parametrize("make", [grouped, lambda: tiny("llama"), lambda: tiny("gpt2")], ids=["576", "llama", "gpt2"])
def test_the_exported_lora_of_rank_r_computes_the_same_logits(make: Any, tmp_path: Path) -> None:
    model = make()
    ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        ours = get_peft_model(copy.deepcopy(model), config(target_modules=None, r=6)).eval()
        for name, parameter in ours.named_parameters():
            if ".loretta_B." in name and parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        expected = ours(input_ids=ids).logits
        ours.save_pretrained(tmp_path / "ours")
        as_plain_lora(tmp_path / "ours", ours.peft_config["default"], tmp_path / "plain")
        plain = PeftModel.from_pretrained(model, tmp_path / "plain").eval()
        assert {m.r["default"] for m in plain.modules() if hasattr(m, "lora_A")} == {6}
        logits = plain(input_ids=ids).logits
    moved = (expected - bare).abs().max()
    assert moved > 1e-2 and (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_export_writes_that_lora_and_refuses_trained_norms(tmp_path: Path) -> None:
    module = tiny("llama")
    LoRETTARep(r=6).apply(module)
    save_adapter(module, tmp_path / "rep")
    plain = LoraConfig.from_pretrained(as_lora(tmp_path / "rep", tmp_path / "plain"))
    assert (plain.r, plain.lora_alpha, plain.rank_pattern) == (6, 6, {})
    module = tiny("llama")
    LoRETTARep(train_norms=True).apply(module)
    save_adapter(module, tmp_path / "both")
    with pytest.raises(AdapterError, match=r"loretta_rep-norms holds .* no product of low rank") as error:
        as_lora(tmp_path / "both", tmp_path / "refused")
    assert one_sentence(str(error.value)) and not (tmp_path / "refused").exists()


def test_a_folder_that_holds_more_or_less_than_whole_trains_is_one_sentence(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoRETTAConfig(modules_to_save=["norm"]))
    model.save_pretrained(tmp_path)
    tensors, configuration = load_file(tmp_path / "adapter_model.safetensors"), model.peft_config["default"]
    norm = next(key for key in tensors if "norm" in key)
    rest = {key: value for key, value in tensors.items() if "loretta" in key}
    core = next(key for key in rest if key.endswith("loretta_A.cores.1"))
    damaged: dict[str, dict[str, Tensor]] = {
        f"holds {norm}, which no plain LoRA has": tensors,
        "loretta_A are not those of one tensor train": {key: value for key, value in rest.items() if key != core},
        "are not those of one tensor": rest | {core: rest[core][1:]},
        "do not make a matrix of rank 7": rest,
    }
    for message, held in damaged.items():
        reader = LoRETTAConfig(r=7) if "7" in message else configuration
        with pytest.raises(AdapterError, match=message) as error:
            reader.lora_factors(held)
        assert one_sentence(str(error.value))
    assert len(configuration.lora_factors(rest)) == 6
