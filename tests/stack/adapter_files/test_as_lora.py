"""Adapters written as plain LoRA are right by a server's rule: `lora_alpha / r * B A` on the base's own weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import close
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor, nn
from tuning import QUIET, one_sentence

from lightning_peft import AdapterError, as_lora, load_adapter, save_adapter
from lightning_peft.editing import combine
from lightning_peft.stack.stack import stack_of
from lightning_peft.testing.models import rough
from lightning_peft.tuners.lorta import LoRTAConfig
from lightning_peft.tuners.ssb import SSBConfig

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
ALL = {"target_modules": "all-linear"}
MEMBERS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=2, lora_alpha=7, **ALL),
    "rsLoRA": lambda: LoraConfig(r=3, lora_alpha=7, use_rslora=True, **ALL),
    "of several ranks": lambda: LoraConfig(r=2, rank_pattern={".*q_proj": 5, ".*[.]1[.].*": 1}, **ALL),
    "of several scalings": lambda: LoraConfig(r=2, alpha_pattern={".*[.]0[.].*": 30}, use_rslora=True, **ALL),
    "PiSSA": lambda: LoraConfig(r=2, lora_alpha=5, init_lora_weights="pissa", **ALL),
    "PiSSA, scaled by the root": lambda: LoraConfig(r=3, use_rslora=True, init_lora_weights="pissa", **ALL),
    "OLoRA": lambda: LoraConfig(r=2, lora_alpha=3, init_lora_weights="olora", **ALL),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=9, total_step=5, **ALL),
    "LoRTA": lambda: LoRTAConfig(r=4, alpha=30),
    "LoRTA of some": lambda: LoRTAConfig(
        r=4, alpha=30, target_modules=["k_proj", "o_proj"], layers_to_transform=[1, 2]
    ),
}
WRONG_AS_THEY_ARE = [name for name in MEMBERS if name not in ("LoRA", "rsLoRA")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model: Any = rough("llama")  # with grouped queries
    model.save_pretrained(folder)
    return folder


def trained(config: Any, base: Path, folder: Path, kind: str = "llama") -> Tensor:
    """Save an adapter by peft as if it had been trained, and return what the model with it says."""
    torch.manual_seed(3)
    model: Any = get_peft_model(rough(kind), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for name, parameter in model.named_parameters():
        if ".lora_E." in name:
            parameter.data[1] = 0.0  # pruned
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.arange(3, 19).view(2, 8)).logits


def served(folder: Path, kind: str = "llama") -> Tensor:
    """What a server computes that knows `lora_alpha`, `r` and the factors alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, model = load_file(folder / "adapter_model.safetensors"), rough(kind)
    scaling = config["lora_alpha"] / config["r"]
    for key, a in tensors.items():
        name, is_a, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if is_a:
            module: Any = model.get_submodule(name)
            change = scaling * tensors[key.replace("lora_A", "lora_B")] @ a
            module.weight.data += change if isinstance(module, nn.Linear) else change.T
    return logits(model)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_server_computes_what_the_adapter_does(member: str, base: Path, tmp_path: Path) -> None:
    expected = trained(MEMBERS[member](), base, tmp_path / "adapter")
    assert not close(expected, logits(rough("llama")), 1e-2)
    written = as_lora(tmp_path / "adapter", tmp_path / "lora")
    assert close(served(written), expected)
    assert close(logits(PeftModel.from_pretrained(rough("llama"), written)), expected)
    config = LoraConfig.from_pretrained(written)
    assert config.r == config.lora_alpha and not config.rank_pattern and config.init_lora_weights is True
    assert {t.shape[0] for k, t in load_file(written / "adapter_model.safetensors").items() if "lora_A" in k} == {
        config.r
    }
    if member.startswith("LoRTA"):
        assert config.r == 4
    if member.startswith("PiSSA"):
        assert config.r in (4, 6)
    assert (
        "plain LoRA" not in (written / "README.md").read_text() and "vllm serve" in (written / "README.md").read_text()
    )


@pytest.mark.parametrize("member", WRONG_AS_THEY_ARE)
def test_the_card_of_what_servers_would_misread_names_the_command(member: str, tmp_path: Path) -> None:
    model: Any = tiny("llama")
    stack_of(model).add(MEMBERS[member](), "tuned")
    save_adapter(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "lightning-peft export path/to/this/folder plain-lora --as-lora" in card and "vllm serve" not in card


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "wide_llama", "opt"])
def test_lorta_on_fused_and_wide_attentions_is_a_plain_lora(kind: str, base: Path, tmp_path: Path) -> None:
    expected = trained(LoRTAConfig(r=3, alpha=20), base, tmp_path / "adapter", kind)
    assert close(served(as_lora(tmp_path / "adapter", tmp_path / "lora"), kind), expected)


def test_half_precision_is_not_rounded_again(base: Path, tmp_path: Path) -> None:
    model: Any = get_peft_model(rough("llama"), LoraConfig(r=3, lora_alpha=7, **ALL))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape).mul(0.2).bfloat16()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(rough("llama"), tmp_path / "adapter")
    assert close(served(as_lora(tmp_path / "adapter", tmp_path / "lora")), logits(loaded))
    assert {t.dtype for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {torch.float32}


def test_the_dial_is_written_in_and_a_stack_stays_one(tmp_path: Path) -> None:
    model: Any = rough("llama")
    stack = stack_of(model)
    for name, config in (("first", LoRTAConfig(r=2)), ("second", LoraConfig(r=3, target_modules=["up_proj"]))):
        stack.add(config, name)
        for tensor in stack.tensors(stack[name]).values():
            nn.init.normal_(tensor, std=0.4)
    stack.scale(0.5, "first")
    save_adapter(model, tmp_path / "stack")
    plain: Any = rough("llama")
    load_adapter(plain, as_lora(tmp_path / "stack", tmp_path / "lora"))
    assert [(part.name, type(part.config)) for part in stack_of(plain).parts] == [
        ("first", LoraConfig),
        ("second", LoraConfig),
    ]
    assert close(logits(plain), logits(model))


def test_kinds_of_low_rank_are_summed_with_one_another(base: Path, tmp_path: Path) -> None:
    kinds = ("LoRTA", "AdaLoRA", "of several ranks")
    for kind in kinds:
        trained(MEMBERS[kind](), base, tmp_path / kind)
        as_lora(tmp_path / kind, tmp_path / f"{kind}, plain")
    mixed = combine([tmp_path / kind for kind in kinds], tmp_path / "mixed", [1.0, -0.5, 2.0])
    plain = combine([tmp_path / f"{kind}, plain" for kind in kinds], tmp_path / "plain", [1.0, -0.5, 2.0])
    results = [logits(PeftModel.from_pretrained(rough("llama"), folder)) for folder in (mixed, plain)]
    assert close(results[0], results[1]) and not close(results[0], logits(rough("llama")), 1e-2)
    weights = [1.0]
    cut = combine([tmp_path / "LoRTA"], tmp_path / "cut", weights, rank=1)
    assert LoraConfig.from_pretrained(cut).r == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: SSBConfig(target_modules=["q_proj"]), "holds a SSBConfig, whose change is no product of low rank."),
        (
            lambda: LoraConfig(r=2, use_dora=True, **ALL),
            "does more than add a product to each matrix (use_dora): merge",
        ),
        (lambda: LoraConfig(r=2, bias="all", **ALL), "does more than add a product to each matrix (bias): merge it."),
        (
            lambda: LoRTAConfig(r=2, modules_to_save=["up_proj"]),
            "up_proj.weight besides its tensor, which no plain LoRA has: merge it.",
        ),
    ],
)
def test_what_is_more_or_other_is_one_sentence(config: Any, message: str, base: Path, tmp_path: Path) -> None:
    trained(config(), base, tmp_path / "adapter")
    with pytest.raises(AdapterError) as error:
        as_lora(tmp_path / "adapter", tmp_path / "lora")
    assert message in str(error.value) and one_sentence(str(error.value).replace(".weight", ""))
    assert not (tmp_path / "lora").exists()


def test_a_beginning_that_cannot_be_repeated_and_a_damaged_tensor_are_refused(base: Path, tmp_path: Path) -> None:
    trained(LoraConfig(r=2, **ALL), base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "lora_ga"}))
    with pytest.raises(AdapterError, match=r"weights alone do not tell again \(lora_ga\): merge it\.$"):
        as_lora(tmp_path / "adapter", tmp_path / "lora")
    trained(LoRTAConfig(r=2), base, tmp_path / "lorta")
    file = tmp_path / "lorta" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"places": None}))
    with pytest.raises(AdapterError, match="does not say where its matrices stand in its tensor"):
        as_lora(tmp_path / "lorta", tmp_path / "lora")
    file.write_text(json.dumps(config | {"places": {"model.layers.0.self_attn.q_proj": {"matrix": "q", "layer": -1}}}))
    with pytest.raises(AdapterError, match=r"The place of model\.layers\.0\.self_attn\.q_proj is one of q, k, v, o"):
        as_lora(tmp_path / "lorta", tmp_path / "lora")
