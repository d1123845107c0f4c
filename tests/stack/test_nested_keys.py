"""An adapter whose wrappers peft nests: every tensor under a key of its own, the key that peft gives it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import load_adapter, save_adapter
from lightning_peft.backbone.fingerprint import fingerprint
from lightning_peft.backbone.modules import base_modules, flat_key
from lightning_peft.stack.adapter_files.folder import AdapterError
from lightning_peft.stack.stack import AdapterStack, stack_of

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def small(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """A tiny random mixture of experts of transformers."""
    import transformers

    def make() -> nn.Module:
        common = {
            "vocab_size": 60,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "num_experts_per_tok": 2,
            "pad_token_id": 0,
        }
        model_class = getattr(transformers, f"{name}ForCausalLM")
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**common, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape) + (parameter.dim() == 1))
        return model.eval()

    return make


class Attending(nn.Module):
    """PyTorch's attention, in which peft wraps the whole and, inside, its output projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 8)
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(self.attention(x, x, x)[0])


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": small("Mixtral", num_local_experts=4),
    "qwen3_moe": small("Qwen3Moe", num_experts=4, moe_intermediate_size=16, head_dim=8),
    "gpt_oss": small("GptOss", num_local_experts=4, head_dim=8),
    "deepseek_v3": small(
        "DeepseekV3",
        n_routed_experts=4,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
}
CASES: list[tuple[str, Callable[[], nn.Module], Callable[[], PeftConfig]]] = [
    *(
        (f"{name}: experts", make, lambda: LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS))
        for name, make in MIXTURES.items()
        if name != "deepseek_v3"
    ),
    ("deepseek_v3: all-linear", MIXTURES["deepseek_v3"], lambda: LoraConfig(r=2, target_modules="all-linear")),
    ("qwen3_moe: all-linear", MIXTURES["qwen3_moe"], lambda: LoraConfig(r=2, target_modules="all-linear")),
    ("attention", Attending, lambda: LoraConfig(r=2, target_modules=["attention", "out"])),
    ("biases", Attending, lambda: LoraConfig(r=2, target_modules=["attention", "out"], bias="all")),
]


def noisy(model: nn.Module) -> None:
    """Make what is trained show, alike in models that name it alike."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


@torch.no_grad()
def look(model: nn.Module) -> Tensor:
    output = model(IDS)
    return output if isinstance(output, Tensor) else output.logits


def adapted(make: Callable[[], nn.Module], *configs: PeftConfig) -> tuple[nn.Module, AdapterStack]:
    model = make()
    stack = stack_of(model)
    for number, config in enumerate(configs):
        stack.add(config, f"part{number}")
    stack.train([part.name for part in stack.parts])
    noisy(model)
    return model, stack


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("make", "config"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_folder_is_what_plain_peft_writes_and_reads(
    make: Callable[[], nn.Module], config: Callable[[], PeftConfig], tmp_path: Path
) -> None:
    model, stack = adapted(make, config())
    keys = stack.keys(stack.parts[0])
    assert set(keys.values()) == trained(model) and len(keys) == len(trained(model))
    save_adapter(model, tmp_path / "ours")
    fresh = make()
    load_adapter(fresh, tmp_path / "ours")
    assert torch.equal(look(fresh), look(model))
    plain = PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert torch.allclose(look(plain), look(model), atol=1e-5) and not torch.allclose(look(make()), look(model))

    theirs = get_peft_model(make(), config()).eval()  # type: ignore[arg-type]
    noisy(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert saved.keys() == load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    read = make()
    load_adapter(read, tmp_path / "theirs")
    assert torch.allclose(look(read), look(theirs), atol=1e-6)


EDIT = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
STACKS: dict[str, list[PeftConfig]] = {
    "the same experts": [LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS) for _ in range(2)],
    # peft puts a wrapper of the second inside the first's, in the one case where it is alone, in the other not
    "the first parameter below": [
        LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[:1]),
        LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS),
    ],
    "the second parameter below": [
        LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[1:]),
        LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS),
    ],
    "one inside": [
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS[:1]),
        LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[1:]),
    ],
    "another method": [LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS), EDIT],
    "another method below": [EDIT, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)],
}


@pytest.mark.parametrize("name", STACKS)
def test_in_a_stack_each_adapter_has_the_keys_it_has_alone(name: str, tmp_path: Path) -> None:
    make = MIXTURES["qwen3_moe"]  # in which both parameters of an expert have one shape
    configs = copy.deepcopy(STACKS[name])
    model, stack = adapted(make, *configs)
    base, both = look(make()), look(model)
    for part, config in zip(stack.parts, configs, strict=True):
        alone, one = adapted(make, config)
        assert stack.keys(part).keys() == one.keys(one.parts[0]).keys()
        one.load_tensors(one.parts[0], stack.tensors(part), "the stack")
        with stack.disabled():
            stack.enable(True, part.name)
            assert torch.allclose(look(model), look(alone), atol=1e-6) and not torch.allclose(look(alone), base)
    save_adapter(model, tmp_path)
    fresh = make()
    load_adapter(fresh, tmp_path)
    assert torch.equal(look(fresh), both)
    for part in reversed(list(stack.parts)):
        stack.remove(part.name)
    assert torch.equal(look(model), base) and dict(model.named_modules()).keys() == dict(make().named_modules()).keys()


def test_an_adapter_put_on_again_after_calls_is_nested_as_on_a_fresh_model(tmp_path: Path) -> None:
    make, both = MIXTURES["qwen3_moe"], LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
    model, _ = adapted(make, both)
    expected = look(model)
    save_adapter(model, tmp_path)
    other, stack = adapted(make, LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[:1]))
    look(other)  # in which the wrapped parameter is taken out and registered again, as the last
    stack.remove("part0")
    load_adapter(other, tmp_path)
    assert torch.equal(look(other), expected)


@pytest.mark.parametrize("name", ["attention", "biases"])
def test_a_folder_with_keys_that_leave_out_wrappers_is_read(name: str, tmp_path: Path) -> None:
    make, config = next(case[1:] for case in CASES if case[0] == name)
    model, _ = adapted(make, config())
    file = save_adapter(model, tmp_path) / "adapter_model.safetensors"
    flat = {flat_key(key): value for key, value in load_file(file).items()}
    assert flat.keys() != load_file(file).keys()
    save_file(flat, file)
    fresh = make()
    load_adapter(fresh, tmp_path)
    assert torch.equal(look(fresh), look(model))


def test_keys_that_tell_nested_tensors_no_longer_apart_are_refused(tmp_path: Path) -> None:
    make = MIXTURES["mixtral"]
    model, _ = adapted(make, LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS))
    file = save_adapter(model, tmp_path) / "adapter_model.safetensors"
    save_file({flat_key(key): value for key, value in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match=r"4 tensors are missing, the first is .*base_layer\.lora_A"):
        load_adapter(make(), tmp_path)


class Layered(nn.Module):
    """A network with a module of its own that is called `base_layer`, as timm's DLA has one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"base_layer": nn.Linear(3, 3)})
        self.stem.register_parameter("weight", nn.Parameter(torch.ones(3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem["base_layer"](x) @ self.stem.weight


def test_a_module_that_is_itself_called_base_layer_keeps_its_name() -> None:
    model = Layered()
    assert "stem.base_layer" in dict(base_modules(model))
    other = Layered()
    other.stem["base_layer"].weight = nn.Parameter(torch.ones(5, 3))
    assert fingerprint(model)["names"] != fingerprint(other)["names"]
    stack = stack_of(model)
    stack.add(LoraConfig(r=2, target_modules=["stem.base_layer"]), "lora")
    assert stack.parts[0].injection.places() == ["stem.base_layer"]
    assert fingerprint(model)["names"] == stack.base["names"]


def test_the_mixtures_have_what_the_tests_are_about() -> None:
    for make in MIXTURES.values():
        fused = [name for name, parameter in make().named_parameters() if parameter.dim() == 3]
        assert any(name.endswith("experts.gate_up_proj") for name in fused)
